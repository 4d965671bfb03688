"""The numbers of README.md, read from the tables.

    python -m ld3m.reporting.readme        # writes them, and the main table, into README.md

A number stands between marks that say where it comes from: the table under reports/ without ".csv", the column, the
format, and what picks the one row:

    <!-- = tables/main mean percent objective=dm space=ld3m architecture=unseen -->67.2<!-- . -->
"""

import re
from pathlib import Path
from typing import Any

import pandas as pd

from ld3m.runtime import paths
from ld3m.runtime.storage import write_bytes

MARK = re.compile(r"<!-- = (?P<what>[^>]+?) -->(?P<shown>[^<]*)<!-- \. -->")
TABLE = ("<!-- table -->\n", "<!-- /table -->\n")
FORMATS = {
    "percent": lambda value: f"{100 * value:.1f}",  # of a fraction
    "points": lambda value: f"{100 * value:+.1f}",  # of a difference of fractions
    "whole": lambda value: f"{value:,.0f}",
    "tenths": lambda value: f"{value:.1f}",
    "hundredths": lambda value: f"{value:.2f}",
    "text": str,
}


def filled(text: str, reports: Path) -> str:
    """`text` with the main table and every marked number as the tables in `reports` have them.

    ValueError for a mark that picks no row or several, or names a format or column that is not there.
    """
    before, _, rest = text.partition(TABLE[0])
    _, _, after = rest.partition(TABLE[1])
    table = (reports / "tables/main.md").read_text()
    return MARK.sub(lambda found: _marked(found["what"], reports), f"{before}{TABLE[0]}{table}{TABLE[1]}{after}")


def number(what: str, reports: Path) -> str:
    """What stands at a mark that says `what`."""
    words = re.findall(r"""(?:[^\s"]|"[^"]*")+""", what)
    if len(words) < 3 or words[2] not in FORMATS:
        raise ValueError(f"the mark {what!r} needs a table, a column, one of {', '.join(FORMATS)}, and key=value pairs")
    table = pd.read_csv(reports / f"{words[0]}.csv", keep_default_na=False, na_values=[""])
    for word in words[3:]:
        key, _, value = word.partition("=")
        if key not in table:
            raise ValueError(f"the mark {what!r} names the column {key!r}; {words[0]} has {', '.join(table.columns)}")
        table = table[table[key].astype(str) == value.strip('"')]
    if len(table) != 1 or words[1] not in table:
        raise ValueError(f"the mark {what!r} picks {len(table)} rows of the column {words[1]!r}; it must pick one")
    return FORMATS[words[2]](_plain(table.iloc[0][words[1]]))


def _marked(what: str, reports: Path) -> str:
    return f"<!-- = {what} -->{number(what, reports)}<!-- . -->"


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


if __name__ == "__main__":
    readme = paths.ROOT / "README.md"
    write_bytes(readme, filled(readme.read_text(), paths.ROOT / "reports").encode())
