// The page's settings in its address, so that a link opens the same comparison.
const SIDES = ["a", "b"];

// state: {prompt, kind, tokens, shade, scale, a: {model, method, ...settings}, b: {...}}
export function write({ a, b, ...rest }) {
  const fields = new URLSearchParams(rest);
  for (const [side, values] of [["a", a], ["b", b]]) {
    for (const [name, value] of Object.entries(values)) fields.set(`${side}.${name}`, value);
  }
  return `#${fields}`;
}

// What an address asks for; null where it has none. Values are words: who uses them checks them.
export function read(hash) {
  const fields = new URLSearchParams(hash.replace(/^#/, ""));
  if (!fields.has("prompt")) return null;
  const state = { a: {}, b: {} };
  for (const [key, value] of fields) {
    const [side, name] = key.split(".", 2);
    if (name === undefined) state[key] = value;
    else if (SIDES.includes(side)) state[side][name] = value;
  }
  return state;
}
