// One side of the comparison: which model, which method with which settings, and what came of it.
import { generate, score } from "./api.js";
import { announce, complain, connectSlider, element, summarize } from "./elements.js";
import { show } from "./scale.js";
import { showStep } from "./steps.js";
import { TokenText } from "./tokens.js";

const METHODS = {
  greedy: { label: "Greedy", settings: [] },
  sample: { label: "Sampling", settings: ["temperature"] },
  beam: { label: "Beam search", settings: ["num_beams"] },
  safe_beam: { label: "SafeBeam", settings: ["num_beams", "num_candidates", "drop_fraction", "drop_above"] },
  tag_penalty: { label: "Sampling, tag penalised", settings: ["temperature", "num_candidates", "threshold"] },
};
const SETTINGS = {
  num_beams: { label: "Beams", min: 1, max: 8, step: 1, value: 4 },
  num_candidates: { label: "Candidates", min: 1, max: 16, step: 1, value: 4 },
  drop_fraction: { label: "Drop fraction", min: 0, max: 0.95, step: 0.05, value: 0.5, format: value => value.toFixed(2) },
  drop_above: { label: "Drop above P(tag)", min: 0, max: 0.05, step: 0.001, value: 0, format: value => value.toFixed(3) },
  temperature: { label: "Temperature", min: 0.1, max: 2, step: 0.1, value: 1, format: value => value.toFixed(1) },
  threshold: { label: "Threshold", min: -5, max: 0, step: 0.25, value: -2, format: value => show(10 ** value), send: value => 10 ** value },
};
const STOPPED = {
  eos: "end of the text", length: "token limit", stop: "stop string", tag: "the tag", threshold: "P(tag) too high", time: "time limit",
};
const EMPTY = "The continuation will stand here, every token shaded by P(tag).";

export class Panel {
  constructor(name, { method, modelNumber, models, onChange, onVisit }) {
    this.name = name;
    this.onChange = onChange;
    this.root = document.getElementById("panel").content.firstElementChild.cloneNode(true);
    this.root.classList.add(name);
    const find = selector => this.root.querySelector(selector);
    [this.title, this.state, this.alert] = [find(".panel-title"), find(".state"), find(".alert")];
    [this.sliders, this.summary, this.steps] = [find(".sliders"), find(".summary"), find(".steps")];
    [this.model, this.method] = [find(".model"), find(".method")];
    this.letter = find(".letter").textContent = name.toUpperCase();
    [this.model, this.method].forEach(select => {
      const label = select.previousElementSibling;
      select.id = `${name}-${select.className}`;
      label.htmlFor = select.id;
      label.append(element("span", { class: "hidden", text: ` of ${this.letter}` }));
    });
    this.settings = Object.fromEntries(Object.entries(SETTINGS).map(([key, { value }]) => [key, value]));
    this.method.append(...Object.entries(METHODS).map(([value, { label: text }]) => element("option", { value, text })));
    this.method.value = method;
    this.method.addEventListener("change", () => this.#offerSettings());
    this.model.addEventListener("change", () => this.#retitle());
    const text = find(".text");
    text.setAttribute("aria-label", `Text of ${this.letter}; arrow keys walk along its tokens`);
    this.text = new TokenText(text, { onPick: index => this.#pick(index), onVisit });
    this.text.clear(EMPTY);
    this.offerModels(models, modelNumber);
  }

  offerModels(models, number) {
    this.model.replaceChildren(...models.map(each => element("option", { value: each.id, text: each.id })));
    this.model.selectedIndex = Math.min(number, models.length - 1);
    this.limits = models[0].safelm.limits;
    this.#offerSettings();
  }

  get tokens() { return this.text.tokens; }
  get numGiven() { return this.tokens.filter(token => token.given).length; }
  get label() { return `${this.letter}: ${this.title.textContent}`; }

  // Generates; the prompt's own tokens are scored and stand in front of the continuation.
  async run(kind, prompt, maxTokens, signal) {
    this.trace = null;
    this.steps.hidden = true;
    complain(this.alert, "");
    summarize(this.summary, []);
    this.text.clear();
    this.#busy("working");
    const began = performance.now();
    try {
      if (kind === "text" && prompt) {
        const given = await score(this.model.value, prompt, signal).catch(error => {
          if (error.status === 400) return { tokens: [] };  // longer than what is scored
          throw error;
        });
        this.text.add(given.tokens, { given: true });
        this.onChange();
      }
      const fields = { model: this.model.value, max_tokens: maxTokens, ...this.#asked() };
      let count = 0;
      for await (const { safelm } of generate(kind, prompt, fields, signal)) {
        this.text.add(safelm.tokens ?? []);
        count += safelm.tokens?.length ?? 0;
        this.#busy(`${count} tokens`);
        this.onChange();
        if (safelm.stopped_by) this.#conclude(safelm, count, (performance.now() - began) / 1000);
      }
    } catch (error) {
      if (error.name === "AbortError") this.state.textContent = "stopped";
      else { this.state.textContent = "failed"; complain(this.alert, error.message); }
    } finally {
      this.text.place.classList.remove("busy");
      if (!this.tokens.length) this.text.clear(EMPTY);
      this.onChange();
    }
  }

  #busy(text) {
    this.text.place.classList.add("busy");
    this.state.textContent = text;
  }

  #asked() {
    const { settings } = METHODS[this.method.value];
    const safelm = { method: this.method.value, want_trace: ["beam", "safe_beam"].includes(this.method.value) };
    const fields = { safelm };
    for (const key of settings) {
      const value = (SETTINGS[key].send ?? Number)(this.settings[key]);
      if (key === "temperature") fields.temperature = value;
      else safelm[key] = value;
    }
    return fields;
  }

  #conclude({ stopped_by, summary, trace }, count, seconds) {
    this.trace = trace ?? null;
    this.state.textContent = `${count} tokens in ${seconds.toFixed(1)} s`;
    const numbers = summary ? [["highest P(tag)", show(summary.max)], ["mean", show(summary.mean)], ["area", show(summary.area)]] : [];
    summarize(this.summary, [...numbers, ["ended by", STOPPED[stopped_by] ?? stopped_by]]);
    announce(`${this.label}: ${this.state.textContent}, highest P(tag) ${show(summary?.max)}, ended by ${STOPPED[stopped_by] ?? stopped_by}`);
  }

  #pick(index) {
    const step = this.trace?.[index - this.numGiven];
    this.text.press(step ? index : -1);
    if (step) showStep(this.steps, step, index - this.numGiven + 1);
    else this.steps.hidden = true;
  }

  #offerSettings() {
    const template = document.getElementById("slider").content.firstElementChild;
    this.sliders.replaceChildren(...METHODS[this.method.value].settings.map(key => {
      const { label, format, min, max, step } = SETTINGS[key], slider = template.cloneNode(true);
      const most = { num_beams: this.limits.beams, num_candidates: this.limits.candidates }[key] ?? max;
      const [labelElement, input] = slider.children;
      labelElement.textContent = label;
      labelElement.append(element("span", { class: "hidden", text: ` of ${this.letter}` }));
      input.id = labelElement.htmlFor = `${this.name}-${key}`;
      Object.assign(input, { min, max: most, step, value: Math.min(this.settings[key], most) });
      connectSlider(slider, format);
      input.addEventListener("input", () => { this.settings[key] = Number(input.value); });
      return slider;
    }));
    this.#retitle();
  }

  #retitle() {
    this.title.textContent = `${METHODS[this.method.value].label}${this.model.length > 1 ? `, ${this.model.value}` : ""}`;
    this.onChange();
  }
}
