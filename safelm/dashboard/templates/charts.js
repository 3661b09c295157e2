// Axes, marks and the tip that both plots share.
const HEIGHT = 340, LEFT = 52, RIGHT = 16, TOP = 14, BOTTOM = 46;
const SHAPES = ["circle", "square", "diamond", "triangle", "cross"];

// A scale from values to pixels: {at(value), ticks}.
function scaleOf(values, from, to, { log = false, share = false } = {}) {
  const usable = values.filter(value => Number.isFinite(value) && (!log || value > 0));
  let low = Math.min(...usable), high = Math.max(...usable);
  if (share) [low, high] = [0, Math.min(1, Math.ceil(20 * Math.max(high, 0.05)) / 20)];
  if (!usable.length) [low, high] = [log ? 0.1 : 0, 1];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2];
  const move = log ? Math.log10 : value => value;
  const pad = share ? 0 : 0.05 * (move(high) - move(low));
  const [begin, end] = [move(low) - pad, move(high) + pad];
  const at = value => from + (move(value) - begin) / (end - begin) * (to - from);
  return { at, ticks: log ? logTicks(begin, end) : linearTicks(begin, end) };
}

function linearTicks(begin, end) {
  const rough = (end - begin) / 5, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(each => each * power >= rough);
  const ticks = [];
  for (let tick = Math.ceil(begin / step); tick * step <= end + step * 1e-9; tick++) ticks.push(tick * step);
  return ticks;
}

function logTicks(begin, end) {
  const ticks = [];
  for (let power = Math.floor(begin); power <= end; power++)
    for (const factor of end - begin > 2 ? [1] : [1, 2, 5]) ticks.push(factor * 10 ** power);
  const inside = ticks.filter(tick => Math.log10(tick) >= begin - 1e-9 && Math.log10(tick) <= end + 1e-9);
  return inside.length > 1 ? inside : [10 ** begin, 10 ** end];
}

// The frame of a plot: grid, ticks, names of the axes.
function frame(width, x, y, { xTick, yTick, xName, yName }) {
  const fitting = x.ticks.filter((_, index) => width > 480 || index % 2 === 0);
  return [
    ...y.ticks.flatMap(tick => [
      drawn("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y.at(tick), y2: y.at(tick) }),
      drawn("text", { x: LEFT - 8, y: y.at(tick) + 4, "text-anchor": "end", text: yTick(tick) }),
    ]),
    ...fitting.flatMap(tick => [
      drawn("line", { class: "grid", y1: TOP, y2: HEIGHT - BOTTOM, x1: x.at(tick), x2: x.at(tick) }),
      drawn("text", { x: x.at(tick), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle", text: xTick(tick) }),
    ]),
    drawn("text", { class: "axis", x: width - RIGHT, y: HEIGHT - 6, "text-anchor": "end", text: xName }),
    drawn("text", { class: "axis", x: LEFT, y: TOP - 2, text: yName }),
  ];
}

function mark(shape, x, y, attributes) {
  const size = 6, paths = {
    square: `M${x - size} ${y - size}h${2 * size}v${2 * size}h${-2 * size}z`,
    diamond: `M${x} ${y - 8}l8 8l-8 8l-8 -8z`,
    triangle: `M${x} ${y - 8}l8 14h-16z`,
    cross: `M${x - 3} ${y - 8}h6v5h5v6h-5v5h-6v-5h-5v-6h5z`,
  };
  return shape === "circle" ? drawn("circle", { ...attributes, cx: x, cy: y, r: 6.5 }) : drawn("path", { ...attributes, d: paths[shape] });
}

const shapeOf = row => SHAPES[methods.indexOf(row.method) % SHAPES.length];

function showTip(lines, x, y) {
  const tip = byId("tip");
  tip.replaceChildren(...lines.map((line, index) => element(index ? "div" : "b", { text: line })));
  tip.hidden = false;
  const room = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.setProperty("left", `${Math.max(8, Math.min(room, x + scrollX + 12))}px`);
  tip.style.setProperty("top", `${y + scrollY + 16}px`);
}

const hideTip = () => { byId("tip").hidden = true; };

// Draws again whenever the place's width changes; draw(width) returns the parts and a description.
function plotIn(section, draw) {
  const place = section.querySelector(".plot");
  const svg = drawn("svg", { role: "group" });
  place.replaceChildren(svg);
  const redraw = () => {
    const width = Math.max(280, place.clientWidth);
    const { parts, description } = draw(width);
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    svg.setAttribute("aria-label", description);
    svg.replaceChildren(...parts);
  };
  new ResizeObserver(redraw).observe(place);
  return redraw;
}
