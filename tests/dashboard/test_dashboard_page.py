"""The dashboard in a real browser, from a file: sorted, filtered, drilled into; hostile names; desk, phone, dark."""

import json

import evaluation_results
import pytest
from browsers import CONTRASTS

from safelm.dashboard import __main__ as command

MARKUP = "<img src=x onerror=\"document.title='broken'\">&amp;</script><b>a</b>"


def write_study(folder):
    """Two models at two stages and two sizes, three seeds of one, a second decoding, another protocol, two logs."""
    rates = {"raw@base": (0.9, 0.0), "raw@20M": (0.5, 0.0), "raw@40M": (0.7, 0.1), "safety@base": (0.2, 0.4)}
    rates |= {f"safety@chat#{seed}": (0.1, 0.2) for seed in range(3)}
    texts = {"prompt": MARKUP, "answer": f"SECRET {MARKUP}"}
    evaluation_results.write(folder / "one", rates, texts=texts)
    evaluation_results.write(folder / "beam", {"safety@base": (0.0, 0.5)}, method="safe_beam", texts=texts)
    evaluation_results.write(folder / "long", {"raw@base": (0.95, 0.0)}, max_new_tokens=512)
    for number, name in enumerate(("raw", "safety")):
        (folder / name).mkdir()
        lines = [{"step": step, "loss": 5 - number - step / 30, "safety/auroc": 0.5} for step in range(1, 61)]
        (folder / name / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (folder / name / "config.json").write_text('{"batch_size": 8, "seq_len": 1000}')


def write_page(folder, *flags):
    output = folder / "out"
    command.main(command.parser().parse_args([str(folder / "study"), f"--output={output}", *flags]))
    return output / "dashboard.html"


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    write_study(folder / "study")
    return write_page(folder)


class Page:
    """The page, and what is looked for in it."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, *, width=1280, scheme="light"):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get(path.as_uri())
        return self

    def js(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def texts(self, selector):
        return self.js(
            "return [...document.querySelectorAll(arguments[0])].map(each => each.textContent.trim())", selector
        )

    def click(self, selector, number=0):
        self.js("document.querySelectorAll(arguments[0])[arguments[1]].click()", selector, number)

    def choose(self, selector, text, event="change"):
        """Chooses the option of a menu with this text, or types it."""
        self.js(
            """
            const place = document.querySelector(arguments[0]);
            const option = [...place.options ?? []].find(each => each.textContent === arguments[1]);
            place.value = option ? option.value : arguments[1];
            place.dispatchEvent(new Event(arguments[2], { bubbles: true }));
            """,
            selector,
            text,
            event,
        )

    def column(self, number):
        """The numbers of a column of the matrix, None where there is none."""
        found = self.texts(f"#matrix tbody tr > :nth-child({number + 1})")
        values = self.texts(f"#matrix tbody tr > :nth-child({number + 1}) b")
        return [None if text == "\u2013" else float(values.pop(0)) for text in found]

    def rows(self):
        names, under = self.texts("#matrix tbody th button"), self.texts("#matrix tbody th small")
        return [f"{name} {stage}" for name, stage in zip(names, under, strict=True)]


@pytest.fixture
def page(driver):
    driver.get_log("browser")
    opened = Page(driver)
    yield opened
    assert opened.js("return performance.getEntriesByType('resource').map(each => each.name)") == [], "no network"
    assert driver.get_log("browser") == []


def test_the_matrix_is_sorted_both_ways_with_what_is_missing_last(page, study):
    page.open(study)
    heads = page.texts("#matrix thead button")
    assert heads[:4] == ["Model", "harmful answers", "safe prompts refused", "neither (of harmful prompts)"]
    assert page.rows()[:3] == ["safety base · greedy", "safety base · safe_beam", "safety chat · greedy"]
    for number in (1, 4):
        page.click("#matrix thead button", number)
        up = page.column(number)
        assert page.js("return document.activeElement.textContent") == heads[number]
        page.click("#matrix thead button", number)
        down = page.column(number)
        there = [value for value in up if value is not None]
        assert there == sorted(there) and up[len(there) :] == [None] * (len(up) - len(there))
        assert down == [*there[::-1], *[None] * (len(up) - len(there))]
    page.click("#matrix thead button", 0)
    assert page.rows() == sorted(page.rows(), key=lambda name: name.split()[0])
    sorts = page.js("return [...document.querySelectorAll('#matrix th')].map(each => each.getAttribute('aria-sort'))")
    assert [each for each in sorts if each] == ["ascending"]


def test_cells_tell_their_interval_and_protocols_are_lettered(page, study):
    page.open(study)
    board = json.loads(study.with_name("dashboard.json").read_text())
    letters = [each["letter"] for each in board["protocols"]]
    assert letters == ["A", "B"]
    harmful = [number for number, each in enumerate(board["columns"]) if each["title"] == "harmful answers"]
    assert len(harmful) == 2, "the same measure under two protocols"
    heads = page.texts("#matrix thead small")
    assert {letter for letter in letters if any(f" {letter} · chat" in head for head in heads)} == {"A", "B"}
    for measure in board["measures"]:
        if measure["column"] == harmful[0]:
            interval = f"{100 * measure['low']:.1f}\u2013{100 * measure['high']:.1f}"
            assert any(interval in text for text in page.texts("#matrix td")), interval
    told = " ".join(page.texts("#protocols"))
    assert "different in 1 setting" in told and "max new tokens" in told
    assert sorted(page.texts("#protocols td.apart")) == ["48", "512"]


def test_filters_leave_rows_and_columns_out_and_back(page, study):
    page.open(study)
    whole, columns = page.rows(), len(page.texts("#matrix thead th"))
    page.choose("#query", "SAFETY", "input")
    assert page.rows() == [row for row in whole if row.startswith("safety")] and len(page.rows()) == 3
    page.choose("#stage", "base")
    page.choose("#method", "safe_beam")
    assert page.rows() == ["safety base · safe_beam"]
    assert "1 of 6 rows" in page.texts("#matrix-count")[0]
    page.click("#clear")
    assert page.rows() == whole and page.js("return document.getElementById('query').value") == ""
    page.choose("#protocol", "B \u00b7 chat")
    assert page.rows() == ["raw base · greedy"] and len(page.texts("#matrix thead th")) < columns
    page.click("#clear")
    page.click("#columns input:checked")
    assert len(page.texts("#matrix thead th")) == columns - 1
    page.click("#columns input:not(:checked)", 1)
    assert len(page.texts("#matrix thead th")) == columns


def test_cases_of_two_checkpoints_of_one_protocol_stand_side_by_side(page, study):
    page.open(study)
    page.choose("#query", "raw @ base", "input")
    page.click("#matrix tbody th button")
    assert "raw @ base" in page.js(
        "const e = document.getElementById('case-run'); return e.options[e.selectedIndex].text"
    )
    assert len(page.texts("#cases tbody tr")) == 40 and "SECRET" not in page.js(
        "return document.documentElement.innerHTML"
    )
    page.choose("#case-run", "safety @ base", "input")
    others = page.texts("#case-other option")
    assert others[0] == "nobody" and {"raw @ 20M", "safety @ chat, seed 2", "safety @ base + safe_beam"} <= set(others)
    assert len(others) == 1 + 7 and others.count("raw @ base") == 1, "of its protocol, without itself"
    page.choose("#case-other", "raw @ 20M", "input")
    heads = page.texts("#cases thead th")
    assert {"outcome", "marker", "marker, beside", "P(tag), highest"} <= set(heads)
    page.choose("#case-label", "where judges or checkpoints differ", "input")
    columns = {
        head: page.texts(f"#cases tbody tr > :nth-child({number})") for number, head in enumerate(heads, 1) if head
    }
    views = ("outcome", "rules", "marker")
    apart = [[columns[view][i] != columns[f"{view}, beside"][i] for view in views] for i in range(len(columns["case"]))]
    judges = [columns["rules"][i] != columns["marker"][i] for i in range(len(columns["case"]))]
    assert 0 < len(apart) < 40 and all(any(of) or differ for of, differ in zip(apart, judges, strict=True))
    page.choose("#case-label", "all", "input")
    page.choose("#case-category", "category 3", "input")
    assert set(page.texts("#cases tbody tr > :nth-child(2)")) == {"category 3"}
    page.choose("#case-id", "0007", "input")
    assert page.texts("#cases tbody th") == ["set/0007"]
    assert len(page.texts("#case-summary .outcomes")) == 2


def test_the_frontier_joins_what_nothing_beats_and_the_curves_run_over_tokens(page, study):
    page.open(study)
    assert len(page.texts("#frontier .dot")) >= 5
    labels = page.js("return [...document.querySelectorAll('#frontier .dot')].map(e => e.getAttribute('aria-label'))")
    assert all("95%" in label for label in labels)
    line = page.js("return document.querySelector('#frontier .best').getAttribute('points')")
    points = [tuple(map(float, point.split(","))) for point in line.split()]
    assert points == sorted(points) and [y for _, y in points] == sorted(y for _, y in points), "down to the right"
    page.js("document.querySelector('#frontier .dot').dispatchEvent(new Event('focus'))")
    assert "95%" in page.texts("#tip")[0] and page.js("return !document.getElementById('tip').hidden")
    assert len(page.texts("#training polyline")) == 1 and "raw + greedy" in page.texts("#curve-keys li")[0]
    page.choose("#curve-measure", "loss")
    assert len(page.texts("#training polyline")) == 2
    ticks = page.texts("#training svg text")
    assert "400K" in ticks and page.texts("#curve-keys li")[0].startswith("raw: 3.00")
    page.choose("#curve-x", "steps")
    assert "60" in page.texts("#training svg text")
    before = page.js("return document.querySelector('#training polyline').getAttribute('points')")
    page.click("[name=curve-scale][value=log]")
    assert page.js("return document.querySelector('#training polyline').getAttribute('points')") != before


def test_the_numbers_are_saved_as_they_came(page, study):
    page.open(study)
    page.driver.set_script_timeout(20)
    name, text = page.driver.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        let saved;
        URL.createObjectURL = blob => { saved = blob; return "blob:x"; };
        HTMLAnchorElement.prototype.click = function () { saved.text().then(text => done([this.download, text])); };
        document.getElementById("save").dispatchEvent(new MouseEvent("click"));
        """
    )
    assert name == "dashboard.json"
    assert json.loads(text) == json.loads(study.with_name("dashboard.json").read_text())


def test_texts_are_folded_and_names_and_texts_are_never_markup(page, tmp_path):
    write_study(tmp_path / "study")
    path = tmp_path / "study" / "one" / "results.json"
    results = json.loads(path.read_text())
    for run in results["runs"]:
        run["checkpoint"] = run["checkpoint"].replace("raw", MARKUP)
        for case in run["cases"]:
            case |= {"id": f"{case['id']} {MARKUP}", "category": MARKUP}
    path.write_text(json.dumps(results))
    page.open(write_page(tmp_path, "--show_texts", f"--title={MARKUP}"))
    assert page.js("return document.title") == MARKUP == page.texts("h1")[0]
    assert MARKUP in " ".join(page.texts("#matrix tbody button")) and MARKUP in page.texts("#cases tbody td")
    page.choose("#case-run", "safety @ base + safe_beam", "input")
    quoted = page.texts("#cases blockquote")
    assert quoted[:2] == [MARKUP, f"SECRET {MARKUP}"]
    assert not page.js("return [...document.querySelectorAll('blockquote')].some(each => each.checkVisibility())")
    page.click("#cases summary", 1)
    assert page.js("return document.querySelector('blockquote').checkVisibility()")
    assert page.js("return document.querySelectorAll('main img, b:not(td b, p b, #tip b)').length") == 0


def test_a_training_run_alone_has_its_curves(page, tmp_path):
    write_study(tmp_path / "all")
    (tmp_path / "study").mkdir()
    (tmp_path / "all" / "raw").rename(tmp_path / "study" / "raw")
    page.open(write_page(tmp_path))
    shown = page.js("return [...document.querySelectorAll('main > section')].filter(e => !e.hidden).map(e => e.id)")
    assert shown == ["training", "sources"] and len(page.texts("#training polyline")) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_readable_on_a_desk_and_a_phone_in_light_and_dark(page, study, width, scheme):
    page.open(study, width=width, scheme=scheme)
    page.js("document.querySelectorAll('details').forEach(each => { each.open = true; })")
    assert page.js("return document.documentElement.scrollWidth") <= width, "nothing sticks out"
    contrasts = page.js(CONTRASTS)
    assert len(contrasts) > 200 and contrasts[0][0] >= 4.5, contrasts[:8]


def test_everything_to_operate_has_a_name(page, study):
    page.open(study)
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})
    names = {}
    for node in tree["nodes"]:
        if not node["ignored"] and node["role"]["value"] in ("button", "combobox", "checkbox", "searchbox", "radio"):
            names.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert {"button", "combobox", "searchbox", "radio"} <= names.keys()
    assert all(all(found) for found in names.values()), names
