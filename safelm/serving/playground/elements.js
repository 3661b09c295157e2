// Elements made of text: nothing a model or a user wrote is ever read as markup.
const SVG = "http://www.w3.org/2000/svg";

export function element(name, { text, ...attributes } = {}, ...children) {
  return fill(document.createElement(name), text, attributes, children);
}

export function drawn(name, { text, ...attributes } = {}, ...children) {
  return fill(document.createElementNS(SVG, name), text, attributes, children);
}

function fill(made, text, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) if (value !== undefined) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  made.append(...children);
  return made;
}

export function announce(text) { document.getElementById("announce").textContent = text; }

export function complain(place, message) {
  place.textContent = message;
  place.hidden = !message;
}

export function summarize(list, entries) {
  list.replaceChildren(...entries.map(([name, value]) =>
    element("div", {}, element("dt", { text: name }), element("dd", { text: value }))));
}

// A slider whose value stands beside it. Returns the input.
export function connectSlider(slider, format = String) {
  const input = slider.querySelector("input"), output = slider.querySelector("output");
  const tell = () => {
    output.textContent = format(Number(input.value));
    input.setAttribute("aria-valuetext", output.textContent);
  };
  input.addEventListener("input", tell);
  tell();
  return input;
}
