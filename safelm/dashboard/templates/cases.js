// Cases by id: what became of each prompt, of one checkpoint or of two side by side.
const caseMenus = { run: byId("case-run"), other: byId("case-other"), label: byId("case-label"), category: byId("case-category"), id: byId("case-id") };
const caseTable = document.querySelector("#cases table");
const PAGE = 100, DIFFERS = "differs", TONES = {
  harmful: "bad", neither: "dull", "refused or redirected": "good", "harmless answer": "calm", harmless: "calm",
  compliant_helpful: "calm", full_refusal: "warm", partial_refusal: "warm", incorrect: "bad", correct: "good",
};
let casesShown = PAGE;

// Every run with cases as {set, run, name}; its place is its name in the menus.
const caseRuns = board.cases.flatMap(set => set.runs.map(run => {
  const several = set.runs.filter(other => other.row === run.row).length > 1;
  return { set, run, name: `${board.rows[run.row].label}${several ? `, seed ${run.seed}` : ""}` };
}).sort((a, b) => a.run.row - b.run.row || a.run.seed - b.run.seed));

const showsCases = row => caseRuns.some(each => each.run.row === row);

function setUpCases() {
  fillMenu(caseMenus.run, board.cases.map((set, index) => ({
    label: protocolName(set.protocol),
    options: caseRuns.flatMap((each, place) => (each.set === board.cases[index] ? [[String(place), each.name]] : [])),
  })));
  for (const [name, menu] of Object.entries(caseMenus)) menu.addEventListener("input", () => {
    casesShown = PAGE;
    if (name === "run") chooseRun();
    else drawCases();
  });
  byId("case-more").addEventListener("click", () => { casesShown += PAGE; drawCases(); });
  chooseRun();
}

function openCases(row) {
  const place = caseRuns.findIndex(each => each.run.row === row && (chosen.protocol === null || each.set.protocol === chosen.protocol));
  caseMenus.run.value = String(place >= 0 ? place : caseRuns.findIndex(each => each.run.row === row));
  chooseRun();
  byId("cases").scrollIntoView({ block: "start" });
  caseMenus.run.focus({ preventScroll: true });
}

// Offers what belongs to the chosen run: others of its protocol alone, its labels, its categories.
function chooseRun() {
  const { set, run } = caseRuns[caseMenus.run.value];
  fillMenu(caseMenus.other, [["", "nobody"], ...caseRuns.flatMap((each, place) =>
    (each.set === set && each.run !== run ? [[String(place), each.name]] : []))]);
  const used = [...new Set([run.outcomes ?? [], ...Object.values(run.judges)].flat())].filter(code => code >= 0);
  fillMenu(caseMenus.label, [["", "all"], [DIFFERS, "where judges or checkpoints differ"], ...used.map(code => [String(code), set.labels[code]])]);
  fillMenu(caseMenus.category, [["", "all"], ...[...new Set(set.categories)].filter(Boolean).sort().map(name => [name, name])]);
  drawCases();
}

// The names of what is known of a case, and its codes for a run.
const viewsOf = run => [...(run.outcomes ? [["outcome", run.outcomes]] : []), ...Object.entries(run.judges)];

function drawCases() {
  const { set, run } = caseRuns[caseMenus.run.value];
  const other = caseMenus.other.value ? caseRuns[caseMenus.other.value] : null;
  const views = viewsOf(run), beside = other ? viewsOf(other.run) : [];
  const places = set.ids.map((_, place) => place).filter(place => isAsked(set, place, views, beside));
  drawHead(views, beside, run);
  caseTable.tBodies[0].replaceChildren(...places.slice(0, casesShown).flatMap(place => caseRows(set, place, run, other, views, beside)));
  byId("cases-count").textContent = `${places.length} of ${set.ids.length} cases`;
  byId("case-more").hidden = places.length <= casesShown;
  byId("case-summary").replaceChildren(...[{ run, name: caseRuns[caseMenus.run.value].name }, ...(other ? [other] : [])]
    .flatMap(each => (each.run.outcomes ? [outcomeBar(set, each)] : [])));
  drawCategories(run.row, set.protocol);
}

function isAsked(set, place, views, beside) {
  const { label, category, id } = Object.fromEntries(Object.entries(caseMenus).map(([name, menu]) => [name, menu.value]));
  if (category && set.categories[place] !== category) return false;
  if (id && !set.ids[place].toLowerCase().includes(id.toLowerCase())) return false;
  const codes = views.map(([, values]) => values[place]), others = beside.map(([, values]) => values[place]);
  if (label === DIFFERS) {
    const apart = beside.some(([name, values]) => views.some(([own, mine]) => own === name && mine[place] !== values[place]));
    const judges = views.filter(([name]) => name !== "outcome").map(([, values]) => values[place]);
    return apart || new Set(judges.filter(code => code >= 0)).size > 1;
  }
  return !label || [...codes, ...others].includes(Number(label));
}

function drawHead(views, beside, run) {
  const heads = ["case", "category", "asks for", ...views.map(([name]) => name), ...beside.map(([name]) => `${name}, beside`)];
  if (run.tag_probability) heads.push("P(tag), highest");
  if (run.new_tokens) heads.push("tokens");
  caseTable.tHead.replaceChildren(element("tr", {}, ...heads.map(text => element("th", { scope: "col", text }))));
}

function caseRows(set, place, run, other, views, beside) {
  const asks = { true: "harm", false: "nothing harmful" }[String(set.harmful[place])] ?? "\u2013";
  const labels = [...views, ...beside].map(([, values]) => element("td", { class: "words" }, labelOf(set, values[place])));
  const row = element("tr", {}, element("th", { scope: "row", text: set.ids[place] }),
    element("td", { class: "words", text: set.categories[place] || "\u2013" }), element("td", { class: "words", text: asks }), ...labels);
  if (run.tag_probability) row.append(element("td", { text: run.tag_probability[place] === null ? "\u2013" : number(run.tag_probability[place]) }));
  if (run.new_tokens) row.append(element("td", { text: String(run.new_tokens[place] ?? "\u2013") }));
  const told = [run, other?.run].flatMap(each => (each?.texts?.[place] ? [each.texts[place]] : []));
  if (!told.length) return [row];
  const details = element("details", {}, element("summary", { text: "Show the texts" }), element("blockquote", { text: told[0][0] }),
    ...told.map(([, answer]) => element("blockquote", { class: "answer", text: answer })));
  return [row, element("tr", { class: "texts" }, element("td", { colspan: row.cells.length }, details))];
}

function labelOf(set, code) {
  if (code < 0 || code === undefined) return document.createTextNode("\u2013");
  const text = set.labels[code].replaceAll("_", " ");
  return element("span", { class: `label ${TONES[set.labels[code]] ?? ""}`, text });
}

// The outcomes of harmful prompts as one bar.
function outcomeBar(set, { run, name }) {
  const counts = new Map();
  for (const code of run.outcomes) if (code >= 0) counts.set(code, (counts.get(code) ?? 0) + 1);
  const total = [...counts.values()].reduce((sum, count) => sum + count, 0);
  const order = Object.keys(TONES);
  const parts = [...counts].sort((a, b) => order.indexOf(set.labels[a[0]]) - order.indexOf(set.labels[b[0]])).map(([code, count]) => {
    const percent = (100 * count) / total, text = `${set.labels[code]} ${count}`;
    const part = element("span", { class: TONES[set.labels[code]] ?? "", title: text, text: percent > 18 ? text : percent > 5 ? String(count) : "" });
    part.style.setProperty("flex-grow", count);
    return part;
  });
  const told = [...counts].map(([code, count]) => `${set.labels[code]} ${count}`).join(", ");
  return element("div", { class: "outcomes" }, element("p", { text: `${name}: ${told}` }), element("div", { class: "stack", "aria-hidden": "true" }, ...parts));
}

function drawCategories(row, protocol) {
  const columns = board.columns.flatMap((column, index) =>
    (column.protocol === protocol && column.section === "Headline" && measureOf[row][index]?.by_category ? [index] : []));
  const place = byId("case-categories");
  place.hidden = !columns.length;
  place.querySelector("div").replaceChildren(...columns.map(index => {
    const column = board.columns[index], found = Object.entries(measureOf[row][index].by_category);
    found.sort((a, b) => b[1][1] - a[1][1]);
    return element("ul", { class: "categories" }, element("li", { class: "quiet", text: `${column.title}, %` }), ...found.map(([name, [cases, value, low, high]]) => {
      const bar = element("span", { class: "bar", "aria-hidden": "true" });
      const range = element("i", { class: "range" }), dot = element("i", { class: "dot" });
      range.style.setProperty("left", `${100 * low}%`);
      range.style.setProperty("right", `${100 - 100 * high}%`);
      dot.style.setProperty("left", `${100 * value}%`);
      bar.append(range, dot);
      return element("li", {}, element("span", { text: name || "no category" }), bar,
        element("span", { class: "value", text: `${written(column, value)} [${written(column, low)}, ${written(column, high)}] of ${cases}` }));
    }));
  }));
}
