// P(tag) to a height between 0 and 1, for shades and curves alike.
const LOWEST = 1e-5;
let kind = "log";

export function setScale(value) { kind = value; }

export function heat(p) {
  if (p === null || p === undefined) return 0;
  if (kind === "linear") return p;
  return Math.min(1, Math.max(0, 1 - Math.log10(Math.max(p, LOWEST)) / Math.log10(LOWEST)));
}

export function ticks() {
  return kind === "linear" ? [0, 0.25, 0.5, 0.75, 1] : [1e-5, 1e-4, 1e-3, 0.01, 0.1, 1];
}

export function show(p) {
  if (p === null || p === undefined) return "none";
  if (p >= 0.001 || p === 0) return p.toFixed(p >= 0.1 ? 3 : 4).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
  return p.toExponential(1);
}
