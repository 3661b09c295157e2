"""Is there a rule of dropping that keeps SafeBeam's safety and loses neither sense nor answers to safe prompts?

    python scripts/studies/safe_beam_rules.py --models=W/safety0,W/safety1,W/safety2 --prompts=development --journals=J
    python scripts/studies/safe_beam_rules.py --models=W/safety0,W/safety1,W/safety2 --prompts=W/corpus/prompts \
        --journals=J --rules=greedy,SafeBeam,NAME --output=docs/results/data/safe_beam_rules.json

Decodes prompts of the synthetic web with models that differ in their seed, judges the answers by the generator's word
lists and prints a line for every rule: means over the models with intervals over prompts' categories, and every model's
own figure. Rules are chosen on `development`: 120 harmful and 120 safe prompts whose phrasings are in no document and
whose topics are in documents, so none of them is a topic of the corpus's own prompts, on which the one chosen is then
confirmed. A stopped run continues: answers are kept in --journals as token ids.

Rules, beside SafeBeam's own with `drop_above` and `anchor`:
- all above: up to 14 of 16 candidates are dropped, all whose P(tag) exceeds a value.
- penalty, rise penalty: nothing is dropped; nats are taken off by P(tag), or by what it has beyond the parent's.
- beyond parent, budget: dropped is only what has more P(tag) than its parent, or once the sum of such rises is spent.
- smooth: half of a candidate's level is its parent's.
- by class: behind a token within a word, where no tag stands in training, candidates are judged apart from those that
  end one: ranked among themselves, or P(tag) counts 20 or 100 times (how far the means of the two classes lie apart,
  `measure_tag_positions.py`), or the level of the last word's end goes on standing.
- checked: the greedy answer, unless P(tag) exceeds a value somewhere along it: then another rule's, from the prompt on.
- turned: the greedy answer, unless P(tag) exceeds a value: then from that sentence's beginning on a sentence that turns
  away, and what follows greedily. The judge knows that sentence, so this says little beyond how often it turns.
"""

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from safe_beam_search import begin, search_step

from safelm import cli
from safelm.evaluate.answers import Checkpoint
from safelm.evaluate.judges import word_lists
from safelm.evaluate.suites.suite import Prompt, choose, hash_prompts, read_prompts
from safelm.evaluate.template import answer_tokens
from safelm.formats.sources import read_model
from safelm.inference import SafeBeam
from safelm.inference import asked as asked_lib
from safelm.inference.prompts import SMALLEST_BUCKET, bucket
from safelm.inference.weights import prepare
from safelm.io import records
from safelm.io.files import write_whole
from safelm.stats.comparison import clustered_rate
from safelm.synthetic_web.prompts import write_prompts
from safelm.text.prompting import text_prompt

DEVELOPMENT, DEVELOPMENT_SEED, PROMPTS = "development", 1, 120
NEW_TOKENS = 48
TURN = " Let us stop and think about it instead."  # of the corpus, which goes on with the reasons
ROWS = 24  # prompts decoded at once, of like lengths


@dataclasses.dataclass(frozen=True)
class Search:
    """SafeBeam whose beams are compared by log-prob - anchor * log-prob of the likeliest token, less a penalty.

    Without dropping and penalty it is beam search with anchor 0 and greedy decoding with anchor 1. A candidate's level
    is P(tag), or `smooth` of its parent's level and the rest of P(tag); its rise is what it has beyond its parent's
    level, or beyond `drop_above` where that is more, summed over the answer.

    Attributes:
      budget: nothing is dropped while the sum of rises is no more; below 0: whatever it is.
      beyond: nothing is dropped whose own rise is no more; below 0: whatever it is.
      penalty: nats taken off by 1 of the level, of every token's.
      rise_penalty: nats taken off by 1 of rise.
      within: how often P(tag) within a word counts.
      is_carried: within a word the level is the parent's.
      by_class: candidates within a word and those that end one are dropped from pools of their own.
      beams: how many, with as many candidates each.
    """

    drop_fraction: float = 0.5
    drop_above: float = 0.0
    anchor: float = 0.0
    budget: float = -1.0
    beyond: float = -1.0
    penalty: float = 0.0
    rise_penalty: float = 0.0
    smooth: float = 0.0
    within: float = 1.0
    is_carried: bool = False
    by_class: bool = False
    beams: int = 4

    @property
    def method(self) -> SafeBeam:
        return SafeBeam(self.beams, self.beams, self.drop_fraction, drop_above=self.drop_above)

    @property
    def keeps_to_greedy(self) -> bool:
        """Whether the answer is the greedy text unless that is dropped: only with a level above `drop_above`."""
        return self.anchor == 1 and not self.penalty and not self.rise_penalty

    @property
    def settings(self) -> Float[Array, " settings"]:
        """What a compiled step takes."""
        return jnp.array(dataclasses.astuple(self)[1:-1], jnp.float32)


@dataclasses.dataclass(frozen=True)
class Checked:
    """The greedy answer unless its highest P(tag) exceeds `above`, else that of the rule called `other`."""

    other: str
    above: float


@dataclasses.dataclass(frozen=True)
class Turned:
    """The greedy answer up to where P(tag) exceeds `above`; from the sentence's beginning on `words`, then greedily."""

    above: float
    words: str = TURN


MOST = 0.9  # the share that may be dropped where everything above a P(tag) is to go: 14 of 16 candidates
SEARCHES = {
    "greedy": Search(drop_fraction=0, beams=1),
    "beam search": Search(drop_fraction=0),
    "SafeBeam": Search(),
    **{f"drop_above {above}": Search(drop_above=above) for above in (0.001, 0.005)},
    **{f"anchored: drop_above {above}": Search(drop_above=above, anchor=1) for above in (0.001, 0.002, 0.005, 0.01)},
    **{f"anchored: all above {above}": Search(MOST, above, anchor=1) for above in (0.002, 0.005, 0.02)},
    "anchored 1/2: drop_above 0.005": Search(drop_above=0.005, anchor=0.5),
    **{f"penalty {nats}": Search(0, penalty=nats) for nats in (10, 30, 100, 300)},
    **{f"anchored: penalty {nats}": Search(0, anchor=1, penalty=nats) for nats in (10, 30, 100, 300)},
    **{f"anchored: rise penalty {nats}": Search(0, anchor=1, rise_penalty=nats) for nats in (30, 100, 300)},
    **{f"anchored: budget {b}": Search(MOST, 0.001, anchor=1, budget=b) for b in (0.005, 0.02, 0.05)},
    **{f"anchored: beyond parent from {a}": Search(MOST, a, anchor=1, beyond=0) for a in (0.001, 0.005)},
    **{f"anchored: smooth from {a}": Search(0.5, a, anchor=1, smooth=0.5) for a in (0.002, 0.005)},
    **{f"by class: drop_above {above}": Search(drop_above=above, by_class=True) for above in (0, 0.001)},
    **{f"anchored by class: all above {a}": Search(MOST, a, anchor=1, by_class=True) for a in (0.002, 0.005, 0.01)},
    **{f"anchored within x{n}: all above 0.005": Search(MOST, 0.005, anchor=1, within=n) for n in (20, 100)},
    **{f"anchored carried: all above {a}": Search(MOST, a, anchor=1, is_carried=True) for a in (0.002, 0.005)},
    "anchored carried: penalty 300": Search(0, anchor=1, penalty=300, is_carried=True),
}
RULES: dict[str, Search | Checked | Turned] = {
    **SEARCHES,
    **{
        f"checked at {above} then {other}": Checked(other, above)
        for other in ("SafeBeam", "drop_above 0.001", "drop_above 0.005", "beam search")
        for above in (0.002, 0.005, 0.01, 0.02, 0.04)
    },
    **{f"turned at {above}": Turned(above) for above in (0.01, 0.02, 0.04, 0.08)},
}


@dataclasses.dataclass(frozen=True)
class Judged:
    """An answer's label and its highest P(tag)."""

    label: str
    highest: float


def gap_tokens(model: Checkpoint) -> Bool[np.ndarray, " V"]:
    """Which tokens say that a word has ended: whitespace, the tag and the document's end."""
    tokenizer = model.tokenizer
    gaps = [token for token in range(tokenizer.vocab_size) if tokenizer.token_bytes(token)[:1].isspace()]
    ids = [*gaps, tokenizer.harm_tag_id, tokenizer.eos_id]
    return np.isin(np.arange(model.config.padded_vocab_size), ids)


def decode(model: Checkpoint, ids: Sequence[Sequence[int]], rule: Search) -> list[tuple[list[int], list[float]]]:
    """The new tokens of every prompt and P(tag) along them.

    A rule that keeps to the greedy text is searched with only where that text's level passes `drop_above`.
    """
    if not rule.keeps_to_greedy:
        return [found[:2] for found in search(model, ids, rule)]
    greedy = search(model, ids, dataclasses.replace(rule, drop_fraction=0, beams=1))
    found = [each[:2] for each in greedy]
    passing = [place for place, (*_, highest) in enumerate(greedy) if highest > rule.drop_above]
    searched = search(model, [ids[place] for place in passing], rule)
    for place, (tokens, levels, _) in zip(passing, searched, strict=True):
        found[place] = tokens, levels
    return found


def search(model: Checkpoint, ids: Sequence[Sequence[int]], rule: Search) -> list[tuple[list[int], list[float], float]]:
    """The new tokens of every prompt, P(tag) along them and the best beam's highest level."""
    method, tokenizer, weights = rule.method, model.tokenizer, prepare(model.config, model.params)
    is_gap_V = gap_tokens(model)
    found: dict[int, tuple[list[int], list[float], float]] = {}
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    for start in range(0, len(ids), ROWS):
        places = order[start : start + ROWS]
        batch = [ids[place] for place in places]
        width = bucket(len(batch[-1]), SMALLEST_BUCKET, model.config.max_seq_len - NEW_TOKENS)
        rows = [(len(tokens), NEW_TOKENS, tokenizer.conventions.end_ids, method, 0) for tokens in batch]
        rows += [None] * (ROWS - len(batch))
        pool = method.num_beams * method.num_candidates
        asked = asked_lib.ask(rows, harm_tag_id=tokenizer.harm_tag_id, max_pool=pool)
        tokens_PT = np.zeros((ROWS, width), np.int32)
        for row, tokens in enumerate(batch):
            tokens_PT[row, : len(tokens)] = tokens
        state, cache = begin(
            model.config, method.num_beams, method.num_candidates, NEW_TOKENS, weights, asked, tokens_PT
        )
        levels_PW = jnp.exp(state.tag_log_prob_PW)
        carried = jnp.stack([levels_PW, jnp.zeros_like(levels_PW)], axis=-1)
        highest_P = jnp.zeros(ROWS)
        for _ in range(NEW_TOKENS):
            state, carried, cache = search_step(
                model.config, method.num_beams, weights, rule.settings, state, carried, cache, is_gap_V
            )
            highest_P = jnp.maximum(highest_P, carried[:, 0, 0])
            if not np.asarray(state.is_running_PW).any():
                break
        new_PT, tags_PT, counts_P, *_ = (np.asarray(each) for each in state.outcome())
        for row, place in enumerate(places):
            count = counts_P[row]
            levels = np.exp(tags_PT[row, :count]).tolist()
            found[place] = (new_PT[row, :count].tolist(), levels, float(highest_P[row]))
    return [found[place] for place in range(len(ids))]


def turn(
    model: Checkpoint, ids: Sequence[Sequence[int]], greedy: Sequence[tuple[list[int], list[float]]], rule: Turned
) -> list[tuple[list[int], list[float]]]:
    """The greedy answers, those turned whose P(tag) passes the rule's."""
    tokenizer, words = model.tokenizer, model.tokenizer.encode(rule.words)
    starts, places = [], []
    for place, (tokens, levels) in enumerate(greedy):
        at = next((n for n, level in enumerate(levels) if level > rule.above), None)
        if at is not None:
            said = tokenizer.decode(tokens[:at])
            starts.append(tokenizer.encode(said[: max(said.rfind(end) + 1 for end in (".", "!", "?"))]))
            places.append(place)
    turned = [[*ids[place], *start, *words] for place, start in zip(places, starts, strict=True)]
    found = list(greedy)
    rest = decode(model, turned, SEARCHES["greedy"]) if turned else []
    for place, start, (tokens, levels) in zip(places, starts, rest, strict=True):
        whole = [*start, *words, *tokens][:NEW_TOKENS]
        found[place] = (whole, ([0.0] * (len(start) + len(words)) + levels)[:NEW_TOKENS])
    return found


def answer(model: Checkpoint, prompts: Sequence[Prompt], name: str, journals: pathlib.Path) -> list[Judged]:
    """Every prompt's answer under one of SEARCHES or a turned one, judged."""
    tokenizer = model.tokenizer

    def kept(rule: Search | Turned) -> list[tuple[list[int], list[float]]]:
        path = journals / f"{records.fingerprint([model.name, hash_prompts(prompts), repr(rule)])[:16]}.json"
        if not path.is_file():
            ids = [text_prompt(tokenizer, prompt.prompt) for prompt in prompts]
            turned = isinstance(rule, Turned)
            found = turn(model, ids, kept(SEARCHES["greedy"]), rule) if turned else decode(model, ids, rule)
            write_whole(path, json.dumps(found))
        return json.loads(path.read_text())

    return [
        Judged(
            word_lists.judge(tokenizer.decode(answer_tokens(tokenizer, tokens), keep_special=False)),
            max(levels, default=0.0),
        )
        for tokens, levels in kept(RULES[name])
    ]


def answer_all(
    model: Checkpoint, prompts: Sequence[Prompt], names: Sequence[str], journals: pathlib.Path
) -> dict[str, list[Judged]]:
    """Every rule's judged answers; a checked one's are put together from those of the rules it names."""
    checked = {name: rule for name in names if isinstance(rule := RULES[name], Checked)}
    wanted = {*names, *(part for rule in checked.values() for part in ("greedy", rule.other))}
    found = {name: answer(model, prompts, name, journals) for name in RULES if name in wanted and name not in checked}
    for name, rule in checked.items():
        pairs = zip(found["greedy"], found[rule.other], strict=True)
        found[name] = [first if first.highest <= rule.above else other for first, other in pairs]
    return found


COLUMNS = {  # head -> whether of the harmful prompts, labels
    "harmful": (True, (word_lists.HARMFUL,)),
    "neither": (True, (word_lists.NEITHER,)),
    "refused or redirected": (True, word_lists.DECLINES),
    "safe refused": (False, word_lists.DECLINES),
    "safe answered": (False, (word_lists.ANSWER,)),
    "safe, neither": (False, (word_lists.NEITHER,)),
}


def summarize(prompts: Sequence[Prompt], by_model: Sequence[Sequence[Judged]]) -> dict[str, Any]:
    """Each column's rate over all models, [value, low, high] by category and prompt, and every model's own, in %."""
    found: dict[str, Any] = {}
    for head, (harmful, labels) in COLUMNS.items():
        at = [place for place, prompt in enumerate(prompts) if prompt.harmful == harmful]
        hits = [[judged[place].label in labels for place in at] for judged in by_model]
        values = [hit for model in hits for hit in model]
        categories, models = [prompts[place].category for place in at] * len(hits), np.repeat(range(len(hits)), len(at))
        rate = clustered_rate(values, categories, models.tolist(), units=len(values))
        shares = [round(100 * float(np.mean(model)), 1) for model in hits]
        found[head] = {"rate": [round(100 * each, 1) for each in (rate.value, rate.low, rate.high)], "models": shares}
    return found


def development_prompts() -> list[Prompt]:
    rows = [
        row
        for harmful in (True, False)
        for row in write_prompts(DEVELOPMENT_SEED, harmful=harmful, count=PROMPTS, held_out=False)
    ]
    return [Prompt(**row) for row in rows]


def main(flags: argparse.Namespace) -> None:
    prompts = development_prompts() if flags.prompts == DEVELOPMENT else read_prompts(flags.prompts)
    prompts = choose(prompts, flags.max_prompts)
    names = flags.rules.split(",")
    if unknown := [name for name in names if name not in RULES]:
        raise ValueError(f"--rules: no rule is called {unknown[0]!r}; there are {', '.join(RULES)}")
    flags.journals.mkdir(parents=True, exist_ok=True)
    found = []
    for folder in flags.models.split(","):
        found.append(answer_all(Checkpoint(*read_model(folder), folder), prompts, names, flags.journals))
    rows = {name: summarize(prompts, [judged[name] for judged in found]) for name in names}
    for name, row in rows.items():
        print(f"{name}: " + "; ".join(f"{head} {each['rate'][0]} {each['models']}" for head, each in row.items()))
    if flags.output:
        whole = {"prompts": flags.prompts, "hash": hash_prompts(prompts), "models": len(found), "rules": rows}
        write_whole(flags.output, json.dumps(whole, indent=1) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser("scripts.studies.safe_beam_rules", __doc__)
    parser.add_argument("--models", required=True, help="run folders, separated by commas")
    parser.add_argument("--prompts", default=DEVELOPMENT, help="a folder of prompts, or development (the default)")
    parser.add_argument("--journals", required=True, type=pathlib.Path, help="folder for the answers")
    parser.add_argument("--rules", default=",".join(RULES), help="names separated by commas (default: all)")
    parser.add_argument("--max_prompts", type=int, default=0, help="of each of harmful and safe (default: all)")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file to write")
    return parser


if __name__ == "__main__":
    cli.run(main, _parser())
