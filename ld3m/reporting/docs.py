"""Renders README.md and docs/*.md from docs/templates, with the numbers of the tables under reports/ and benchmarks/.

    python -m ld3m.reporting.docs

A template reads the one row of a table that has the given values, and formats one of its columns:

    {{ row("reports/mnist5k/tables/main/scores", objective="dm", space="ld3m", architecture="unseen").mean | percent }}

Beside a sentence stands what it claims, `{% do claim(...) %}` or, of the sign of a difference that is significant at
95 % ("0" where it is not), `{% do significant("+", TABLE, ...) %}`. Rendering fails where the tables no longer agree.
"""

from functools import cache
from pathlib import Path

import jinja2
import pandas as pd

from ld3m.runtime.paths import ROOT
from ld3m.runtime.storage import write_bytes

INTERVAL = ("mean", "ci_low", "ci_high")
FILTERS = {
    "number": lambda value, digits=0: f"{value:,.{digits}f}",
    "percent": lambda fraction: f"{100 * fraction:.1f}",
    "points": lambda fraction: f"{100 * fraction:+.1f}",
    "interval": lambda row: "{:+.1f} ({:+.1f} to {:+.1f})".format(*(100 * row[k] for k in INTERVAL)),
}


def render(root: Path = ROOT) -> dict[Path, str]:
    """Return the text of every document by its path; `root` holds docs/templates and the tables."""

    @cache
    def table(name: str) -> pd.DataFrame:
        return pd.read_csv(root / f"{name}.csv", keep_default_na=False, na_values=[""])

    def row(name: str, **where: object) -> dict:
        rows = table(name)
        for column, value in where.items():
            rows = rows[rows[column] == value]
        if len(rows) != 1:
            raise ValueError(f"{name}.csv: {len(rows)} rows have {where}; it must be one")
        return rows.iloc[0].to_dict()

    def claim(holds: bool, *about: object) -> None:
        if not holds:
            raise ValueError(f"the tables no longer support a sentence; correct it and its claim {about}")

    def significant(sign: str, name: str, **where: object) -> None:
        found = row(name, **where)
        claim(sign == ("+" if found["ci_low"] > 0 else "-" if found["ci_high"] < 0 else "0"), sign, name, where)

    loader = jinja2.FileSystemLoader(root / "docs/templates")
    options = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    templates = jinja2.Environment(
        loader=loader, extensions=["jinja2.ext.do"], undefined=jinja2.StrictUndefined, **options
    )
    templates.filters.update(FILTERS)
    templates.globals.update(row=row, claim=claim, significant=significant)
    names = [name.removesuffix(".j2") for name in templates.list_templates()]
    return {
        Path(name if name == "README.md" else f"docs/{name}"): templates.get_template(f"{name}.j2").render()
        for name in names
    }


if __name__ == "__main__":
    for path, text in render().items():
        write_bytes(ROOT / path, text.encode())
