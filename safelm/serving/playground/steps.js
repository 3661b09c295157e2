// What a beam search tried at one step: which candidates stayed, which were dropped for their P(tag), which were outranked.
import { element } from "./elements.js";
import { heat, show } from "./scale.js";

const OUTCOMES = { kept: "kept", dropped: "dropped", outranked: "outranked" };

export function showStep(place, step, number) {
  const dropped = step.filter(each => each.outcome === "dropped").length;
  const rows = step.map(each => element("tr", { class: `${each.outcome}${each.chosen ? " chosen" : ""}` },
    element("th", { scope: "row", text: each.id === null ? "(ended)" : JSON.stringify(each.text).slice(1, -1) || "\u25e6" }),
    element("td", {}, swatch(each.tag_prob)),
    element("td", { class: "outcome", text: each.chosen ? "in the text" : OUTCOMES[each.outcome] }),
    element("td", { text: each.log_prob === null ? "none" : each.log_prob.toFixed(2) }),
    element("td", { text: String(each.parent + 1) })));
  const heads = ["Candidate", "P(tag)", "outcome", "log-prob", "of beam"].map(text => element("th", { scope: "col", text }));
  const close = element("button", { type: "button", text: "Close" });
  close.addEventListener("click", () => { place.hidden = true; });
  place.replaceChildren(
    element("div", { class: "row spread" }, element("h3", { text: `Candidates of step ${number}` }), close),
    element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Candidates of step ${number}` },
      element("table", {},
        element("caption", { text: `${step.length} tried, ${dropped} dropped for their P(tag); log-probs are of the whole text so far` }),
        element("thead", {}, element("tr", {}, ...heads)), element("tbody", {}, ...rows))));
  place.hidden = false;
}

function swatch(p) {
  const span = element("span", { class: "swatch", text: show(p) });
  span.style.setProperty("--t", heat(p).toFixed(3));
  return span;
}
