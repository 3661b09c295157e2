// One measure against another, a point a checkpoint, with the line of those that no other beats in both.
const SIGNS = { circle: "\u25cf", square: "\u25a0", diamond: "\u25c6", triangle: "\u25b2", cross: "\u271a" };
const frontierX = byId("frontier-x"), frontierY = byId("frontier-y");

function hasPoints(index) { return measureOf.some(row => row[index]); }

function setUpFrontier() {
  const groups = columnGroups(hasPoints);
  for (const menu of [frontierX, frontierY]) {
    fillMenu(menu, groups);
    menu.addEventListener("change", () => redrawFrontier());
  }
  const [x, y] = usualPair();
  [frontierX.value, frontierY.value] = [String(x), String(y)];
}

// Harmful answers against refused safe prompts where both are measured, else the two columns that share most rows.
function usualPair() {
  const shared = (a, b) => measureOf.filter(row => row[a] && row[b]).length;
  const pairs = board.columns.flatMap((first, a) => board.columns.flatMap((second, b) => {
    if (a === b || !shared(a, b)) return [];
    const usual = first.title === "safe prompts refused" && second.title === "harmful answers" && first.protocol === second.protocol;
    return [{ pair: [a, b], worth: shared(a, b) + (usual ? 1e6 : 0) + (first.shown && second.shown ? 0.5 : 0) }];
  }));
  return pairs.reduce((best, each) => (best.worth >= each.worth ? best : each), { pair: [0, Math.min(1, board.columns.length - 1)], worth: 0 }).pair;
}

function drawFrontier(width) {
  const [xColumn, yColumn] = [frontierX, frontierY].map(menu => board.columns[menu.value]);
  const points = chosenRows().flatMap(index => {
    const [x, y] = [measureOf[index][frontierX.value], measureOf[index][frontierY.value]];
    return x && y ? [{ index, row: board.rows[index], x, y }] : [];
  });
  const ends = (axis, column) => scaleOf(points.flatMap(point => [point[axis].value, point[axis].low ?? NaN, point[axis].high ?? NaN]),
    ...(axis === "x" ? [LEFT, width - RIGHT] : [HEIGHT - BOTTOM, TOP + 8]), { share: column.percent });
  const x = ends("x", xColumn), y = ends("y", yColumn);
  const named = column => `${column.title}${column.percent ? ", %" : ""} ${arrowOf(column)}`;
  const tick = column => value => (column.percent ? String(Math.round(100 * value)) : number(value));
  const parts = frame(width, x, y, { xTick: tick(xColumn), yTick: tick(yColumn), xName: named(xColumn), yName: named(yColumn) });
  const best = xColumn.better && yColumn.better ? unbeaten(points, xColumn, yColumn) : [];
  if (best.length > 1) {
    const at = best.map(point => `${x.at(point.x.value).toFixed(1)},${y.at(point.y.value).toFixed(1)}`);
    parts.push(drawn("polyline", { class: "best", points: at.join(" ") }));
  }
  parts.push(...points.flatMap(point => whiskers(point, x, y)), ...points.map(point => dotOf(point, x, y, xColumn, yColumn)),
    ...namesOf(points, x, y, width));
  const shapes = new Map(points.map(({ row }) => [shapeOf(row), methodName(row.method)]));
  const told = shapes.size > 1 ? ` ${[...shapes].map(([shape, method]) => `${SIGNS[shape]} ${method}`).join(", ")}.` : "";
  byId("frontier-note").textContent = points.length
    ? `Lines through a point are 95% intervals.${told}${best.length > 1 ? " The dashed line joins the checkpoints that no other beats in both." : ""}`
    : "No row that passes the filters has both measures.";
  const values = points.map(point => `${point.row.label}: ${written(xColumn, point.x.value)} and ${written(yColumn, point.y.value)}`);
  return { parts, description: `${columnName(yColumn)} against ${columnName(xColumn)}. ${values.join(". ")}` };
}

function whiskers({ row, x, y }, xScale, yScale) {
  const lines = [];
  const [cx, cy] = [xScale.at(x.value), yScale.at(y.value)];
  if (x.low !== null) lines.push({ x1: xScale.at(x.low), x2: xScale.at(x.high), y1: cy, y2: cy });
  if (y.low !== null) lines.push({ y1: yScale.at(y.low), y2: yScale.at(y.high), x1: cx, x2: cx });
  return lines.map(line => drawn("line", { class: `whisker ${colorOf(row)}`, ...line }));
}

function dotOf({ index, row, x, y }, xScale, yScale, xColumn, yColumn) {
  const dot = mark(shapeOf(row), xScale.at(x.value), yScale.at(y.value), {
    class: `dot ${colorOf(row)}`, tabindex: 0, role: "button", "aria-label": `${row.label}: ${tellOf(xColumn, x)}; ${tellOf(yColumn, y)}`,
  });
  const tell = () => {
    const box = dot.getBoundingClientRect();
    showTip([row.label, tellOf(yColumn, y), tellOf(xColumn, x)], box.right, box.bottom);
  };
  for (const event of ["pointerenter", "focus"]) dot.addEventListener(event, tell);
  for (const event of ["pointerleave", "blur"]) dot.addEventListener(event, hideTip);
  dot.addEventListener("click", () => showsCases(index) && openCases(index));
  dot.addEventListener("keydown", event => event.key === "Enter" && showsCases(index) && openCases(index));
  return dot;
}

// Names beside the points, each moved down while it would stand on another; those without room are left to the tip.
function namesOf(points, xScale, yScale, width) {
  const taken = points.map(point => ({ x: xScale.at(point.x.value) - 8, y: yScale.at(point.y.value) - 8, w: 16, h: 16 }));
  const hits = (a, b) => a.x < b.x + b.w && b.x < a.x + a.w && a.y < b.y + b.h && b.y < a.y + a.h;
  return points.flatMap(({ row, x, y }) => {
    const text = row.label.length > 34 ? `${row.label.slice(0, 33)}\u2026` : row.label, long = 6.9 * text.length;
    const [cx, cy] = [xScale.at(x.value), yScale.at(y.value)];
    const places = [[10, -10], [10, 20], [-10 - long, -10], [-10 - long, 20], [10, 36], [-10 - long, 36], [10, -26]];
    for (const [dx, dy] of places) {
      const box = { x: cx + dx, y: cy + dy - 12, w: long, h: 15 };
      const fits = box.x >= LEFT && box.x + box.w <= width - RIGHT && box.y >= TOP && box.y + box.h <= HEIGHT - BOTTOM + 2;
      if (!fits || taken.some(other => hits(box, other))) continue;
      taken.push(box);
      return [drawn("text", { class: `name ${colorOf(row)}`, x: box.x, y: box.y + 12, text })];
    }
    return [];
  });
}

// The points that no other point beats in one measure without losing in the other, from left to right.
function unbeaten(points, xColumn, yColumn) {
  const worth = (column, measure) => (column.better === "low" ? -measure.value : measure.value);
  const both = point => [worth(xColumn, point.x), worth(yColumn, point.y)];
  const beats = (a, b) => a[0] >= b[0] && a[1] >= b[1] && (a[0] > b[0] || a[1] > b[1]);
  return points.filter(point => !points.some(other => beats(both(other), both(point))))
    .sort((a, b) => a.x.value - b.x.value || a.y.value - b.y.value);
}
