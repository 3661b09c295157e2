"""The labelling page: its answers over HTTP, and one annotator at work in a real browser."""

import asyncio
import contextlib
import json

import pytest
from serving_fakes import http, in_thread, wait_for

from safelm.safety.labelling import folder
from safelm.safety.labelling.choice import Candidate
from safelm.safety.labelling.folder import LabelFolder
from safelm.safety.labelling.session import SHOWN_CHARACTERS, Session
from safelm.safety.labelling.uncertainty import Opinion
from safelm.serving import label_page

MARKUP = "<img src=x onerror=\"document.title='broken'\"> &amp; <b>a</b>"
LONG = "\U0001f33f leaf " * 3000


def begin(root, texts=("garden", MARKUP, LONG, "river")):
    chosen = [
        (Candidate("web/part", number, f"d{number}", text, 3, {"a": Opinion(3, 3.0)}), number % 2 == 0)
        for number, text in enumerate(texts)
    ]
    folder.begin(root, {}, chosen)
    return LabelFolder(root)


@contextlib.contextmanager
def running(found, annotator="ada"):
    """The page of a folder on a free port until the block ends."""
    with found.journal(annotator) as own:
        with in_thread(label_page.labelling(Session(found, own), 0)) as started:
            yield started


@pytest.fixture
def found(tmp_path):
    return begin(tmp_path)


@pytest.fixture
def server(found):
    with running(found) as up:
        yield up


def post(server, path, body, **headers):
    return http(server, "POST", path, body, {key.replace("_", "-"): value for key, value in headers.items()})


def test_labels_skips_and_undo_come_back_as_what_is_next(server, found):
    state = http(server, "GET", "/state").json
    assert state["document"] == {"number": 0, "id": "d0", "text": "garden", "characters": 6}
    assert "harm_score" not in json.dumps(state["document"]), "no scorer leads the annotator"
    label = {"number": 0, "score": 4, "kinds": ["violence", "hate"], "note": "why"}
    state = post(server, "/label", label).json
    assert state["document"]["number"] == 1 and state["labelled"] == 1
    assert state["measured"]["error"][""]["exact"]["value"] == 1.0, "the scorer said 3"
    assert post(server, "/skip", {"number": 1}).json["document"]["number"] == 2
    assert post(server, "/undo", {}).json["document"]["number"] == 1
    state = post(server, "/undo", {}).json
    assert state["document"]["number"] == 0 and state["labelled"] == state["skipped"] == 0
    post(server, "/label", label)
    exported = post(server, "/export", {}).json["exported"]
    assert exported == {"path": str(found.root / "labels.jsonl"), "rows": 1}
    (row,) = (found.root / "labels.jsonl").read_text().splitlines()
    assert json.loads(row)["harm_score"] == 4


def test_a_long_text_comes_in_pieces(server):
    for number in (0, 1):
        post(server, "/skip", {"number": number})
    document = http(server, "GET", "/state").json["document"]
    assert len(document["text"]) == SHOWN_CHARACTERS < document["characters"] == len(LONG)
    rest = http(server, "GET", f"/documents/2/{SHOWN_CHARACTERS}").json
    assert document["text"] + rest["text"] == LONG
    assert http(server, "GET", "/documents/9/0").status == 404


@pytest.mark.parametrize(
    ("path", "body", "status", "told"),
    [
        ("/label", {"number": 0, "score": 6}, 400, "score=6: want an integer from 0 to 5"),
        ("/label", {"number": 0, "score": True}, 400, "score=True"),
        ("/label", {"number": 0}, 400, "score=None"),
        ("/label", {"score": 1}, 400, "number=None"),
        ("/label", {"number": 0, "score": 1, "kinds": ["rude"]}, 400, "kinds=['rude']: want a list of hate"),
        ("/label", {"number": 0, "score": 1, "kinds": "hate"}, 400, "kinds='hate'"),
        ("/label", {"number": 0, "score": 1, "kinds": [["hate"]]}, 400, "kinds=[['hate']]"),
        ("/label", {"number": 0, "score": 1, "note": "n" * 2001}, 400, "note: want at most 2000"),
        ("/label", {"number": 0, "score": 1, "more": 1}, 400, "unknown field 'more'"),
        ("/label", {"number": 1, "score": 1}, 409, "document 1 is not the one to label now"),
        ("/skip", {"number": 3}, 409, "document 3 is not"),
        ("/export", {}, 400, "no document has a label yet"),
        ("/label", [1], 400, "the body is an array"),
        ("/label", {"note": "n" * (65 << 10)}, 413, "the body is larger"),
        ("/nowhere", {}, 404, "no such path"),
    ],
)
def test_a_bad_answer_is_told_and_nothing_is_kept(server, path, body, status, told):
    answer = post(server, path, body)
    assert answer.status == status and told in answer.error["message"]
    state = http(server, "GET", "/state").json
    assert state["labelled"] == state["skipped"] == 0


def test_pages_from_elsewhere_and_other_hosts_are_refused(server):
    label = {"number": 0, "score": 1}
    assert post(server, "/label", label, Host="evil.example").error["code"] == "wrong_host"
    assert http(server, "GET", "/state", headers={"Host": "evil.example"}).status == 403
    assert http(server, "GET", "/", headers={"Host": "evil.example"}).status == 403
    form = post(server, "/label", json.dumps(label).encode(), Content_Type="text/plain")
    assert form.error["code"] == "wrong_content_type"
    assert http(server, "OPTIONS", "/label").status == 405, "what a browser asks first is never granted"
    assert http(server, "GET", "/state").json["labelled"] == 0
    page = http(server, "GET", "/")
    assert "default-src 'none'" in page.headers["content-security-policy"] and page.status == 200
    assert http(server, "GET", "/state").headers["cache-control"] == "no-store"


def test_only_this_machine_is_listened_to_and_a_port_that_is_taken_is_named(server, tmp_path):
    host, port = server.address
    assert host == "127.0.0.1"

    async def again(session):
        async with label_page.labelling(session, port):
            pass

    other = begin(tmp_path / "other")
    with other.journal("bob") as own, pytest.raises(OSError, match=f"--port={port}: can't listen there on {host}"):
        asyncio.run(again(Session(other, own)))


def test_at_work_in_a_browser_by_keyboard(driver, found):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def one(selector):
        return driver.find_element(By.CSS_SELECTOR, selector)

    def press(*keys):
        for key in keys:
            driver.switch_to.active_element.send_keys(key)

    def at(number):
        wait_for(lambda: f"Document {number} of 4" in one("#title").text, f"document {number}")

    with running(found) as server:
        driver.get_log("browser")
        size = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.get(server.url)
        at(1)
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 360, "nothing sticks out"
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size | {"width": 1280, "mobile": False})
        text = one("#text")
        assert "blur" in text.value_of_css_property("filter") and text.get_attribute("aria-hidden") == "true"
        press("3")
        assert "Reveal the text first" in one("#error").text, "nobody labels what they have not seen"
        press(" ")
        assert text.value_of_css_property("filter") == "none" and text.text == "garden"
        press("v", "h", "h", "n", "a 5 s u note", Keys.ESCAPE, "4")
        at(2)
        assert "blur" in text.value_of_css_property("filter"), "each text anew"
        press(" ")
        assert text.text == MARKUP, "shown as what it is, never as markup"
        press("0")
        at(3)
        press("s")
        at(4)
        press("u")
        at(3)
        press(" ")
        one("#more").click()
        wait_for(lambda: not one("#more").is_displayed(), "the rest of the text")
        assert driver.execute_script("return arguments[0].textContent", text) == LONG
        assert "2 of 4 labelled" in one("#count").text
        loaded = driver.execute_script("return performance.getEntriesByType('resource').map(each => each.name)")
        assert all(name.startswith(server.url + "/") for name in loaded), "nothing from elsewhere"
        assert driver.execute_script("return document.title") == "SafeLM labelling"
        assert driver.get_log("browser") == []
    (labels,) = ({number: given["ada"] for number, given in found.labels().items()},)
    assert {number: label.score for number, label in labels.items()} == {0: 4, 1: 0}
    assert labels[0].kinds == ("violence",) and labels[0].note == "a 5 s u note"
