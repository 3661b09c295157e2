// A text as tokens: shaded by P(tag), told on hover and focus, walked with the arrow keys.
import { element } from "./elements.js";
import { heat, show } from "./scale.js";

const tip = document.getElementById("tip");

export class TokenText {
  // onPick(index) when a token is clicked or Enter is pressed on it; onVisit(index or -1) on hover and focus.
  constructor(place, { onPick = () => {}, onVisit = () => {} } = {}) {
    this.place = place;
    this.tokens = [];
    this.onPick = onPick;
    this.onVisit = onVisit;
    place.addEventListener("pointerover", event => this.#visit(this.#indexOf(event.target)));
    place.addEventListener("pointerleave", () => this.#leave());
    place.addEventListener("focusin", event => this.#visit(this.#indexOf(event.target)));
    place.addEventListener("focusout", () => this.#leave());
    place.addEventListener("click", event => this.#pick(this.#indexOf(event.target)));
    place.addEventListener("keydown", event => this.#key(event));
  }

  clear(placeholder = "") {
    this.tokens = [];
    this.place.replaceChildren(...(placeholder ? [element("span", { class: "placeholder", text: placeholder })] : []));
  }

  // `given` marks the prompt's tokens, which the model didn't write.
  add(tokens, { given = false } = {}) {
    if (!this.tokens.length) this.place.replaceChildren();
    for (const token of tokens) {
      const index = this.tokens.length;
      this.tokens.push({ ...token, given });
      this.place.append(this.#span(token, index, given));
    }
  }

  // P(tag) by another model, a value a token.
  setProbabilities(values) {
    this.tokens.forEach((token, index) => {
      token.tag_prob = values[index] ?? null;
      this.spanOf(index).setAttribute("aria-label", `${nameOfToken(token)}, P(tag) ${show(token.tag_prob)}`);
    });
    this.reshade();
  }

  reshade() {
    this.tokens.forEach((token, index) => this.spanOf(index).style.setProperty("--t", heat(token.tag_prob).toFixed(3)));
  }

  spanOf(index) { return this.place.children[index]; }

  light(index) {
    this.place.querySelector(".lit")?.classList.remove("lit");
    this.spanOf(index)?.classList.add("lit");
  }

  press(index) {
    this.place.querySelector("[aria-pressed=true]")?.setAttribute("aria-pressed", "false");
    this.spanOf(index)?.setAttribute("aria-pressed", "true");
  }

  #span(token, index, given) {
    const isMark = token.text === "";
    const shown = isMark ? (token.special ?? "\u25e6") : token.text;
    const span = element("span", {
      class: `token${given ? " given" : ""}${isMark ? " mark" : ""}`,
      role: "button", tabindex: index ? "-1" : "0", "aria-pressed": "false",
      "aria-label": `${nameOfToken(token)}, P(tag) ${show(token.tag_prob)}`,
    });
    shown.split("\n").forEach((line, number) => {
      if (number) span.append(element("span", { class: "newline", text: "\u21b5", "aria-hidden": "true" }), "\n");
      span.append(line);
    });
    span.style.setProperty("--t", heat(token.tag_prob).toFixed(3));
    return span;
  }

  #indexOf(target) {
    const span = target.closest(".token");
    return span ? [...this.place.children].indexOf(span) : -1;
  }

  #visit(index) {
    if (index < 0) return this.#leave();
    this.light(-1);
    const token = this.tokens[index], box = this.spanOf(index).getClientRects()[0];
    tip.replaceChildren(
      element("b", { text: `P(tag) ${show(token.tag_prob)}` }), element("br"),
      `token ${index + 1}${token.given ? " of the prompt" : ""}: ${token.special ?? JSON.stringify(token.text)}, id ${token.id}`);
    tip.hidden = false;
    const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(8, left) + window.scrollX}px`;
    tip.style.top = `${(above < 0 ? box.bottom + 8 : above) + window.scrollY}px`;
    this.onVisit(index);
  }

  #leave() {
    tip.hidden = true;
    this.onVisit(-1);
  }

  #pick(index) {
    if (index < 0) return;
    this.#focus(index);
    this.onPick(index);
  }

  #focus(index) {
    this.place.querySelector("[tabindex='0']")?.setAttribute("tabindex", "-1");
    this.spanOf(index).setAttribute("tabindex", "0");
    this.spanOf(index).focus();
  }

  #key(event) {
    const index = this.#indexOf(event.target), last = this.tokens.length - 1;
    if (index < 0) return;
    const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: last, ArrowDown: index + 10, ArrowUp: index - 10 }[event.key];
    if (to !== undefined) this.#focus(Math.min(last, Math.max(0, to)));
    else if (event.key === "Enter" || event.key === " ") this.onPick(index);
    else if (event.key === "Escape") tip.hidden = true;
    else return;
    event.preventDefault();
  }
}

function nameOfToken(token) {
  return token.text === "" ? (token.special ?? "part of a character") : JSON.stringify(token.text);
}
