// The page: two panels to compare, one text to score, one scale and one model's P(tag) for all.
import { ApiError, health, listModels, score, setKey } from "./api.js";
import { Curve } from "./curve.js";
import { announce, complain, connectSlider, element, summarize } from "./elements.js";
import { headline } from "./headline.js";
import * as link from "./link.js";
import { Panel } from "./panel.js";
import * as picture from "./picture.js";
import { heat, setScale, show } from "./scale.js";
import { EACH, nameOf, sawTag, shaders } from "./shading.js";
import { TokenText } from "./tokens.js";

const byId = id => document.getElementById(id);
const checked = name => document.querySelector(`input[name=${name}]:checked`).value;
const pageError = byId("page-error"), scoreError = byId("score-error"), shadeBy = byId("shade-by");
const asked = link.read(location.hash), example = byId("prompt").dataset.example;
let models = [], panels = [], running = null, ranPrompt = "";

const curve = new Curve(byId("compare-curve"), {
  onVisit: (name, index) => panels.forEach(panel => panel.text.light(panel.name === name ? index : -1)),
});
const scoreCurve = new Curve(byId("score-curve"), { onVisit: (_, index) => scored.light(index) });
const scored = new TokenText(byId("score-tokens"), { onVisit: index => scoreCurve.mark("a", index) });

function redraw() {
  curve.set(panels.map(({ name, label, ran, tokens, numGiven }) => ({ name, label: ran?.label ?? label, tokens, numGiven })));
  const told = panels.length && panels.every(panel => panel.ran) ? headline(sides(), shadeBy.value) : null;
  byId("headline").hidden = !told;
  if (told) {
    byId("headline-title").textContent = told.title;
    byId("headline-detail").textContent = told.detail + (panels.some(panel => panel.isStale) ? " Settings have changed since." : "");
  }
}

function sides() { return panels.map(panel => ({ label: panel.ran.what, mean: panel.mean })); }

async function start() {
  byId("key-form").hidden = true;
  complain(pageError, "");
  try {
    models = await listModels();
    offer();
    await warm();
    await run();
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) {
      byId("key-form").hidden = false;
      byId("key").focus();
    } else complain(pageError, error.message);
  }
}

// Fills the menus and sets what the address asks for, else an example: the raw model against SafeBeam.
function offer() {
  const limits = models[0].safelm.limits, ranked = shaders(models);
  byId("max-tokens").max = Math.min(256, limits.new_tokens);
  shadeBy.replaceChildren(...ranked.map(each => element("option", { value: each.id, text: each.id })),
    element("option", { value: EACH, text: "each its own model" }));
  const tagged = ranked.find(each => sawTag(each)) ?? models[Math.min(1, models.length - 1)];
  shadeBy.value = models.some(each => each.id === asked?.shade) || asked?.shade === EACH ? asked.shade : ranked.length ? tagged.id : EACH;
  byId("score-model").replaceChildren(...[...ranked, ...models.filter(each => !ranked.includes(each))].map(each =>
    element("option", { value: each.id, text: nameOf(each) })));
  byId("score-help").textContent = `Up to ${limits.score_tokens.toLocaleString("en")} tokens`;
  const other = models.find(each => sawTag(each) === false) ?? models.find(each => each !== tagged) ?? tagged;
  const make = (name, method, model) => new Panel(name, {
    method, model, models, shader: shader(), onChange: redraw, onVisit: index => curve.mark(name, index),
  });
  panels = [make("a", "greedy", other), make("b", "safe_beam", tagged)];
  if (asked) panels.forEach(panel => panel.choose(asked[panel.name]));
  byId("prompt").value = asked?.prompt ?? example;
  if (asked?.tokens > 0) byId("max-tokens").value = asked.tokens;
  for (const [name, value] of [["kind", asked?.kind], ["scale", asked?.scale]]) {
    const radio = [...document.querySelectorAll(`input[name=${name}]`)].find(each => each.value === value);
    if (radio) radio.checked = true;
  }
  byId("max-tokens").dispatchEvent(new Event("input"));
  rescale();
  byId("panels").replaceChildren(...panels.map(panel => panel.root));
}

function shader() { return models.find(each => each.id === shadeBy.value) ?? null; }

// Waits while the server compiles its first programs, and says so.
async function warm() {
  const notice = byId("warming");
  while (await health() === "warming_up") {
    notice.hidden = false;
    await new Promise(resolve => setTimeout(resolve, 1000));
  }
  notice.hidden = true;
}

async function run() {
  if (running || !panels.length) return;
  running = new AbortController();
  byId("run").disabled = true;
  byId("stop").disabled = false;
  announce("Running");
  ranPrompt = byId("prompt").value;
  history.replaceState(null, "", address());
  await Promise.all(panels.map(panel => panel.run(checked("kind"), ranPrompt, Number(byId("max-tokens").value), running.signal)));
  running = null;
  byId("run").disabled = false;
  byId("stop").disabled = true;
  redraw();
}

function address() {
  const [a, b] = panels.map(panel => panel.choices);
  return link.write({ prompt: byId("prompt").value, kind: checked("kind"), tokens: byId("max-tokens").value, shade: shadeBy.value, scale: checked("scale"), a, b });
}

async function copyLink() {
  history.replaceState(null, "", address());
  const copied = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
  told(byId("copy-link"), copied ? "Link copied" : "Link is in the address bar");
}

async function savePicture() {
  const canvas = picture.draw({
    headline: headline(sides(), shadeBy.value) ?? { title: "SafeLM", detail: "" },
    prompt: panels.some(panel => panel.numGiven) ? "" : ranPrompt,
    sides: panels.map(panel => ({
      label: panel.ran.label,
      note: panel.state.textContent,
      tokens: panel.tokens.map(token => ({ text: token.text || (token.special ?? ""), heat: heat(token.tag_prob), given: token.given })),
    })),
    foot: `${byId("what").textContent.replace(/\s+/g, " ").trim()} SafeLM playground${shadeBy.value ? `, shaded by ${shadeBy.value}` : ""}.`,
  });
  await picture.save(canvas, "safelm-comparison.png");
  told(byId("save-image"), "Image saved");
}

function told(button, text) {
  const before = button.dataset.text ??= button.textContent;
  button.textContent = text;
  announce(text);
  setTimeout(() => { button.textContent = before; }, 2000);
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

function rescale() {
  setScale(checked("scale"));
  byId("lowest").textContent = checked("scale") === "log" ? "\u2264 0.001" : "0";
  for (const text of [...panels.map(panel => panel.text), scored]) text.reshade();
  redraw();
  scoreCurve.draw();
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
for (const radio of document.querySelectorAll("input[name=scale]")) radio.addEventListener("change", rescale);
for (const each of [byId("prompt"), byId("max-tokens"), ...document.querySelectorAll("input[name=kind]")]) {
  each.addEventListener("input", () => panels.forEach(panel => panel.markStale()));
}
shadeBy.addEventListener("change", () => Promise.all(panels.map(panel => panel.shadeBy(shader())))
  .catch(error => complain(pageError, error.message)));
for (const [form, action] of [["ask", run], ["score-form", scoreText]]) {
  byId(form).addEventListener("submit", event => { event.preventDefault(); action(); });
  byId(form).addEventListener("keydown", event => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); action(); }
  });
}
byId("stop").addEventListener("click", () => running?.abort());
byId("copy-link").addEventListener("click", copyLink);
byId("save-image").addEventListener("click", savePicture);
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
