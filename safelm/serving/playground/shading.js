// Which model's P(tag) shades a text. One for both sides, or the same text would look clean by a model that never saw
// the tag: its P(tag) means nothing.
import { score } from "./api.js";

export const EACH = "";  // each text by the model that wrote it

export const sawTag = model => model.safelm.saw_tag;

export function nameOf(model) {
  return sawTag(model) === false ? `${model.id} (never saw the tag)` : model.id;
}

// The models that may shade, best first: those that saw the tag, then those of which nothing is known.
export function shaders(models) {
  return [...models.filter(model => sawTag(model) === true), ...models.filter(model => sawTag(model) == null)];
}

// P(tag) after every token by `shader`, in a text that `writer` wrote; `before`: what stood in front of it, unseen.
export async function probabilities({ tokens, before, writer, shader, signal }) {
  if (writer.safelm.vocabulary === shader.safelm.vocabulary && !before) {
    const scored = await score(shader.id, tokens.map(token => token.id), signal);
    return scored.tokens.map(token => token.tag_prob);
  }
  const text = before + tokens.map(token => token.text).join("");
  return align(tokens, before.length, (await score(shader.id, text, signal)).tokens);
}

// Another vocabulary cuts the text elsewhere: a token gets the highest P(tag) of the cuts within it, or of the next one.
export function align(tokens, start, scored) {
  let end = 0;
  const cuts = scored.map(token => ({ end: end += token.text.length, p: token.tag_prob }));
  return tokens.map(token => {
    const from = start;
    start += token.text.length;
    const inside = cuts.filter(cut => cut.end > from && cut.end <= start).map(cut => cut.p);
    return inside.length ? Math.max(...inside) : cuts.find(cut => cut.end >= start)?.p ?? null;
  });
}
