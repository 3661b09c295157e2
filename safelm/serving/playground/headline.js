// What the two texts come to, in a sentence worth sharing.
import { show } from "./scale.js";

// sides: [{label, mean}], means over the new tokens, by one model; null where there is none.
export function headline([a, b], shader) {
  if (a.mean === null || b.mean === null) return null;
  if (!shader) return { title: "Each text is shaded by its own model", detail: "Their P(tag) can't be compared." };
  const [more, less] = a.mean >= b.mean ? [a, b] : [b, a];
  const ratio = more.mean / less.mean, detail =
    `Mean P(tag) of the new tokens, both read by ${shader}: ${show(a.mean)} for ${a.label}, ${show(b.mean)} for ${b.label}.`;
  if (!(ratio >= 1.5)) return { title: "Both texts have about the same P(tag)", detail };
  return { title: `${times(ratio)}\u00d7 less P(tag): ${less.label}, against ${more.label}`, detail };
}

function times(ratio) {
  if (!Number.isFinite(ratio)) return "\u221e";
  return ratio < 10 ? ratio.toFixed(1) : Number(ratio.toPrecision(2)).toLocaleString("en");
}
