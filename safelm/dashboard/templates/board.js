// The board's numbers, what is chosen of them, and how numbers are written.
const boardText = document.getElementById("board").textContent;
const board = JSON.parse(boardText);
const byId = id => document.getElementById(id);

// measureOf[row][column] is a measure, or undefined.
const measureOf = board.rows.map(() => []);
for (const measure of board.measures) measureOf[measure.row][measure.column] = measure;

const models = [...new Set(board.rows.map(row => row.model))];
const methods = [...new Set(board.rows.map(row => row.method))].sort((a, b) => (b === "greedy") - (a === "greedy"));
const COLORS = 8;
const colorOf = row => `c${models.indexOf(row.model) % COLORS}`;

const chosen = {
  query: "", stage: null, method: null, protocol: null,
  columns: new Set(board.columns.flatMap((column, index) => (column.shown ? [index] : []))),
  sort: null, up: true,
};

// Rows that pass the filters, in the board's order.
function chosenRows() {
  const words = chosen.query.toLowerCase().split(/\s+/).filter(Boolean);
  return board.rows.flatMap((row, index) => {
    const fits = words.every(word => row.label.toLowerCase().includes(word))
      && (chosen.stage === null || row.stage === chosen.stage)
      && (chosen.method === null || row.method === chosen.method)
      && (chosen.protocol === null || measureOf[index].some(measure => isChosen(board.columns[measure.column])));
    return fits ? [index] : [];
  });
}

const isChosen = column => chosen.protocol === null || column.protocol === chosen.protocol;

const stageName = stage => stage || "no stage";
const methodName = method => method || "without decoding";
const protocolName = index => `${board.protocols[index].letter} \u00b7 ${board.protocols[index].name}`;
const columnName = column => `${column.title} (${board.protocols[column.protocol].letter})`;
const arrowOf = column => ({ low: "\u2193", high: "\u2191" })[column.better] ?? "";

function written(column, value) {
  if (value === null || value === undefined) return "\u2013";
  return column.percent ? (100 * value).toFixed(1) : number(value);
}

function number(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(1);
  return value.toFixed(Math.max(0, Math.min(4, 2 - Math.floor(Math.log10(size)))));
}

function amount(value) {
  for (const [unit, size] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["K", 1e3]])
    if (value >= size) return `${Number((value / size).toPrecision(3))}${unit}`;
  return String(Math.round(value));
}

const intervalOf = (column, measure) => (measure.low === null || measure.high === null
  ? "" : `${written(column, measure.low)}\u2013${written(column, measure.high)}`);

function tellOf(column, measure) {
  const parts = [`${columnName(column)}: ${written(column, measure.value)}${column.percent ? "%" : ""}`];
  if (intervalOf(column, measure)) parts.push(`95% ${intervalOf(column, measure)}`);
  if (measure.cases) parts.push(`${measure.cases} cases`);
  const seeds = Object.entries(measure.by_seed ?? {});
  if (seeds.length) parts.push(`seeds ${seeds.map(([seed, value]) => `${seed}: ${written(column, value)}`).join(", ")}`);
  return parts.join(" \u00b7 ");
}

const counted = (number, name) => `${number} ${name}${number === 1 ? "" : "s"}`;

// Options of a menu from [value, text] pairs, or from {label, options} groups of them.
function fillMenu(menu, entries) {
  const before = menu.value;
  const made = ([value, text]) => element("option", { value, text });
  menu.replaceChildren(...entries.map(each => (Array.isArray(each)
    ? made(each) : element("optgroup", { label: each.label }, ...each.options.map(made)))));
  if ([...menu.options].some(option => option.value === before)) menu.value = before;
}

// Columns as groups for a menu, by protocol.
function columnGroups(fits) {
  return board.protocols.flatMap((protocol, index) => {
    const options = board.columns.flatMap((column, place) =>
      (column.protocol === index && fits(place) ? [[String(place), column.title]] : []));
    return options.length ? [{ label: protocolName(index), options }] : [];
  });
}
