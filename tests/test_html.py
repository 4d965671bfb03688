"""The report: valid, self-contained, its numbers those of the tables, and readable in a real browser."""

from html.parser import HTMLParser

import pandas as pd
import pytest
from browser import needs_chromium, open_page
from PIL import Image

from ld3m.reporting import html, published
from ld3m.reporting.tables import CELL, CHANGES, COLUMNS, NAMES, UNSEEN
from ld3m.runtime import paths

VOID = {"meta", "link", "img", "br", "line", "circle"}
ARCHITECTURES = ["convnet", "vit", UNSEEN]
SETS = [("none", "random_real", 1), ("dm", "pixel", 1), ("dm", "ld3m", 1), ("none", "full_data", 0)]
SECTIONS = [
    *(
        "results",
        "runs",
        "metrics",
        "paper",
        "images",
        "accuracy",
        "curves",
        "gradients",
        "steps",
        "ablations",
        "costs",
        "prior",
        "more",
    )
]


class Document(HTMLParser):
    """Tags with their attributes, the text of every table cell, and whether every tag is closed where it should be."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.tables, self.text = [], [], {}, []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        if tag == "table":
            self.rows = self.tables[attributes["id"].removeprefix("table-")] = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.text.append(data.strip())
        if self.open and ("th" in self.open or "td" in self.open):
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def frame(self, name, headers):
        """A table as text, indexed by its row headers."""
        columns, *rows = self.tables[name]
        return pd.DataFrame(rows, columns=columns).set_index(columns[:headers])


def scores(rows, seed=0):
    """Rows with n, mean and an interval that is different in every row."""
    values = [(3, 0.3 + 0.0137 * k, 0.29 + 0.0137 * k - 0.001 * k, 0.31 + 0.0137 * k + 0.001 * k) for k in range(99)]
    return [(*row, *values[seed + k]) for k, row in enumerate(rows)]


@pytest.fixture
def folders(tmp_path):
    """Every table and figure of a report on the made-up data set <toy>."""
    tables, figures = tmp_path / "tables", tmp_path / "figures"
    tables.mkdir()
    figures.mkdir()
    main = scores([("<toy>", ipc, o, s, a) for o, s, ipc in SETS for a in ARCHITECTURES])
    changes = scores([(1, "dm", "ld3m", minus, a) for minus in ("random_real", "pixel") for a in ARCHITECTURES], seed=3)
    changes = [(*row, 0.01 * k) for k, row in enumerate(changes)]
    ablations = scores(
        [
            ("<toy>", ablation, setting, "dm", "ld3m", 1, a)
            for ablation, settings in {"steps": [2, 10], "defects": ["none", "noise redrawn"]}.items()
            for setting in settings
            for a in ARCHITECTURES
        ]
        + [("<toy>", "defects", "first-order MTT", "mtt", "ld3m", 1, a) for a in ARCHITECTURES]
    )
    frames = {
        "main": pd.DataFrame(main, columns=COLUMNS),
        "scores": pd.DataFrame(main, columns=COLUMNS),
        "differences": pd.DataFrame(changes, columns=CHANGES),
        "paper": published.printed(),
        "settings": pd.DataFrame([("Resolution", "128 px", "32 px")], columns=["setting", "paper", "ours"]),
        "costs": pd.DataFrame(
            [("<toy>", 1, "dm", "ld3m", 40, 12.5, 812.25)],
            columns=["dataset", "ipc", "objective", "space", "iterations", "seconds", "peak_mib"],
        ),
        "gradient_norms": pd.DataFrame(
            [("z", skip, 5, norm, norm - 1, norm + 1) for skip, norm in (("x0", 2.5), ("None", 1.25))],
            columns=["learned", "skip", "steps", "mean", "min", "max"],
        ),
        "prior": pd.DataFrame([{"recognised": 0.95, "mse": 0.0125}]),
        "gan": pd.DataFrame([{"classifier_accuracy": 0.975, "recognised": 0.965}]),
        "ablations": pd.DataFrame(
            ablations,
            columns="dataset ablation setting objective space ipc architecture n mean ci_low ci_high".split(),
        ),
        "ablation_changes": pd.DataFrame(
            [
                ("<toy>", "defects", "noise redrawn", "dm", "ld3m", 1, a, 3, mean, mean - 0.004, mean + 0.004, 0.01)
                for a, mean in ((ARCHITECTURES[0], 0.3), (UNSEEN, -0.012))
            ],
            columns="dataset ablation setting objective space ipc architecture n mean ci_low ci_high p".split(),
        ),
        "ablation_costs": pd.DataFrame(
            [("<toy>", "steps", T, 0.5 * T, 0.25, 0.125 * T, 700.0 + T) for T in (2, 10)],
            columns="dataset ablation setting grad_norm_z grad_norm_c seconds_per_iteration peak_mib".split(),
        ),
        "metrics": pd.DataFrame(
            [
                (1, "dm", "ld3m", "convnet", 0.9, 0.6, 0.95, 0.3, 0.05, 0.75),
                (1, "dm", "ld3m", "vit", 0.3, 0.2, 0.5, 0.1, 0.2, 0.44),
                (1, "dm", "ld3m", "mean", 0.6, 0.4, 0.72, 0.2, 0.125, 0.6),
            ],
            columns=[
                *("ipc", "objective", "space", "architecture", "accuracy", "random_real", "full_data"),
                *("IOR", "HLR", "LRS"),
            ],
        ),
        "runs": pd.DataFrame(main, columns=COLUMNS),
        "runs_differences": pd.DataFrame(changes, columns=CHANGES),
        "spread": pd.DataFrame(
            [
                (1, "dm", "ld3m", "convnet", 3, 5, 0.02, 0.015, 0.025),
                (1, "dm", "ld3m", "vit", 3, 5, 0.03, 0.0, 0.02),
                (0, "all", "all", "convnet", 3, 5, 0.021, 0.016, 0.0264),
            ],
            columns=[*CELL, "networks", "runs", "net_sd", "run_sd", "total_sd"],
        ),
        "validation": pd.DataFrame(
            [(1, "dm", "ld3m", iteration, 0.5 + 0.01 * iteration) for iteration in (0, 10, 20)],
            columns=["ipc", "objective", "space", "iteration", "accuracy"],
        ),
        "other": pd.DataFrame([("dm", 0.125, float("nan"))], columns=["objective", "a", "b"]),
    }
    frames["comparison"] = published.comparison(frames["main"], frames["differences"])
    (tmp_path / "costs").mkdir()
    for name, frame in frames.items():
        place = tmp_path / "costs" if "costs" in name else tables
        frame.to_csv(place / f"{name}.csv", index=False, float_format="%.6f")
    (tables / "main.md").write_text(
        "| a |\n|---|\n| 1 |\n\nThe note.\n\n- DM: **not told apart** & so on.\n- DM: above.\n"
    )
    (tables / "runs.md").write_text("| a |\n|---|\n| 1 |\n\nOf runs.\n\n- DM: above over runs.\n")
    names = ["accuracy-ipc1", "curves-ipc1", "gradient-norms", "steps", "prior"]
    for name in [*names, *(f"set-{o}-{s}-{ipc}" for o, s, ipc in SETS if ipc)]:
        Image.new("RGB", (1200, 400), (200, 30, 30)).save(figures / f"{name}.png")
    return tables, figures


@pytest.fixture
def document(folders):
    return Document(html.render(*folders))


def percent(row):
    return f"{100 * row.mean:.1f} ± {100 * (row.ci_high - row.mean):.1f}"


def test_the_page_is_whole_and_accessible(document):
    assert document.all("html") == [{"lang": "en"}]
    assert len(document.all("h1")) == len(document.all("title")) == len(document.all("main")) == 1
    assert [attributes["id"] for attributes in document.all("h2")] == SECTIONS
    assert [attributes["href"] for attributes in document.all("a")] == [f"#{section}" for section in SECTIONS]
    assert len(document.all("caption")) == len(document.all("table")) > 8
    assert all(attributes["scope"] in ("col", "row") for attributes in document.all("th"))
    for rows in document.tables.values():
        assert len(rows) > 1 and len({len(row) for row in rows}) == 1
    identifiers = [attributes["id"] for _, attributes in document.tags if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    images = document.all("img")
    assert len(images) == 5 + 3 and all(len(image["alt"]) > 20 for image in images)


def test_nothing_is_loaded_from_elsewhere(folders, document):
    for tag, attributes in document.tags:
        assert tag not in ("script", "iframe", "object", "embed")
        for name in ("src", "href", "srcset", "poster", "data"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    style = html.render(*folders).partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style


def test_names_from_outside_are_text(folders, document):
    assert any("<toy>" in text for text in document.text)
    assert "<toy>" not in html.render(*folders)


def test_the_note_and_the_verdicts_are_those_of_the_main_table(document):
    assert "The note." in document.text
    assert "not told apart" in document.text and "& so on." in document.text
    assert [attributes.get("class") for attributes in document.all("li")][-3:] == ["doubt", None, None]
    assert "Of runs." in document.text and "DM: above over runs." in document.text


def test_several_runs_and_their_spread_are_shown(folders, document):
    runs = pd.read_csv(folders[0] / "runs.csv")
    frame = document.frame("runs", headers=2)
    for row in runs.itertuples():
        name = f"{NAMES[row.objective]} {NAMES[row.space]}".removeprefix("- ")
        assert frame.loc[(str(row.ipc or "all"), name), NAMES[row.architecture]] == percent(row)
    assert len(document.frame("runs-differences", headers=3)) == 2
    assert document.tables["spread"][1:] == [
        ["DM LD3M", "ConvNet", "2.0", "1.5", "2.5"],
        ["All distilled sets", "ConvNet", "2.1", "1.6", "2.6"],
    ]
    assert document.tables["metrics"][1][3:] == ["0.900", "0.600", "0.950", "0.300", "0.050", "0.750", "0.200", "0.610"]
    assert document.tables["metrics"][2][2:4] == ["mean of all", "0.600"] and len(document.tables["metrics"]) == 3


def test_the_numbers_of_results_are_those_of_the_csv(folders, document):
    main = pd.read_csv(folders[0] / "main.csv")
    frame = document.frame("main", headers=2)
    assert frame.shape == (len(SETS), len(ARCHITECTURES))
    for row in main.itertuples():
        name = f"{NAMES[row.objective]} {NAMES[row.space]}".removeprefix("- ")
        assert frame.loc[(str(row.ipc or "all"), name), NAMES[row.architecture]] == percent(row)
    changes = pd.read_csv(folders[0] / "differences.csv").query("architecture == 'unseen'")
    frame = document.frame("differences", headers=3)
    assert len(frame) == len(changes) == 2
    for row in changes.itertuples():
        shown = frame.loc[(str(row.ipc), "DM LD3M", NAMES[row.minus])]
        assert shown["Points"] == f"{100 * row.mean:+.1f}" and shown["n"] == "3" and shown["p"] == f"{row.p:.3f}"
        assert shown["95 % interval"] == f"{100 * row.ci_low:+.1f} to {100 * row.ci_high:+.1f}"


def test_the_papers_numbers_stand_beside_ours(folders, document):
    frame = document.frame("comparison", headers=1)
    for (objective, space), values in published.TABLE_4.items():
        for subset, (mean, spread) in zip(published.SUBSETS, values, strict=True):
            assert frame.loc[f"{NAMES[objective]} {NAMES[space]}", f"Paper: {subset}"] == f"{mean} ± {spread}"
    main = pd.read_csv(folders[0] / "main.csv").query("architecture == 'unseen' and space == 'ld3m'")
    assert frame.loc["DM LD3M", "Ours: <toy>, IPC 1"] == percent(next(main.itertuples()))
    assert frame.loc["DM LD3M - GLaD", "Ours: <toy>, IPC 1"] == "–"
    assert frame.loc["DC LD3M - Pixel", "Paper: All"] == "+4.8"
    assert document.tables["settings"] == [["Setting", "Paper, Table 4", "Here"], ["Resolution", "128 px", "32 px"]]
    assert document.tables["paper-costs"][1:] == [["GLaD", "31.2", "693"], ["LD3M", "29.4", "574"]]
    assert document.frame("mnist", headers=1).loc["DSA"].tolist() == ["88.7", "97.8"]
    assert document.tables["paper-gradient-norms"][1][1:3] == ["58.1", "33.5"]
    assert ["c and Z with the skip", "28.1"] in document.tables["paper-learned"]


def test_the_numbers_of_ablations_and_costs_are_those_of_the_csv(folders, document):
    ablations = pd.read_csv(folders[0] / "ablations.csv")
    for row in ablations.itertuples():
        frame = document.frame(f"ablation-{row.ablation}", headers=1)
        assert frame.loc[str(row.setting), NAMES[row.architecture]] == percent(row)
    assert "Objective" in frame and "Space" not in frame  # shown where it differs
    steps = document.frame("ablation-steps", headers=1)
    assert steps.loc["10", ["‖∇z‖", "‖∇c‖", "s/iteration", "peak MiB"]].tolist() == ["5", "0.25", "1.25", "710"]
    assert "Change of unseen" not in steps
    assert "The paper finds the best T between about 10 and 40." in document.text
    defects = document.frame("ablation-defects", headers=1)
    assert defects["Change of unseen"].tolist() == ["–", "-1.2 ± 0.4", "–"]
    assert defects["peak MiB"].tolist() == ["–"] * 3
    assert document.tables["costs"][1] == ["1", "DM LD3M", "40", "12.5", "0.312", "812"]
    assert document.tables["validation"] == [
        ["IPC", "Set", "Start", "End", "Kept iteration"],
        ["1", "DM LD3M", "50.0", "70.0", "20"],
    ]
    assert document.tables["gradient-norms"] == [["Learned", "T", "skip None", "skip x0"], ["z", "5", "1.25", "2.5"]]
    assert ["recognised", "0.95"] in document.tables["prior"]
    assert ["recognised", "0.965"] in document.tables["gan"]
    assert document.tables["other"] == [["objective", "a", "b"], ["dm", "0.125", "–"]]


@pytest.mark.parametrize(
    ("table", "figure", "gone"),
    [
        ("ablations", "steps", {"steps", "ablations"}),
        ("costs", None, {"costs"}),
        ("metrics", None, {"metrics"}),
        ("runs", None, {"runs"}),
        ("other", None, {"more"}),
        ("prior gan", "prior", {"prior"}),
        ("prior", "prior", set()),
        ("gradient_norms", "gradient-norms", {"gradients"}),
        (None, "accuracy-ipc1", {"accuracy"}),
        ("ablation_costs", None, set()),
        ("differences", None, set()),
        ("paper", None, set()),
    ],
)
def test_a_section_is_there_if_what_it_shows_is(folders, table, figure, gone):
    tables, figures = folders
    for name in (table or "").split():
        ((tables.parent / "costs" if "costs" in name else tables) / f"{name}.csv").unlink()
    (figures / f"{figure}.png").unlink(missing_ok=True)
    document = Document(html.render(tables, figures))
    assert {attributes["id"] for attributes in document.all("h2")} == set(SECTIONS) - gone


def test_the_same_tables_give_the_same_bytes(folders, tmp_path):
    files = [html.write_report(tables=folders[0], figures=folders[1], file=tmp_path / name) for name in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes() == html.render(*folders).encode()


def test_every_table_is_also_written_to_be_read_and_typeset(folders, document, tmp_path):
    tables, costs = folders[0], folders[0].with_name("costs")
    html.write_report(tables=tables, figures=folders[1], file=tmp_path / "index.html")
    for name, rows in document.tables.items():
        folder = costs if {"Seconds", "s/iteration"} & set(rows[0]) else tables
        if name not in ("main", "runs", "comparison"):  # with notes, by `report.write_tables`
            lines = (folder / f"{name}.md").read_text().splitlines()
            found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
            width = len(found[0])  # the page draws intervals beside
            assert [found[0], *found[2:]] == [row[:width] for row in rows], name
            assert r"\begin{tabular}" in (folder / f"{name}.tex").read_text()
    assert {"costs", "ablation-steps"} <= {file.stem for file in costs.glob("*.tex")}
    assert {"differences", "metrics", "validation"} <= {file.stem for file in tables.glob("*.md")}
    typeset = (tables / "differences.tex").read_text()
    assert r"95 \% interval" in typeset and "‖" not in (costs / "ablation-steps.tex").read_text()


@pytest.mark.skipif(not paths.REPORT.exists(), reason="`make report` has not been run")
def test_the_report_of_this_checkout_shows_its_tables_and_figures():
    assert paths.REPORT.read_text() == html.render(paths.FULL / "tables", paths.FULL / "figures"), "run `make report`"


@needs_chromium
@pytest.mark.parametrize("committed", [False, True])
def test_in_a_browser_nothing_is_requested_reported_or_too_wide(folders, tmp_path, committed):
    if committed and not paths.REPORT.exists():
        pytest.skip("`make report` has not been run")
    made = dict(tables=folders[0], figures=folders[1], file=tmp_path / "index.html")
    file = paths.REPORT if committed else html.write_report(**made)
    with open_page(tmp_path / "profile") as page:
        for width_px in (360, 1280):
            for scheme in ("light", "dark"):
                page.open(file.as_uri(), width_px=width_px, scheme=scheme)
                assert page.complaints() == []
                assert {url for url in page.requests() if not url.startswith("data:")} == {file.as_uri()}
                assert page.value("document.documentElement.scrollWidth") == width_px
                assert page.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
                background, ink = (page.value(f"getComputedStyle(document.body).{n}") for n in ("background", "color"))
                assert (brightness(background) > brightness(ink)) == (scheme == "light")
        page.open(file.as_uri(), width_px=360)
        wide = "[...document.querySelectorAll('.scroll')].filter(box => box.scrollWidth > box.clientWidth).length"
        assert page.value(wide) > 2  # tables and charts scroll, each in its own box


def brightness(colour):
    return sum(int(part) for part in colour[colour.index("(") + 1 : colour.index(")")].split(",")[:3])
