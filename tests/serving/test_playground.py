"""The playground in a real browser: typed, clicked, walked with the keyboard; wide and narrow, light and dark."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import tiny_runs
from browsers import CONTRASTS
from serving_fakes import FakeEngine, running, tiny_model, wait_for
from serving_fakes import http as ask

from safelm import serving
from safelm.inference import Greedy, SafeBeam
from safelm.text.prompting import prompt_ids

FILES = Path(serving.__file__).parent / "playground"
TEXT = " the cat sat on the mat"
MARKUP = "<img src=x onerror=\"document.title='broken'\"> &amp;\n<b>a</b>"


@pytest.fixture(scope="module")
def server(script):
    named = {name: tiny_model(name, seed) for seed, name in enumerate(("raw", "safety"))}
    models = {name: dataclasses.replace(model, saw_tag=name == "safety") for name, model in named.items()}
    with running(models, dict.fromkeys(models, lambda: FakeEngine(script))) as up:
        yield up


@pytest.fixture(autouse=True)
def reset(script):
    script.text, script.fail_next_step = TEXT, False
    script.may_go.set()
    script.requests.clear()


class Page:
    """A page in a headless browser, and what is looked for in it."""

    def __init__(self, driver, url):
        self.driver, self.url = driver, url

    def open(self, *, width=1280, height=900, scheme="light", fragment=""):
        """Opens the page and waits for what it runs by itself: its example, or what the fragment asks for."""
        self.show(width=width, height=height, scheme=scheme, fragment=fragment)
        wait_for(lambda: self.all(".panel.a .token") and self.all(".panel.b .token"), "it has run")
        self.finish()
        return self

    def show(self, *, width=1280, height=900, scheme="light", fragment=""):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        self.driver.get("about:blank")  # another fragment alone would load nothing
        self.driver.get(f"{self.url}/{fragment}")
        return self

    def find(self, selector):
        from selenium.webdriver.common.by import By

        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector):
        from selenium.webdriver.common.by import By

        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def js(self, code, *args):
        return self.driver.execute_script(code, *args)

    def shown_text(self, selector):
        """The text of the tokens in a place, line breaks as they are."""
        return self.js(
            """
            const copies = [...document.querySelectorAll(arguments[0] + " .token")].map(token => token.cloneNode(true));
            copies.forEach(copy => copy.querySelectorAll(".newline").forEach(mark => mark.remove()));
            return copies.map(copy => copy.textContent).join("");
            """,
            selector,
        )

    def run(self, prompt="the dog"):
        from selenium.webdriver.common.keys import Keys

        wait_for(lambda: len(self.all(".panel")) == 2, "two panels")
        self.find("#prompt").clear()
        self.find("#prompt").send_keys(prompt, Keys.CONTROL, Keys.ENTER)
        self.finish()

    def finish(self):
        wait_for(lambda: self.find("#run").is_enabled() and not self.all(".busy"), "the run ends")

    def score(self, text):
        self.find("#tab-score").click()
        self.js("document.getElementById('score-text').value = arguments[0]", text)
        self.find("#score-form button").click()
        wait_for(lambda: self.find("#score-form button").is_enabled(), "it is scored")


@pytest.fixture
def page(driver, server):
    driver.get_log("browser")
    opened = Page(driver, server.url)
    yield opened
    loaded = opened.js("return performance.getEntriesByType('resource').map(each => each.name)")
    assert all(name.startswith(server.url + "/") for name in loaded), "nothing from elsewhere"
    assert opened.js("return document.title") == "SafeLM playground"
    assert [entry for entry in driver.get_log("browser") if " 500 " not in entry["message"]] == []


def test_two_decodings_side_by_side_with_the_prompt_shaded(page, script):
    page.open().run("the dog")
    assert page.shown_text(".panel.a .text") == page.shown_text(".panel.b .text") == "the dog" + TEXT
    new = len(tiny_runs.tokenizer().encode(TEXT))
    for panel in ("a", "b"):
        assert len(page.all(f".panel.{panel} .token:not(.given)")) == new
        assert "end of the text" in page.find(f".panel.{panel} .summary").text
    methods = {type(request.method): request for request in script.requests}
    assert methods.keys() == {Greedy, SafeBeam} and methods[SafeBeam].want_trace
    assert len(page.all("#compare-curve polyline")) == 2
    assert page.find(".panel.b .model").get_attribute("value") == "safety", "two models: one on either side"
    heats = page.js(
        "return [...document.querySelectorAll('.panel.b .token')].map(e => +e.style.getPropertyValue('--t'))"
    )
    own = heats[-new:]
    assert own == sorted(own) and own[0] < own[-1] <= 1, "P(tag) rises along the fake's text, and so do the shades"


def test_it_opens_with_an_example_that_one_tagged_model_shades(page, server):
    page.open()
    example = page.find("#prompt").get_attribute("value")
    assert example and page.shown_text(".panel.a .text") == example + TEXT
    menus = [page.find(f".panel.{side} .{menu}") for side in "ab" for menu in ("model", "method")]
    assert [menu.get_attribute("value") for menu in menus] == ["raw", "greedy", "safety", "safe_beam"]
    assert page.find("#shade-by").get_attribute("value") == "safety"
    assert page.find(".panel.a .model option").text == "raw (never saw the tag)"
    assert "means nothing" in page.find(".panel.a .note").text and not page.find(".panel.b .note").is_displayed()

    def score(model, text):
        return ask(server, "POST", "/v1/safelm/score", {"model": model, "input": text}).json["tokens"]

    prompt = [token["id"] for token in score("raw", example)]
    by_tagged = score("safety", prompt + tiny_runs.tokenizer().encode(TEXT)[:1])[-1]
    label = page.find(".panel.a .token:not(.given)").get_attribute("aria-label")
    assert float(label.rsplit(" ", 1)[1]) == pytest.approx(by_tagged["tag_prob"], rel=0.05)
    assert page.find("#score-model").get_attribute("value") == "safety"
    means = [float(page.find(f".panel.{side} .summary dd").text) for side in "ab"]
    told, ratio = page.find("#headline").text, max(means) / min(means)
    found = re.match(r"([\d.,]+)\u00d7 less P\(tag\): (\w+) on (\w+)", told)
    assert found and float(found[1].replace(",", "")) == pytest.approx(ratio, rel=0.1)
    assert found[3] == ("raw", "safety")[means.index(min(means))] and "both read by safety" in told
    boxes = page.js("return [...document.querySelectorAll('.panel .text')].map(e => e.getBoundingClientRect().top)")
    assert boxes[0] == boxes[1], "the panels are level"


def test_a_text_of_other_settings_is_marked_until_it_is_run_again(page):
    from selenium.webdriver.common.keys import Keys

    page.open()
    page.find("#b-num_beams").send_keys(Keys.ARROW_LEFT)
    stale = [panel.get_attribute("class") for panel in page.all(".panel.stale")]
    assert len(stale) == 1 and " b" in stale[0] and "run again" in page.find(".panel.b .state").text
    assert "Settings have changed" in page.find("#headline").text
    page.find("#prompt").send_keys("x")
    assert len(page.all(".panel.stale")) == 2
    page.run()
    assert not page.all(".panel.stale") and "Settings have changed" not in page.find("#headline").text


def test_a_link_opens_the_same_comparison(page, script):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select

    page.open()
    page.find("#b-num_beams").send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    Select(page.find("#a-model")).select_by_value("safety")
    Select(page.find("#shade-by")).select_by_visible_text("each its own model")
    page.run("the dog & the #cat")
    page.find("#copy-link").click()
    fragment = "#" + page.driver.current_url.partition("#")[2]
    script.requests.clear()
    page.open(fragment=fragment)
    assert page.shown_text(".panel.a .text") == "the dog & the #cat" + TEXT
    assert page.find("#a-model").get_attribute("value") == "safety"
    assert page.find("#shade-by").get_attribute("value") == ""
    assert {type(request.method): request for request in script.requests}[SafeBeam].method.num_beams == 2
    page.open(
        fragment="#prompt=the+dog&a.method=constructor&a.model=nobody&b.num_beams=999&shade=nobody&scale=<b>&tokens=x"
    )
    assert page.find("#a-method").get_attribute("value") == "greedy", "what a link can't ask for is left out"
    assert page.find("#b-num_beams").get_attribute("value") == "4"


def test_the_comparison_is_saved_as_a_picture(page):
    page.open()
    page.driver.set_script_timeout(20)
    found = page.driver.execute_async_script(
        """
        const done = arguments[arguments.length - 1], saved = {};
        HTMLAnchorElement.prototype.click = function () { saved.name = this.download; };
        const toBlob = HTMLCanvasElement.prototype.toBlob;
        HTMLCanvasElement.prototype.toBlob = function (use, type) {
          const pixels = this.getContext("2d").getImageData(0, 0, this.width, this.height).data;
          const colors = new Set();
          for (let i = 0; i < pixels.length; i += 400) colors.add(pixels.slice(i, i + 3).join());
          toBlob.call(this, blob => {
            use(blob);
            done({ ...saved, size: blob.size, type: blob.type, colors: colors.size });
          }, type);
        };
        document.getElementById("save-image").click();
        """
    )
    assert found["name"].endswith(".png") and found["type"] == "image/png" and found["size"] > 10_000
    assert found["colors"] > 10, "something is drawn"


def test_scales_and_other_vocabularies(page):
    page.open()
    page.driver.set_script_timeout(20)
    heats, aligned = page.driver.execute_async_script(
        """
        const done = arguments[arguments.length - 1];
        Promise.all([import("/playground/scale.js"), import("/playground/shading.js")]).then(([scale, shading]) => {
          const token = (text, tag_prob) => ({ text, tag_prob });
          const scored = [token("ab", 0.1), token("c", 0.2), token("de", 0.3), token("fgh", 0.4)];
          const own = ["b", "cd", "", "e", "fg", "h"].map(text => ({ text }));
          done([[1e-5, 1e-3, 0.0316, 1, null].map(scale.heat), shading.align(own, 1, scored)]);
        });
        """
    )
    assert heats[:2] == [0, 0] and heats[2] == pytest.approx(0.5, abs=0.01) and heats[3:] == [1, 0]
    assert aligned == [0.1, 0.2, 0.3, 0.3, 0.4, 0.4]


def test_a_server_that_still_compiles_says_so(page, script):
    waits = """
        let left = 2;
        const ask = window.fetch;
        window.fetch = (path, ...rest) => path === "/health" && left-- > 0
          ? Promise.resolve(new Response('{"status": "warming_up"}', { status: 503 })) : ask(path, ...rest);
    """
    added = page.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": waits})
    try:
        page.show()
        wait_for(lambda: page.find("#warming").is_displayed(), "it says that it waits")
        assert not script.requests
        wait_for(lambda: page.all(".panel.b .token"), "then it runs")
        assert not page.find("#warming").is_displayed()
        page.finish()
    finally:
        page.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", added)


def test_a_token_tells_its_value_and_a_step_its_dropped_candidates(page):
    from selenium.webdriver.common.action_chains import ActionChains

    page.open().run()
    third = page.all(".panel.b .token:not(.given)")[2]
    ActionChains(page.driver).move_to_element(third).perform()
    assert "P(tag) 0.03" in page.find("#tip").text
    assert len(page.all("#compare-curve .dot.b")) == 1, "the curve shows the token too"
    third.click()
    steps = page.find(".panel.b .steps")
    assert steps.is_displayed() and "Candidates of step 3" in steps.text and "3 tried, 1 dropped" in steps.text
    assert [row.text.split()[-3] for row in page.all(".panel.b .steps tr.dropped")] == ["dropped"]
    assert "in the text" in page.find(".panel.b .steps tr.chosen").text
    page.find(".panel.b .steps button").click()
    assert not steps.is_displayed()
    page.all(".panel.a .token")[0].click()
    assert not page.find(".panel.a .steps").is_displayed(), "greedy decoding has no candidates"


def test_by_keyboard_alone(page):
    from selenium.webdriver.common.keys import Keys

    def press(*keys):
        page.driver.switch_to.active_element.send_keys(*keys)

    page.open().run("the dog")
    given = len(page.all(".panel.b .token.given"))
    page.find(".panel.b .token").send_keys(*[Keys.ARROW_RIGHT] * given, Keys.ENTER)
    assert "Candidates of step 1" in page.find(".panel.b .steps").text
    press(Keys.END)
    last = page.all(".panel.b .token")[-1]
    assert page.driver.switch_to.active_element == last and page.find("#tip").is_displayed()
    press(Keys.HOME, Keys.ARROW_LEFT)
    assert page.driver.switch_to.active_element == page.find(".panel.b .token")
    page.find("#tab-compare").send_keys(Keys.ARROW_RIGHT)
    assert page.find("#score").is_displayed() and not page.find("#compare").is_displayed()
    press(Keys.ARROW_LEFT)
    assert page.find("#compare").is_displayed()


def test_sliders_and_menus_decide_what_is_asked(page, script):
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.select import Select

    page.open()
    wait_for(lambda: len(page.all(".panel")) == 2, "two panels")
    page.find("#b-num_beams").send_keys(Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    page.find("#b-num_candidates").send_keys(Keys.ARROW_RIGHT)
    page.find("#b-drop_fraction").send_keys(Keys.END)
    page.find("#b-drop_above").send_keys(Keys.ARROW_RIGHT)
    page.find("#b-anchor").send_keys(Keys.END)
    page.find("#max-tokens").send_keys(Keys.HOME)
    assert page.find("#b-drop_fraction + output").text == "0.95"
    Select(page.find("#a-method")).select_by_visible_text("Sampling, tag penalised")
    assert len(page.all(".panel.a .slider")) == 3
    page.run()
    asked = {type(request.method).__name__: request for request in script.requests}
    steering = {"drop_fraction": 0.95, "drop_above": 0.001, "anchor": 1.0}
    assert asked["SafeBeam"].method == SafeBeam(num_beams=2, num_candidates=5, **steering)
    assert asked["TagPenalty"].method.threshold == 0.01 and asked["SafeBeam"].max_new_tokens == 1
    page.find("input[name=kind][value=chat] + span").click()
    script.requests.clear()
    page.run("hi")
    want = prompt_ids(tiny_runs.tokenizer(), "hi", is_chat=True)
    assert [list(request.prompt) for request in script.requests] == [want, want]


def test_any_text_gets_its_heat_map(page, server):
    text = "the d\u00f6g\n\nsat on \U0001f642"
    page.open().score(text)
    assert page.shown_text("#score-tokens").replace("\u25e6", "") == text
    told = ask(server, "POST", "/v1/safelm/score", {"input": text}).json
    labels = [token.get_attribute("aria-label") for token in page.all("#score-tokens .token")]
    assert len(labels) == len(told["tokens"])
    first = float(re.search(r"P\(tag\) (\S+)$", labels[0])[1])
    assert first == pytest.approx(told["tokens"][0]["tag_prob"], rel=0.05)
    assert len(page.all("#score-curve polyline")) == 1
    before = page.find("#score-curve polyline").get_attribute("points")
    page.find("input[name=scale][value=linear] + span").click()
    assert page.find("#score-curve polyline").get_attribute("points") != before


def test_texts_are_never_markup(page, script):
    from selenium.webdriver.common.keys import Keys

    script.text = MARKUP
    page.open().find("#max-tokens").send_keys(Keys.END)
    page.run(MARKUP.replace("\n", " "))
    assert page.shown_text(".panel.a .text") == MARKUP.replace("\n", " ") + MARKUP
    page.score(MARKUP)
    assert page.shown_text("#score-tokens") == MARKUP
    assert not page.all("main .text img, main .text b")


def test_what_fails_is_told_and_a_run_can_be_stopped(page, script):
    page.open()
    wait_for(lambda: len(page.all(".panel")) == 2, "two panels")
    script.fail_next_step = True
    page.run()
    alerts = [alert.text for alert in page.all(".panel .alert") if alert.is_displayed()]
    assert alerts == ["the engine failed (ArithmeticError)"]
    script.may_go.clear()
    before, submitted = len(script.cancelled), len(script.requests)
    page.find("#run").click()
    wait_for(lambda: len(page.all(".panel .busy")) == 2 and len(script.requests) >= submitted + 2, "both run")
    page.find("#stop").click()
    page.finish()
    assert [state.text for state in page.all(".panel .state")] == ["stopped", "stopped"]
    wait_for(lambda: len(script.cancelled) == before + 2, "the engine knows")


def test_a_server_with_a_key_asks_for_it(driver, script):
    models = {"tiny": tiny_model()}
    with running(models, {"tiny": lambda: FakeEngine(script)}, key="sesame") as server:
        page = Page(driver, server.url).show()
        wait_for(lambda: page.find("#key-form").is_displayed(), "it asks")
        page.find("#key").send_keys("wrong")
        page.find("#key-form button").click()
        wait_for(lambda: page.find("#key").get_attribute("value") == "", "it was tried")
        wait_for(lambda: page.find("#key-form").is_displayed(), "it asks again")
        page.find("#key").send_keys("sesame")
        page.find("#key-form button").click()
        page.run()
        assert page.shown_text(".panel.b .text").endswith(TEXT)
        driver.get_log("browser")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 360])
def test_readable_on_a_desk_and_a_phone_in_light_and_dark(page, width, scheme):
    page.open(width=width, height=800, scheme=scheme).run("the dog sat on the mat, " * 4)
    page.js("document.querySelectorAll('.panel.b .token').forEach(e => e.style.setProperty('--t', 1))")
    page.all(".panel.b .token:not(.given)")[1].click()
    assert page.js("return document.documentElement.scrollWidth") <= width, "nothing sticks out"
    contrasts = page.js(CONTRASTS)
    assert len(contrasts) > 40 and contrasts[0][0] >= 4.5, contrasts[:5]
    page.score("the dog sat " * 20)
    assert page.js("return document.documentElement.scrollWidth") <= width
    assert page.js(CONTRASTS)[0][0] >= 4.5


def test_everything_to_operate_has_a_name(page):
    page.open().run()
    page.all(".panel.b .token:not(.given)")[1].click()
    tree = page.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})
    roles = ("button", "textbox", "slider", "combobox", "radio", "tab", "tabpanel", "image", "group", "region")
    names = {}
    for node in tree["nodes"]:
        if not node["ignored"] and (role := node["role"]["value"]) in roles:
            names.setdefault(role, []).append(node.get("name", {}).get("value", ""))
    assert {"button", "textbox", "slider", "combobox", "radio", "tab"} <= names.keys()
    for role, found in names.items():
        assert all(found), f"a {role} without a name among {found}"
    assert len(set(names["slider"])) == len(names["slider"]) and len(set(names["combobox"])) == len(names["combobox"])


def test_the_files_need_nothing_from_elsewhere_and_are_served_under_a_policy(server):
    answer = ask(server, "GET", "/")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
    types = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
    for file in FILES.iterdir():
        content = file.read_text()
        assert not re.search(r"(?<!www\.w3\.org/)https?://(?!www\.w3\.org/)", content), file.name
        assert "innerHTML" not in content and " style=" not in content and " onclick" not in content
        path = "/" if file.name == "index.html" else f"/playground/{file.name}"
        served = ask(server, "GET", path)
        assert served.status == 200 and served.headers["content-type"].startswith(types[file.suffix])
        assert served.body == file.read_bytes() and served.headers["content-security-policy"] == policy
        assert ask(server, "GET", path, headers={"If-None-Match": served.headers["etag"]}).status == 304
    html = (FILES / "index.html").read_text()
    assert json.dumps(sorted(re.findall(r"/playground/([\w.]+)", html))) == json.dumps(
        ["icon.svg", "icon.svg", "main.js", "playground.css"]
    )
