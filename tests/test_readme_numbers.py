"""The marks in README that its numbers are read by."""

import pytest

from ld3m.reporting.readme import filled, number

MAIN = "dataset,ipc,space,mean,seconds\ntoy,1,pixel,0.5,1234.5\ntoy,1,ld3m,0.625,2\ntoy,10,ld3m,-0.0125,3\n"


@pytest.fixture
def reports(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/main.csv").write_text(MAIN)
    (tmp_path / "tables/main.md").write_text("| a |\n")
    (tmp_path / "tables/steps.csv").write_text("setting,mean\nT = 2,0.25\n")
    return tmp_path


@pytest.mark.parametrize(
    "what, shown",
    [
        ("tables/main mean percent space=pixel", "50.0"),
        ("tables/main mean points space=ld3m ipc=10", "-1.2"),
        ("tables/main seconds whole space=pixel", "1,234"),
        ("tables/main ipc text space=pixel", "1"),
        ('tables/steps mean hundredths setting="T = 2"', "0.25"),
    ],
)
def test_a_number_is_that_of_the_one_row(reports, what, shown):
    assert number(what, reports) == shown


@pytest.mark.parametrize(
    "what, words",
    [
        ("tables/main mean percent space=ld3m", "picks 2 rows"),
        ("tables/main mean percent space=glad", "picks 0 rows"),
        ("tables/main median percent space=pixel", "of the column 'median'"),
        ("tables/main mean percent place=1", "names the column 'place'"),
        ("tables/main mean furlongs space=pixel", "one of percent"),
    ],
)
def test_a_mark_that_picks_no_number_is_refused(reports, what, words):
    with pytest.raises(ValueError, match=words):
        number(what, reports)


def test_the_text_is_filled_in_and_nothing_else_is_changed(reports):
    text = (
        "# Title\n<!-- table -->\nold\n<!-- /table -->\n"
        "Pixel has <!-- = tables/main mean percent space=pixel -->99.9<!-- . --> %, <!-- a comment --> too.\n"
    )
    done = filled(text, reports)
    assert done == text.replace("old\n", "| a |\n").replace("99.9", "50.0")
    assert filled(done, reports) == done
