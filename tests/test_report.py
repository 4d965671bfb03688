"""The page made of an executed notebook is whole, opens offline and shows its tables and figures at every width."""

import base64
import io
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
from browser import needs_chromium, open_page
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from ld3m.pipeline.cells import UNSEEN
from ld3m.reporting import figures
from ld3m.reporting.report import styled, write_page


@pytest.fixture
def page(tmp_path):
    table = pd.DataFrame({"Set": ["DM LD3M", "<b>"], **{f"Network {k}": ["62.0 ± 2.5"] * 2 for k in range(9)}})
    picture = io.BytesIO()
    Image.new("L", (900, 40), 99).save(picture, format="PNG")
    data = {"image/png": base64.b64encode(picture.getvalue()).decode()}
    outputs = [new_output("display_data", {"text/html": styled(table, "main", "Accuracy").to_html()})]
    outputs += [new_output("display_data", data)]
    cells = [new_markdown_cell("# The *title*\n\nA claim."), new_code_cell("hidden = 1", outputs=outputs)]
    nbformat.write(new_notebook(cells=cells), tmp_path / "report.ipynb")
    write_page(tmp_path / "report.ipynb", tmp_path / "index.html")
    return tmp_path / "index.html"


def test_the_page_has_the_outputs_and_no_code_and_repeats(page, tmp_path):
    text = page.read_text()
    assert "A claim." in text and "62.0 ± 2.5" in text and "data:image/png;base64," in text
    assert "hidden" not in text and "<script" not in text and "http" not in text.split("<body>")[1]
    write_page(tmp_path / "report.ipynb", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text() == text


@needs_chromium
def test_in_a_browser_nothing_is_requested_reported_or_too_wide(page, tmp_path):
    with open_page(tmp_path / "profile") as tab:
        for width_px in (390, 1200):
            tab.open(page.as_uri(), width_px=width_px)
            assert tab.complaints() == []
            assert {url for url in tab.requests() if not url.startswith("data:")} == {page.as_uri()}
            assert tab.value("document.documentElement.scrollWidth") == width_px
            assert tab.value("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
            assert tab.value("document.querySelector('table').getBoundingClientRect().height") > 50


def test_a_forest_plot_fills_the_dots_of_significant_differences():
    keys = {"ipc": 1, "objective": "dm", "space": "ld3m", "minus": "pixel", "architecture": UNSEEN}
    rows = [keys | {"mean": m, "ci_low": m - 0.1, "ci_high": m + 0.1} for m in (0.2, 0.05, -0.2)]
    axis = figures.forest(pd.DataFrame(rows)).axes[0]
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert [float(dot.get_xdata()[0]) for dot in dots] == pytest.approx([20, 5, -20])
    assert [dot.get_markerfacecolor() == "white" for dot in dots] == [False, True, False]


def test_intervals_are_over_networks_of_one_run_and_over_first_networks_of_several():
    def half(accuracies):
        (container,) = figures.networks(accuracies).axes[0].containers
        (low, high) = container.lines[1][0].get_ydata(), container.lines[1][1].get_ydata()
        return (high - low)[0] / 2

    t = {2: 12.7062047, 3: 4.30265273}
    assert half({0: {"vit": [0.1, 0.2, 0.3]}}) == pytest.approx(t[3] * 10 / 3**0.5)
    assert half({0: {"vit": [0.1, 0.9, 0.9]}, 1: {"vit": [0.2]}}) == pytest.approx(t[2] * 5)


def test_a_stage_starts_without_what_the_page_or_one_figure_needs():
    late = "{'nbformat', 'nbconvert', 'seaborn', 'scipy.stats', 'datasets', 'diffusers'}"
    program = f"import sys, ld3m.reporting.report; sys.exit(str({late} & set(sys.modules) or ''))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stderr.strip() == ""
