// The page: two panels to compare, one text to score, one scale for all.
import { ApiError, listModels, score, setKey } from "./api.js";
import { Curve } from "./curve.js";
import { announce, complain, connectSlider, element, summarize } from "./elements.js";
import { Panel } from "./panel.js";
import { setScale, show } from "./scale.js";
import { TokenText } from "./tokens.js";

const byId = id => document.getElementById(id);
const pageError = byId("page-error"), scoreError = byId("score-error");
let panels = [], running = null;

const curve = new Curve(byId("compare-curve"), {
  onVisit: (name, index) => panels.forEach(panel => panel.text.light(panel.name === name ? index : -1)),
});
const scoreCurve = new Curve(byId("score-curve"), { onVisit: (_, index) => scored.light(index) });
const scored = new TokenText(byId("score-tokens"), { onVisit: index => scoreCurve.mark("a", index) });

function redraw() {
  curve.set(panels.map(({ name, label, tokens, numGiven }) => ({ name, label, tokens, numGiven })));
}

async function start() {
  byId("key-form").hidden = true;
  complain(pageError, "");
  try {
    const models = await listModels();
    const limits = models[0].safelm.limits;
    const maxTokens = byId("max-tokens");
    maxTokens.max = Math.min(256, limits.new_tokens);
    maxTokens.dispatchEvent(new Event("input"));
    byId("score-model").replaceChildren(...models.map(each => element("option", { value: each.id, text: each.id })));
    byId("score-help").textContent = `Up to ${limits.score_tokens.toLocaleString("en")} tokens`;
    panels = [];
    const make = (name, method, modelNumber) => new Panel(name, {
      method, modelNumber, models, onChange: redraw, onVisit: index => curve.mark(name, index),
    });
    panels = [make("a", "greedy", 0), make("b", "safe_beam", 1)];
    byId("panels").replaceChildren(...panels.map(panel => panel.root));
    redraw();
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) {
      byId("key-form").hidden = false;
      byId("key").focus();
    } else complain(pageError, error.message);
  }
}

async function run() {
  if (running || !panels.length) return;
  running = new AbortController();
  byId("run").disabled = true;
  byId("stop").disabled = false;
  announce("Running");
  const kind = document.querySelector("input[name=kind]:checked").value;
  const maxTokens = Number(byId("max-tokens").value);
  await Promise.all(panels.map(panel => panel.run(kind, byId("prompt").value, maxTokens, running.signal)));
  running = null;
  byId("run").disabled = false;
  byId("stop").disabled = true;
}

async function scoreText() {
  const button = byId("score-form").querySelector("button");
  button.disabled = true;
  complain(scoreError, "");
  try {
    const { tokens, summary } = await score(byId("score-model").value, byId("score-text").value);
    scored.clear();
    scored.add(tokens);
    scoreCurve.set([{ name: "a", label: byId("score-model").value, tokens, numGiven: 0 }]);
    summarize(byId("score-summary"), [["tokens", String(tokens.length)], ["highest P(tag)", show(summary.max)],
      ["mean", show(summary.mean)], ["area", show(summary.area)]]);
    announce(`${tokens.length} tokens scored, highest P(tag) ${show(summary.max)}`);
  } catch (error) {
    complain(scoreError, error.message);
  }
  button.disabled = false;
}

function selectTab(tab) {
  for (const each of document.querySelectorAll("[role=tab]")) {
    const isSelected = each === tab;
    each.setAttribute("aria-selected", String(isSelected));
    each.tabIndex = isSelected ? 0 : -1;
    byId(each.getAttribute("aria-controls")).hidden = !isSelected;
  }
  tab.focus();
}

const tabs = [...document.querySelectorAll("[role=tab]")];
tabs.forEach((tab, index) => {
  tab.addEventListener("click", () => selectTab(tab));
  tab.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) selectTab(tabs[(index + step + tabs.length) % tabs.length]);
  });
});
for (const radio of document.querySelectorAll("input[name=scale]")) {
  radio.addEventListener("change", () => {
    setScale(radio.value);
    byId("lowest").textContent = radio.value === "log" ? "1e-5" : "0";
    for (const text of [...panels.map(panel => panel.text), scored]) text.reshade();
    redraw();
    scoreCurve.draw();
  });
}
for (const [form, action] of [["ask", run], ["score-form", scoreText]]) {
  byId(form).addEventListener("submit", event => { event.preventDefault(); action(); });
  byId(form).addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); action(); }
  });
}
byId("stop").addEventListener("click", () => running?.abort());
byId("key-form").addEventListener("submit", event => {
  event.preventDefault();
  setKey(byId("key").value);
  byId("key").value = "";
  start();
});
connectSlider(byId("max-tokens").parentElement);
scored.clear("The text will stand here, every token shaded by P(tag).");
curve.set([]);
scoreCurve.set([]);
start();
