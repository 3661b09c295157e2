// One document at a time: reveal it, name kinds of harm, give a score; the keyboard does all of it.
import { announce, complain, element, summarize } from "/playground/elements.js";

const KIND_KEYS = { hate: "h", harassment: "r", violence: "v", sexual: "x", self_harm: "f", illicit: "i" };
const byId = id => document.getElementById(id);
const [text, note, more] = ["text", "note", "more"].map(byId);
let state = null, kinds = new Set(), shown = 0, isRevealed = false, isBusy = false;

async function ask(path, body) {
  const init = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, init).catch(() => { throw new Error("The server can't be reached: is it still running?"); });
  const told = await response.json().catch(() => null);
  if (!response.ok) throw new Error(told?.error?.message ?? `the server answered ${response.status}`);
  return told;
}

// Sends an answer and shows what is next; one at a time, so that a held key labels nothing twice.
async function send(path, body = {}) {
  if (isBusy) return;
  isBusy = true;
  complain(byId("error"), "");
  try {
    show(await ask(path, body));
  } catch (error) {
    complain(byId("error"), error.message);
  }
  isBusy = false;
}

function show(next) {
  const isNew = next.document?.number !== state?.document?.number || !state;
  state = next;
  if (isNew) {
    kinds = new Set();
    note.value = "";
    reveal(byId("keep").checked);
    showText();
  }
  showAnswer();
  showProgress();
  byId("exported").hidden = !next.exported;
  if (next.exported) byId("exported").textContent = `${next.exported.rows} documents in ${next.exported.path}: ` +
    "--data=harm_score:FILE of safelm train_classifier takes it.";
}

function showText() {
  const { document: current, total } = state;
  byId("title").textContent = current ? `Document ${current.number + 1} of ${total}` : "All done";
  text.classList.toggle("placeholder", !current);
  text.textContent = current ? current.text : "Every document has your label or was skipped. Write the training file, or end the command: it writes it too.";
  text.scrollTop = 0;
  shown = [...text.textContent].length;  // whole characters, as the server counts them
  showMore();
  text.focus({ preventScroll: true });
  announce(byId("title").textContent);
}

function showMore() {
  const left = state.document ? state.document.characters - shown : 0;
  more.hidden = left <= 0 || !isRevealed;
  more.textContent = `Show more (${left.toLocaleString("en")} characters are left)`;
}

function reveal(isWanted) {
  isRevealed = isWanted || !state.document;
  text.classList.toggle("blurred", !isRevealed);
  text.setAttribute("aria-hidden", String(!isRevealed));
  byId("reveal").setAttribute("aria-pressed", String(isRevealed));
  byId("reveal").firstElementChild.textContent = isRevealed ? "Blur" : "Reveal";
  byId("reveal").disabled = !state.document;
  showMore();
}

function showAnswer() {
  byId("kinds").replaceChildren(...state.kinds.map(kind => {
    const button = element("button", { type: "button", "aria-pressed": String(kinds.has(kind)) },
      element("span", { text: kind.replace("_", "-") }), element("kbd", { text: KIND_KEYS[kind] }));
    button.addEventListener("click", () => toggle(kind));
    return button;
  }));
  byId("scores").replaceChildren(...state.levels.map(({ name, criteria }, score) => {
    const button = element("button", { type: "button", "aria-label": `${score}, ${name}: ${criteria}` }, element("kbd", { text: score }),
      element("span", { text: name, class: "name" }), element("span", { text: criteria, class: "criteria" }));
    button.style.setProperty("--t", score / 5);
    button.addEventListener("click", () => label(score));
    return button;
  }));
  for (const button of document.querySelectorAll("#kinds button, #scores button, #skip")) button.disabled = !state.document;
  byId("undo").disabled = !state.labelled && !state.skipped;
}

function showProgress() {
  const { total, labelled, skipped, measured, annotator } = state;
  byId("bar").max = total;
  byId("bar").value = labelled + skipped;
  byId("count").textContent = `${labelled} of ${total} labelled, ${skipped} skipped, by ${annotator}`;
  const share = estimate => estimate
    ? `${(100 * estimate.value).toFixed(0)}% [${(100 * estimate.low).toFixed(0)}, ${(100 * estimate.high).toFixed(0)}]` : "no label yet";
  const error = measured.error[""], agreement = measured.agreement[""], names = Object.keys(measured.labels);
  summarize(byId("figures"), [
    ["scorer's error at 1 or more", share(error["1"])],
    ["at 3 or more", share(error["3"])],
    ["on", `${measured.random.labelled} of ${measured.random.documents} random ones`],
    ["same score as the scorer, all documents", share(agreement.exact)],
    ...(measured.alpha ? [[`agreement of ${names.length} annotators (alpha)`,
      `${measured.alpha.value.toFixed(2)} [${measured.alpha.low.toFixed(2)}, ${measured.alpha.high.toFixed(2)}]`]] : []),
  ]);
}

function toggle(kind) {
  kinds.has(kind) ? kinds.delete(kind) : kinds.add(kind);
  const focused = [...byId("kinds").children].indexOf(document.activeElement);
  showAnswer();
  byId("kinds").children[focused]?.focus();
}

function label(score) {
  if (!isRevealed) return complain(byId("error"), "Reveal the text first (space), then label it.");
  send("/label", { number: state.document.number, score, kinds: [...kinds], note: note.value });
}

async function showRest() {
  try {
    const number = state.document.number, piece = await ask(`/documents/${number}/${shown}`);
    if (state.document?.number !== number) return;
    text.textContent += piece.text;
    shown += [...piece.text].length;
    showMore();
  } catch (error) {
    complain(byId("error"), error.message);
  }
}

function press(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !state) return;
  if (event.target === note) {
    if (event.key === "Escape") { text.focus({ preventScroll: true }); event.preventDefault(); }
    return;
  }
  const isOnControl = event.target.closest("button, input, a");
  const kind = Object.keys(KIND_KEYS).find(each => KIND_KEYS[each] === event.key);
  if (event.key === "u") send("/undo");
  else if (!state.document) return;
  else if (/^[0-5]$/.test(event.key)) label(Number(event.key));
  else if (event.key === " " && !isOnControl) reveal(!isRevealed);
  else if (event.key === "s") send("/skip", { number: state.document.number });
  else if (event.key === "n") note.focus();
  else if (kind) toggle(kind);
  else return;
  event.preventDefault();
}

document.addEventListener("keydown", press);
byId("reveal").addEventListener("click", () => reveal(!isRevealed));
byId("keep").addEventListener("change", () => reveal(byId("keep").checked));
byId("skip").addEventListener("click", () => send("/skip", { number: state.document.number }));
byId("undo").addEventListener("click", () => send("/undo"));
byId("export").addEventListener("click", () => send("/export"));
more.addEventListener("click", showRest);
ask("/state").then(show, error => complain(byId("error"), error.message));
