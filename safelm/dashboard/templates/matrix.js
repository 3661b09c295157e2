// The matrix: a row a checkpoint, a column a measure under one protocol.
const matrixHead = document.querySelector("#matrix thead"), matrixBody = document.querySelector("#matrix tbody");

function drawMatrix() {
  const rows = sorted(chosenRows());
  const columns = board.columns.map((_, index) => index)
    .filter(index => chosen.columns.has(index) && isChosen(board.columns[index]) && rows.some(row => measureOf[row][index]));
  matrixHead.replaceChildren(element("tr", {}, headCell("name", "Model", ""), ...columns.map(index => {
    const column = board.columns[index], protocol = board.protocols[column.protocol];
    return headCell(index, column.title, `${arrowOf(column)} ${protocol.letter} \u00b7 ${protocol.name}${column.percent ? ", %" : ""}`);
  })));
  const ranges = new Map(columns.map(index => [index, rangeOf(index)]));
  matrixBody.replaceChildren(...rows.map(index => {
    const row = board.rows[index];
    const name = element("th", { scope: "row" }, nameButton(index),
      element("small", { text: [row.stage, row.method].filter(Boolean).join(" \u00b7 ") || "no decoding" }));
    return element("tr", {}, name, ...columns.map(column => cellOf(index, column, ranges.get(column))));
  }));
  byId("matrix-count").textContent = `${rows.length} of ${board.rows.length} rows, ${columns.length} of ${board.columns.length} columns`;
  byId("matrix").classList.toggle("nothing", !rows.length || !columns.length);
}

function headCell(key, title, under) {
  const direction = chosen.sort === key ? (chosen.up ? "ascending" : "descending") : undefined;
  const button = element("button", { type: "button", text: title });
  button.addEventListener("click", () => {
    [chosen.up, chosen.sort] = [chosen.sort === key ? !chosen.up : true, key];
    drawMatrix();
    const text = `sorted by ${title}, ${chosen.up ? "ascending" : "descending"}`;
    announce(text);
    matrixHead.querySelector(`[data-key="${key}"] button`).focus();
  });
  return element("th", { scope: "col", "aria-sort": direction, "data-key": key }, button, element("small", { text: under }));
}

function nameButton(index) {
  const button = element("button", { type: "button", class: `name ${colorOf(board.rows[index])}`, text: board.rows[index].model });
  if (!showsCases(index)) button.disabled = true;
  button.addEventListener("click", () => openCases(index));
  return button;
}

function cellOf(row, index, [low, high]) {
  const measure = measureOf[row][index], column = board.columns[index];
  if (!measure) return element("td", { class: "none", text: "\u2013" });
  const several = Object.keys(measure.by_seed ?? {}).length;
  const note = intervalOf(column, measure) || (several ? `mean of ${several}` : "");
  const cell = element("td", { title: tellOf(column, measure) },
    element("b", { text: written(column, measure.value) }), element("small", { text: note }));
  const place = value => `${(100 * (value - low)) / (high - low || 1)}%`;
  const bar = element("span", { class: "bar", "aria-hidden": "true" });
  if (intervalOf(column, measure)) {
    const range = element("i", { class: "range" });
    range.style.setProperty("left", place(measure.low));
    range.style.setProperty("right", `calc(100% - ${place(measure.high)})`);
    bar.append(range);
  }
  const dot = element("i", { class: "dot" });
  dot.style.setProperty("left", place(measure.value));
  bar.append(dot);
  cell.append(bar);
  if (column.percent && column.better === "low") {
    cell.className = "shaded";
    cell.style.setProperty("--t", measure.value);
  }
  return cell;
}

// What a column's bars span: 0 to 1 of shares and areas, else all its values and intervals.
function rangeOf(index) {
  const values = measureOf.flatMap(row => (row[index] ? [row[index].value, row[index].low, row[index].high] : []));
  const found = values.filter(value => value !== null);
  if (found.every(value => value >= 0 && value <= 1)) return [0, 1];
  return [Math.min(...found), Math.max(...found)];
}

function sorted(rows) {
  if (chosen.sort === null) return rows;
  const sign = chosen.up ? 1 : -1;
  const value = row => (chosen.sort === "name" ? board.rows[row].label : measureOf[row][chosen.sort]?.value);
  return [...rows].sort((a, b) => {
    const [first, second] = [value(a), value(b)];
    if (first === undefined || second === undefined) return (first === undefined) - (second === undefined);
    return sign * (typeof first === "string" ? first.localeCompare(second) : first - second);
  });
}

// Check boxes for all columns, by protocol and section.
function drawColumns() {
  const groups = new Map();
  board.columns.forEach((column, index) => {
    const key = `${protocolName(column.protocol)}: ${column.section}`;
    groups.set(key, [...(groups.get(key) ?? []), index]);
  });
  byId("columns").replaceChildren(...[...groups].map(([name, indices]) =>
    element("fieldset", {}, element("legend", { text: name }), ...indices.map(index => {
      const box = element("input", { type: "checkbox", value: String(index) });
      box.checked = chosen.columns.has(index);
      box.addEventListener("change", () => {
        if (box.checked) chosen.columns.add(index);
        else chosen.columns.delete(index);
        drawMatrix();
      });
      const column = board.columns[index];
      return element("label", {}, box, document.createTextNode(` ${column.title} ${arrowOf(column)}`));
    }))));
}
