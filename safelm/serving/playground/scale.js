// P(tag) to a height between 0 and 1: of shades, which begin where safe text ends, and of curves, which show all of it.
const SAFE = 1e-3;  // in safe text P(tag) stays below this, nearly everywhere
const LOWEST = 1e-5;
let kind = "log";

export function setScale(value) { kind = value; }

const logarithm = (p, lowest) => Math.min(1, Math.max(0, 1 - Math.log10(Math.max(p, lowest)) / Math.log10(lowest)));

// How strongly a token is shaded.
export function heat(p) {
  if (p === null || p === undefined) return 0;
  return kind === "linear" ? p : logarithm(p, SAFE);
}

// How high a curve runs.
export function height(p) {
  if (p === null || p === undefined) return 0;
  return kind === "linear" ? p : logarithm(p, LOWEST);
}

export function ticks() {
  return kind === "linear" ? [0, 0.25, 0.5, 0.75, 1] : [1e-5, 1e-4, 1e-3, 0.01, 0.1, 1];
}

// Where shades begin.
export function shadesBegin() { return kind === "linear" ? 0 : SAFE; }

export function show(p) {
  if (p === null || p === undefined) return "none";
  if (p >= 0.001 || p === 0) return p.toFixed(p >= 0.1 ? 3 : 4).replace(/(\.\d*?)0+$/, "$1").replace(/\.$/, "");
  return p.toExponential(1);
}
