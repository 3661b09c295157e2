// P(tag) along one or two texts as an inline SVG; pointing at it lights the token.
import { drawn } from "./elements.js";
import { height, shadesBegin, show, ticks } from "./scale.js";

const HEIGHT = 258, LEFT = 48, RIGHT = 10, TOP = 10, BOTTOM = 44, SAMPLE = 24;

export class Curve {
  // onVisit(series name, index) while the pointer is over it, with index -1 when it leaves.
  constructor(place, { onVisit = () => {} } = {}) {
    this.place = place;
    this.onVisit = onVisit;
    this.series = [];
    this.svg = drawn("svg", { role: "img" });
    place.append(this.svg);
    this.svg.addEventListener("pointermove", event => this.#point(event));
    this.svg.addEventListener("pointerleave", () => { this.mark(null, -1); onVisit(null, -1); });
    new ResizeObserver(() => this.draw()).observe(place);
  }

  // series: [{name: "a" or "b", label, tokens, numGiven}]
  set(series) {
    this.series = series;
    this.draw();
  }

  draw() {
    const width = Math.max(240, this.place.clientWidth);
    const length = Math.max(2, ...this.series.map(each => each.tokens.length));
    this.x = index => LEFT + (index / (length - 1)) * (width - LEFT - RIGHT);
    this.y = p => HEIGHT - BOTTOM - height(p) * (HEIGHT - TOP - BOTTOM);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.svg.setAttribute("aria-label", this.#describe());
    const parts = ticks().flatMap(p => [
      drawn("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: this.y(p), y2: this.y(p) }),
      drawn("text", { x: LEFT - 9, y: this.y(p) + 4, "text-anchor": "end", text: tickLabel(p) }),
    ]);
    const begin = shadesBegin();
    if (begin) parts.push(...this.#begin(begin, width));
    const given = Math.max(0, ...this.series.map(each => each.numGiven));
    if (given && given < length) {
      const x = (this.x(given - 1) + this.x(given)) / 2;
      parts.push(drawn("line", { class: "divider", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }),
        drawn("text", { x: x - 6, y: HEIGHT - BOTTOM + 17, "text-anchor": "end", text: "prompt" }),
        drawn("text", { x: x + 6, y: HEIGHT - BOTTOM + 17, text: "continuation" }));
    }
    this.series.forEach((each, number) => parts.push(...this.#line(each, number, width)));
    this.dots = drawn("g", {});
    this.svg.replaceChildren(...parts, this.dots);
  }

  // Puts a dot on one series; index -1 for none.
  mark(name, index) {
    const each = this.series.find(candidate => candidate.name === name), token = each?.tokens[index];
    this.dots?.replaceChildren(...(token ? [
      drawn("circle", { class: `dot ${name}`, r: 5.5, cx: this.x(index), cy: this.y(token.tag_prob) }),
    ] : []));
  }

  // The line from which on tokens are shaded, and what it means below the plot, where no curve runs.
  #begin(p, width) {
    return [
      drawn("line", { class: "begin", x1: LEFT, x2: width - RIGHT, y1: this.y(p), y2: this.y(p) }),
      drawn("line", { class: "begin", x1: LEFT, x2: LEFT + SAMPLE, y1: HEIGHT - 11, y2: HEIGHT - 11 }),
      drawn("text", { x: LEFT + SAMPLE + 6, y: HEIGHT - 7, text: "above: shaded; safe text stays below" }),
    ];
  }

  #line({ name, label, tokens }, number, width) {
    if (!tokens.length) return [];
    const points = tokens.map((token, index) => `${this.x(index).toFixed(1)},${this.y(token.tag_prob).toFixed(1)}`);
    const shape = tokens.length > 1
      ? drawn("polyline", { class: `line ${name}`, points: points.join(" ") })
      : drawn("circle", { class: `dot ${name}`, r: 4, cx: this.x(0), cy: this.y(tokens[0].tag_prob) });
    const text = drawn("text", { class: `name ${name}`, x: width - RIGHT - 4, y: TOP + 15 + number * 17, "text-anchor": "end", text: label });
    return this.series.length > 1 ? [shape, text] : [shape];
  }

  #point(event) {
    const matrix = this.svg.getScreenCTM();
    if (!matrix || !this.series.length) return;
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse());
    const distances = this.series.flatMap(({ name, tokens }) => tokens.map((token, index) => ({
      name, index, distance: Math.hypot(this.x(index) - at.x, 0.4 * (this.y(token.tag_prob) - at.y)),
    })));
    const nearest = distances.reduce((best, each) => (best && best.distance <= each.distance ? best : each), null);
    if (!nearest) return;
    this.mark(nearest.name, nearest.index);
    this.onVisit(nearest.name, nearest.index);
  }

  #describe() {
    const told = this.series.filter(each => each.tokens.length).map(each => {
      const highest = each.tokens.reduce((best, token) => Math.max(best, token.tag_prob ?? 0), 0);
      return `${each.label}: ${each.tokens.length} tokens, highest P(tag) ${show(highest)}`;
    });
    return told.length ? `Curve of P(tag). ${told.join(". ")}` : "Curve of P(tag), still empty";
  }
}

function tickLabel(p) {
  if (p === 0 || p >= 1e-3) return String(p);
  return `${p === ticks()[0] ? "\u2264" : ""}${p.toExponential(0)}`;
}
