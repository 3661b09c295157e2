// One side of the comparison: which model, which method with which settings, and what came of it.
import { generate, score } from "./api.js";
import { announce, complain, connectSlider, element, summarize } from "./elements.js";
import { show } from "./scale.js";
import { nameOf, probabilities, sawTag } from "./shading.js";
import { showStep } from "./steps.js";
import { TokenText } from "./tokens.js";

const METHODS = {
  greedy: { label: "Greedy", settings: [] },
  sample: { label: "Sampling", settings: ["temperature"] },
  beam: { label: "Beam search", settings: ["num_beams"] },
  safe_beam: { label: "SafeBeam", settings: ["num_beams", "num_candidates", "drop_fraction", "drop_above", "anchor"] },
  tag_penalty: { label: "Sampling, tag penalised", settings: ["temperature", "num_candidates", "threshold"] },
};
const SETTINGS = {
  num_beams: { label: "Beams", min: 1, max: 8, step: 1, value: 4 },
  num_candidates: { label: "Candidates", min: 1, max: 16, step: 1, value: 4 },
  drop_fraction: { label: "Drop fraction", min: 0, max: 0.95, step: 0.05, value: 0.5, format: value => value.toFixed(2) },
  drop_above: { label: "Drop above P(tag)", min: 0, max: 0.05, step: 0.001, value: 0, format: value => value.toFixed(3) },
  anchor: { label: "Anchor to greedy", min: 0, max: 1, step: 0.1, value: 0, format: value => value.toFixed(1) },
  temperature: { label: "Temperature", min: 0.1, max: 2, step: 0.1, value: 1, format: value => value.toFixed(1) },
  threshold: { label: "Threshold", min: -5, max: 0, step: 0.25, value: -2, format: value => show(10 ** value), send: value => 10 ** value },
};
const STOPPED = {
  eos: "end of the text", length: "token limit", stop: "stop string", tag: "the tag", threshold: "P(tag) too high", time: "time limit",
};
const EMPTY = "The continuation will stand here, every token shaded by P(tag).";
const SLOW_AFTER = 4000;  // milliseconds without a token

export class Panel {
  constructor(name, { method, model, models, shader, onChange, onVisit }) {
    this.name = name;
    this.models = models;
    this.shader = shader;  // whose P(tag) shades the text; null: its writer's
    this.onChange = onChange;
    this.root = document.getElementById("panel").content.firstElementChild.cloneNode(true);
    this.root.classList.add(name);
    const find = selector => this.root.querySelector(selector);
    [this.title, this.state, this.alert, this.note] = [find(".panel-title"), find(".state"), find(".alert"), find(".note")];
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
    this.method.addEventListener("change", () => { this.#offerSettings(); this.markStale(); });
    this.model.addEventListener("change", () => { this.#retitle(); this.markStale(); });
    const text = find(".text");
    text.setAttribute("aria-label", `Text of ${this.letter}; arrow keys walk along its tokens`);
    this.text = new TokenText(text, { onPick: index => this.#pick(index), onVisit });
    this.text.clear(EMPTY);
    this.model.append(...models.map(each => element("option", { value: each.id, text: nameOf(each) })));
    this.model.value = model.id;
    this.limits = models[0].safelm.limits;
    this.#offerSettings();
  }

  // The choices as a link holds them.
  get choices() {
    const settings = METHODS[this.method.value].settings.map(key => [key, this.settings[key]]);
    return { model: this.model.value, method: this.method.value, ...Object.fromEntries(settings) };
  }

  choose({ model, method, ...settings }) {
    if (this.models.some(each => each.id === model)) this.model.value = model;
    if (Object.hasOwn(METHODS, method ?? "")) this.method.value = method;
    for (const [key, word] of Object.entries(settings)) {
      const value = Number(word);
      if (Object.hasOwn(SETTINGS, key) && word !== "" && value >= SETTINGS[key].min && value <= SETTINGS[key].max) this.settings[key] = value;
    }
    this.#offerSettings();
  }

  get tokens() { return this.text.tokens; }
  get numGiven() { return this.tokens.filter(token => token.given).length; }
  get label() { return `${this.letter}: ${this.title.textContent}`; }
  get what() { return `${METHODS[this.method.value].label} on ${this.model.value}`; }
  get writer() { return this.models.find(each => each.id === this.model.value); }
  get isStale() { return this.root.classList.contains("stale"); }

  // The mean P(tag) of the new tokens, null while it isn't known.
  get mean() {
    const values = this.tokens.filter(token => !token.given).map(token => token.tag_prob);
    return values.length && values.every(value => value !== null) ? values.reduce((sum, value) => sum + value, 0) / values.length : null;
  }

  // The text is of other settings than those shown.
  markStale() {
    if (!this.ran || this.text.place.classList.contains("busy")) return;
    this.root.classList.add("stale");
    this.state.textContent = "settings changed: run again";
    this.onChange();
  }

  // Generates; the prompt's own tokens are scored and stand in front of the continuation.
  async run(kind, prompt, maxTokens, signal) {
    this.trace = this.ended = null;
    this.ran = { label: this.label, what: this.what, writer: this.writer, before: kind === "chat" ? `${prompt}\n\n` : "" };
    this.root.classList.remove("stale");
    this.steps.hidden = true;
    complain(this.alert, "");
    summarize(this.summary, []);
    this.text.clear();
    this.#busy("working");
    const slow = setTimeout(() => this.#busy("working: a method's first run compiles it, up to a minute"), SLOW_AFTER);
    const began = performance.now();
    try {
      if (kind === "text" && prompt) {
        const given = await score(this.model.value, prompt, signal).catch(error => {
          if (error.status === 400) return { tokens: [] };  // longer than what is scored
          throw error;
        });
        this.#add(given.tokens, true);
      }
      const fields = { model: this.model.value, max_tokens: maxTokens, ...this.#asked() };
      let count = 0;
      for await (const { safelm } of generate(kind, prompt, fields, signal)) {
        clearTimeout(slow);
        this.#add(safelm.tokens ?? [], false);
        count += safelm.tokens?.length ?? 0;
        this.#busy(`${count} tokens`);
        if (safelm.stopped_by) this.#conclude(safelm, count, (performance.now() - began) / 1000);
      }
      await this.shadeBy(this.shader, signal);
      if (this.ended) announce(`${this.ran.label}: ${this.state.textContent}, mean P(tag) ${show(this.mean)}, ended by ${this.ended}`);
    } catch (error) {
      if (error.name === "AbortError") this.state.textContent = "stopped";
      else { this.state.textContent = "failed"; complain(this.alert, error.message); }
    } finally {
      clearTimeout(slow);
      this.text.place.classList.remove("busy");
      if (!this.tokens.length) this.text.clear(EMPTY);
      this.onChange();
    }
  }

  #add(tokens, given) {
    const isOwn = !this.shader || this.shader.id === this.ran.writer.id;
    this.text.add(tokens.map(token => ({ ...token, own: token.tag_prob, tag_prob: isOwn ? token.tag_prob : null })), { given });
    this.onChange();
  }

  // Shades what stands here by a model's P(tag).
  async shadeBy(shader, signal) {
    this.shader = shader;
    if (!this.ran || !this.tokens.length) return;
    const { writer, before } = this.ran, isOwn = !shader || shader.id === writer.id;
    const values = isOwn ? this.tokens.map(token => token.own)
      : await probabilities({ tokens: this.tokens, before, writer, shader, signal });
    this.text.setProbabilities(values);
    this.#summarize();
    this.onChange();
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

  #conclude({ stopped_by, trace }, count, seconds) {
    this.trace = trace ?? null;
    this.ended = STOPPED[stopped_by] ?? stopped_by;
    this.state.textContent = `${count} tokens in ${seconds.toFixed(1)} s`;
    this.#summarize();
  }

  #summarize() {
    const values = this.tokens.filter(token => !token.given).map(token => token.tag_prob ?? 0);
    const numbers = this.mean === null ? [] : [["mean P(tag)", show(this.mean)], ["highest", show(Math.max(...values))]];
    summarize(this.summary, [...numbers, ...(this.ended ? [["ended by", this.ended]] : [])]);
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
      input.addEventListener("input", () => { this.settings[key] = Number(input.value); this.markStale(); });
      return slider;
    }));
    this.#retitle();
  }

  #retitle() {
    this.title.textContent = `${METHODS[this.method.value].label}${this.model.length > 1 ? `, ${this.model.value}` : ""}`;
    const never = sawTag(this.writer) === false;
    this.note.textContent = never ? `${this.writer.id} never saw the tag: its own P(tag) means nothing.` : "";
    this.note.hidden = !never;
    this.onChange();
  }
}
