// Values over training: a run's own log, and evaluated checkpoints whose stages are numbers of tokens.
const curveMeasure = byId("curve-measure"), curveX = byId("curve-x");
const LOG = "log:", EVALUATED = "column:";

function setUpCurves() {
  const logged = [...new Set(board.curves.flatMap(run => Object.keys(run.values)))];
  const evaluated = board.columns.flatMap((column, index) =>
    (linesOfColumn(index, board.rows.map((_, row) => row)).length ? [[EVALUATED + index, columnName(column)]] : []));
  const first = name => (name === "loss" ? 0 : name.startsWith("eval_loss/") ? 2 : name.includes("/") && !name.startsWith("time/") ? 1 : 3);
  logged.sort((a, b) => first(a) - first(b) || a.localeCompare(b));
  const groups = [];
  if (evaluated.length) groups.push({ label: "Evaluated checkpoints", options: evaluated });
  if (logged.length) groups.push({ label: "Training log", options: logged.map(name => [LOG + name, name]) });
  fillMenu(curveMeasure, groups);
  if (logged.includes("loss") && !evaluated.length) curveMeasure.value = `${LOG}loss`;
  if (board.curves.some(run => run.tokens_per_step === null) && !evaluated.length) curveX.value = "steps";
  for (const menu of [curveMeasure, curveX]) menu.addEventListener("change", () => redrawCurves());
  for (const choice of document.querySelectorAll("[name=curve-scale]")) choice.addEventListener("change", () => redrawCurves());
  return groups.length > 0;
}

// Lines of {name, color, points: [{x, y, low, high}]}.
function linesOfColumn(index, rows) {
  const found = new Map();
  for (const place of rows) {
    const row = board.rows[place], measure = measureOf[place][index];
    if (!measure || row.tokens === null) continue;
    const name = [row.model, row.method].filter(Boolean).join(" + ");
    const line = found.get(name) ?? { name, color: colorOf(row), points: [] };
    line.points.push({ x: row.tokens, y: measure.value, low: measure.low, high: measure.high });
    found.set(name, line);
  }
  for (const line of found.values()) line.points.sort((a, b) => a.x - b.x);
  return [...found.values()].filter(line => line.points.length > 1);
}

function linesOfLog(name) {
  const words = chosen.query.toLowerCase().split(/\s+/).filter(Boolean);
  return board.curves.flatMap((run, index) => {
    const values = run.values[name], each = curveX.value === "tokens" ? run.tokens_per_step : 1;
    if (!values || each === null || !words.every(word => run.name.toLowerCase().includes(word))) return [];
    const known = models.indexOf(run.name.split("/").at(-1));
    const color = `c${(known >= 0 ? known : index) % COLORS}`;
    return [{ name: run.name, color, points: values.steps.map((step, place) => ({ x: step * each, y: values.values[place] })) }];
  });
}

function drawCurves(width) {
  const isLog = curveMeasure.value.startsWith(LOG), name = curveMeasure.value.replace(/^\w+:/, "");
  const column = isLog ? { title: name, percent: false, better: "" } : board.columns[name];
  curveX.disabled = !isLog;
  if (!isLog) curveX.value = "tokens";
  const lines = isLog ? linesOfLog(name) : linesOfColumn(Number(name), chosenRows());
  const log = document.querySelector("[name=curve-scale]:checked").value === "log";
  const all = lines.flatMap(line => line.points);
  const x = scaleOf([...all.map(point => point.x), 0], LEFT, width - RIGHT);
  const y = scaleOf(all.flatMap(point => [point.y, point.low ?? NaN, point.high ?? NaN]), HEIGHT - BOTTOM, TOP + 8, { log, share: column.percent && !log });
  const tick = value => (column.percent ? String(Number((100 * value).toFixed(1))) : number(value));
  const told = value => written(column, value) + (column.percent ? "%" : "");
  const parts = frame(width, { ...x, ticks: x.ticks.filter(tick => tick >= 0) }, y,
    { xTick: amount, yTick: tick, xName: curveX.value, yName: `${column.title}${column.percent ? ", %" : ""} ${arrowOf(column)}` });
  const usable = line => line.points.filter(point => !log || point.y > 0);
  lines.forEach((line, index) => parts.push(...lineParts({ ...line, points: usable(line) }, x, y, index, log)));
  const dots = drawn("g", {});
  parts.push(dots, hoverArea(width, lines, x, y, dots, told));
  byId("curve-keys").replaceChildren(...lines.map((line, index) => element("li", { class: `${line.color} dash${index % 3}` },
    element("i", {}), document.createTextNode(`${line.name}: ${told(line.points.at(-1).y)} at the end`))));
  const description = lines.map(line => `${line.name} from ${told(line.points[0].y)} to ${told(line.points.at(-1).y)}`);
  return { parts, description: `${column.title} over ${curveX.value}. ${description.join(". ") || "No line passes the filters."}` };
}

function lineParts(line, x, y, index, log) {
  const at = point => `${x.at(point.x).toFixed(1)},${y.at(point.y).toFixed(1)}`;
  const parts = [];
  const banded = line.points.filter(point => point.low !== null && point.low !== undefined && (!log || point.low > 0));
  if (banded.length > 1) {
    const upper = banded.map(point => at({ x: point.x, y: point.high })), lower = banded.map(point => at({ x: point.x, y: point.low }));
    parts.push(drawn("polygon", { class: `band ${line.color}`, points: [...upper, ...lower.reverse()].join(" ") }));
  }
  parts.push(drawn("polyline", { class: `line ${line.color} dash${index % 3}`, points: line.points.map(at).join(" ") }));
  if (line.points.length <= 30) for (const point of line.points)
    parts.push(drawn("circle", { class: `dot small ${line.color}`, cx: x.at(point.x), cy: y.at(point.y), r: 3.5 }));
  return parts;
}

// The whole plot answers to the pointer: each line's point nearest to it in training.
function hoverArea(width, lines, x, y, dots, told) {
  const area = drawn("rect", { class: "area", x: LEFT, y: TOP, width: width - LEFT - RIGHT, height: HEIGHT - TOP - BOTTOM });
  area.addEventListener("pointermove", event => {
    const matrix = area.ownerSVGElement.getScreenCTM();
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse()).x;
    const nearest = lines.map(line => ({ line, point: line.points.reduce((best, point) =>
      (Math.abs(x.at(point.x) - at) < Math.abs(x.at(best.x) - at) ? point : best)) }));
    dots.replaceChildren(...nearest.map(({ line, point }) =>
      drawn("circle", { class: `dot ${line.color}`, cx: x.at(point.x), cy: y.at(point.y), r: 5 })));
    showTip(nearest.flatMap(({ line, point }, index) => [...(index ? [] : [`${amount(point.x)} ${curveX.value}`]), `${line.name}: ${told(point.y)}`]),
      event.clientX, event.clientY);
  });
  area.addEventListener("pointerleave", () => { dots.replaceChildren(); hideTip(); });
  return area;
}
