"""docs/results: the pictures and tables are those of the figures in docs/results/data, and every page has some."""

import re
import runpy

import documented
import pytest

RESULTS = documented.ROOT / "docs" / "results"
SCRIPT = runpy.run_path(str(documented.ROOT / "scripts" / "studies" / "draw_results.py"))
STUDIES = SCRIPT["studies"]()
PAGES = {path.name: path.read_text(encoding="utf-8") for path in RESULTS.glob("*.md")}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def picture(name: str) -> str:
    return (SCRIPT["PICTURES"] / f"{name}.svg").read_text(encoding="utf-8")


def unwrapped(text: str) -> str:
    return " ".join(text.replace("\\\n", " ").split())


@pytest.mark.parametrize("name", STUDIES)
def test_a_picture_is_what_its_figures_draw(name):
    """Up to a hundredth of a point, since processors round in their own ways; clip paths have hashes for names."""
    kept, drawn = (
        re.sub(r"-p[0-9a-f]{10}\b", "", text) for text in (picture(name), SCRIPT["draw"](STUDIES[name], name))
    )
    assert NUMBER.sub("#", kept) == NUMBER.sub("#", drawn)
    places = [[float(number) for number in NUMBER.findall(text)] for text in (kept, drawn)]
    assert places[0] == pytest.approx(places[1], abs=0.01)


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_stands_on_one_page_with_its_command_and_table(name):
    study = STUDIES[name]
    pages = [page for page in PAGES.values() if f"(../images/results/{name}.svg)" in page]
    assert len(pages) == 1
    assert unwrapped(study["command"]) in unwrapped(pages[0])
    assert SCRIPT["markdown"](study) in pages[0]


@pytest.mark.parametrize("name", STUDIES)
def test_a_value_lies_in_its_interval(name):
    study = STUDIES[name]
    assert study["machine"] and any(column.get("drawn") for column in study["columns"])
    cells = [cell for row in study["rows"] for cell in row["values"] if isinstance(cell, list)]
    assert all(low <= value <= high for value, low, high in cells)


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"README.md", "classifier.md", "log.md"}))
def test_every_page_has_a_picture(page):
    assert re.search(r"^!\[[^\]]+\]\(\.\./images/[\w/]+\.(svg|png)\)$", PAGES[page], re.MULTILINE)


def test_no_picture_is_left_over():
    assert {path.stem for path in SCRIPT["PICTURES"].iterdir()} == STUDIES.keys()


def test_the_records_stand_with_the_hashes_of_their_code_and_data():
    records = runpy.run_path(str(documented.ROOT / "scripts" / "studies" / "kept_records.py"))
    assert records["with_fingerprints"](PAGES["README.md"]) == PAGES["README.md"]
    assert "| `embedded_power` |" in PAGES["README.md"]
