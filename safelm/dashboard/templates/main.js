// Filters, protocols, files, and the order in which the page is drawn.
let redrawFrontier = () => {}, redrawCurves = () => {};

function drawAll() {
  drawMatrix();
  redrawFrontier();
  redrawCurves();
  byId("clear").disabled = !chosen.query && [chosen.stage, chosen.method, chosen.protocol].every(value => value === null);
}

function setUpFilters() {
  const choices = {
    stage: [...new Set(board.rows.map(row => row.stage))].map(stage => [stage, stageName(stage)]),
    method: methods.map(method => [method, methodName(method)]),
    protocol: board.protocols.map((_, index) => [index, protocolName(index)]),
  };
  for (const [name, found] of Object.entries(choices)) {
    const menu = byId(name);
    fillMenu(menu, [["", "all"], ...found.map(([, text], place) => [String(place), text])]);
    menu.closest(".field").hidden = found.length < 2;
    menu.addEventListener("change", () => {
      chosen[name] = menu.value === "" ? null : found[Number(menu.value)][0];
      drawAll();
    });
  }
  byId("query").addEventListener("input", event => { chosen.query = event.target.value; drawAll(); });
  byId("clear").addEventListener("click", () => {
    for (const name of Object.keys(choices)) [chosen[name], byId(name).value] = [null, ""];
    chosen.query = byId("query").value = "";
    drawAll();
    byId("query").focus();
  });
}

// For each tool a table of its protocols: settings in which they differ, then, folded, those they share.
function drawProtocols() {
  const tools = [...new Set(board.protocols.map(protocol => protocol.tool))];
  byId("protocols-tables").replaceChildren(...tools.flatMap(tool => {
    const protocols = board.protocols.filter(protocol => protocol.tool === tool);
    const names = [...new Set(protocols.flatMap(protocol => Object.keys(protocol.fields)))];
    const apart = names.filter(name => new Set(protocols.map(protocol => setting(protocol, name))).size > 1);
    const shared = names.filter(name => !apart.includes(name) && setting(protocols[0], name));
    const title = protocols.length > 1
      ? `${tool}: ${protocols.length} protocols, different in ${counted(apart.length, "setting")}` : `${tool}: one protocol`;
    const folded = element("details", { class: "columns" }, element("summary", { text: `${counted(shared.length, "setting")}${protocols.length > 1 ? " in common" : ""}` }),
      element("dl", {}, ...shared.flatMap(name => [element("dt", { text: name.replaceAll("_", " ") }), element("dd", { text: setting(protocols[0], name) })])));
    return [element("h3", { text: title }), tableOfProtocols(protocols, apart, title), ...(shared.length ? [folded] : [])];
  }));
  byId("protocols-note").textContent = board.protocols.length < 2
    ? "All numbers were measured under one protocol."
    : "Numbers of different protocols stand in columns of their own and are not compared.";
}

function setting(protocol, name) {
  const value = protocol.fields[name];
  return value === undefined ? "" : typeof value === "string" ? value : JSON.stringify(value);
}

function tableOfProtocols(protocols, names, title) {
  const head = element("tr", {}, element("th", { scope: "col", text: "protocol" }), ...names.map(name => element("th", { scope: "col", text: name.replaceAll("_", " ") })),
    element("th", { scope: "col", text: "rows" }));
  const rows = protocols.map(protocol => {
    const place = board.protocols.indexOf(protocol);
    const count = measureOf.filter(row => row.some(measure => board.columns[measure.column].protocol === place)).length;
    return element("tr", {}, element("th", { scope: "row", text: protocolName(place) }), ...names.map(name => {
      const text = setting(protocol, name);
      return element("td", { class: "words apart", title: text, text: text.length > 44 ? `${text.slice(0, 43)}\u2026` : text || "\u2013" });
    }), element("td", { text: String(count) }));
  });
  const table = element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title }, table);
}

function drawSources() {
  const table = document.querySelector("#sources table");
  table.tHead.replaceChildren(element("tr", {}, ...["file", "kind", "note"].map(text => element("th", { scope: "col", text }))));
  table.tBodies[0].replaceChildren(...board.sources.map(source => element("tr", {}, element("th", { scope: "row", text: source.path }),
    element("td", { class: "words", text: source.kind }), element("td", { class: "words", text: source.note }))));
}

function save() {
  const link = element("a", { href: URL.createObjectURL(new Blob([boardText], { type: "application/json" })), download: "dashboard.json" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function setUp() {
  byId("about").textContent = [counted(models.length, "model"), counted(board.rows.length, "row"), counted(board.curves.length, "training run"),
    counted(board.protocols.length, "protocol")].join(" \u00b7 ");
  const there = {
    filters: board.rows.length > 1, matrix: board.rows.length > 0, frontier: board.columns.length > 1 && board.rows.length > 1,
    training: setUpCurves(), cases: caseRuns.length > 0, protocols: board.protocols.length > 0, sources: true,
  };
  for (const [id, is] of Object.entries(there)) byId(id).hidden = !is;
  byId("parts").replaceChildren(...Object.keys(there).filter(id => there[id] && id !== "filters")
    .map(id => element("a", { href: `#${id}`, text: byId(`${id}-title`).textContent })));
  setUpFilters();
  drawColumns();
  if (there.cases) setUpCases();
  if (there.frontier) {
    setUpFrontier();
    redrawFrontier = plotIn(byId("frontier"), drawFrontier);
  }
  if (there.training) redrawCurves = plotIn(byId("training"), drawCurves);
  drawProtocols();
  drawSources();
  byId("save").addEventListener("click", save);
  drawAll();
}

setUp();
