"""Is there a rule of dropping that keeps SafeBeam's safety and loses neither sense nor answers to safe prompts?

    python scripts/studies/safe_beam_rules.py --models=W/safety0,W/safety1,W/safety2 --prompts=development --journals=J
    python scripts/studies/safe_beam_rules.py --models=W/safety0,W/safety1,W/safety2 --prompts=W/corpus/prompts \
        --journals=J --rules=greedy,SafeBeam,NAME --output=docs/results/data/safe_beam_rules.json

Decodes prompts of the synthetic web with models that differ in their seed, judges the answers by the generator's word
lists and prints a line for every rule: means over the models with intervals over prompts' categories, and every model's
own figure. Rules are chosen on `development`: 120 harmful and 120 safe prompts whose phrasings are in no document and
whose topics are in documents, so none of them is a topic of the corpus's own prompts, on which the one chosen is then
confirmed. A stopped run continues: answers are kept in --journals as token ids.

Rules beside those of `safelm.inference`:
- anchored: beams are compared by log-prob less that of the likeliest token, summed over the steps. So a beam's
  likeliest continuation costs nothing, the greedy text is the best until it is dropped, and a text is not preferred for
  being predictable, as refusals are.
- checked: the greedy answer, unless P(tag) exceeds a value somewhere along it: then another rule's, from the prompt on.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from safelm import cli
from safelm.evaluate.answers import Checkpoint
from safelm.evaluate.judges import word_lists
from safelm.evaluate.suites.suite import Prompt, choose, hash_prompts, read_prompts
from safelm.evaluate.template import answer_tokens
from safelm.formats.sources import read_model
from safelm.inference import SafeBeam, beams, forward
from safelm.inference import asked as asked_lib
from safelm.inference.asked import NEVER, RUNNING, Asked
from safelm.inference.beams import BeamState
from safelm.inference.forward import Cache
from safelm.inference.prompts import SMALLEST_BUCKET, bucket
from safelm.inference.safe_beam import undropped
from safelm.inference.weights import Weights, prepare
from safelm.io import records
from safelm.io.files import write_whole
from safelm.models.config import ModelConfig
from safelm.stats.comparison import clustered_rate
from safelm.synthetic_web.prompts import write_prompts
from safelm.text.prompting import text_prompt

DEVELOPMENT, DEVELOPMENT_SEED, PROMPTS = "development", 1, 120
NEW_TOKENS = 48
ROWS = 120  # prompts decoded at once


@dataclasses.dataclass(frozen=True)
class Search:
    """SafeBeam with beams compared by log-prob - anchor * log-prob of the likeliest token, summed over the steps.

    Without dropping it is beam search with anchor 0 and greedy decoding with anchor 1.
    """

    drop_fraction: float = 0.5
    drop_above: float = 0.0
    anchor: float = 0.0

    @property
    def method(self) -> SafeBeam:
        return SafeBeam(drop_fraction=self.drop_fraction, drop_above=self.drop_above)


@dataclasses.dataclass(frozen=True)
class Checked:
    """The greedy answer unless its highest P(tag) exceeds `above`, else that of the rule called `other`."""

    other: str
    above: float


MOST = 0.9  # the share that may be dropped where everything above a P(tag) is to go: 14 of 16 candidates
SEARCHES = {
    "greedy": Search(drop_fraction=0, anchor=1),
    "beam search": Search(drop_fraction=0),
    "SafeBeam": Search(),
    **{f"drop_above {above}": Search(drop_above=above) for above in (0.001, 0.005)},
    **{f"anchored: drop_above {above}": Search(drop_above=above, anchor=1) for above in (0.001, 0.005)},
    **{f"anchored: all above {above}": Search(MOST, above, anchor=1) for above in (0.005, 0.02)},
    "anchored 1/2: drop_above 0.005": Search(drop_above=0.005, anchor=0.5),
}
RULES: dict[str, Search | Checked] = {
    **SEARCHES,
    **{
        f"checked at {above} then {other}": Checked(other, above)
        for other in ("SafeBeam", "drop_above 0.001", "drop_above 0.005", "beam search")
        for above in (0.002, 0.005, 0.01, 0.02, 0.04)
    },
}


@dataclasses.dataclass(frozen=True)
class Judged:
    """An answer's label and its highest P(tag)."""

    label: str
    highest: float


@functools.partial(jax.jit, static_argnames=("config", "num_beams"), donate_argnames=("state", "cache"))
def search_step(
    config: ModelConfig,
    num_beams: int,
    weights: Weights,
    anchor: Float[Array, ""],
    state: BeamState,
    cache: Cache,
) -> tuple[BeamState, Cache]:
    """A step of `safelm.inference.safe_beam` with an anchored score."""
    candidates = beams.expand(state)
    shape = candidates.tokens_PWC.shape
    lengths_R = jnp.repeat(state.asked.prompt_lengths_P + state.step_P, num_beams)
    tokens_RC = candidates.tokens_PWC.reshape(-1, shape[2])
    logits_RCV, new_kv = forward.try_next(config, weights, tokens_RC, cache, lengths_R)
    log_probs_PWCV = (logits_RCV - forward.log_normaliser(logits_RCV)[..., None]).reshape(*shape, -1)
    tag_PWC = jnp.where(
        candidates.ends_PWC == RUNNING, state.asked.tag_log_prob(log_probs_PWCV), state.tag_log_prob_PW[..., None]
    )
    is_candidate_PWC = candidates.log_prob_PWC > NEVER
    is_kept_PWC = undropped(is_candidate_PWC, tag_PWC, state.asked.drop_counts_PM)
    is_kept_PWC |= is_candidate_PWC & (tag_PWC <= state.asked.drop_above_P[:, None, None])
    gain_PWC = state.next_log_probs_PWC - anchor * state.next_log_probs_PWC[..., :1]
    score_PWC = state.score_PW[..., None] + jnp.where(candidates.is_held_PWC, 0, gain_PWC)
    score_PW, place_PW = beams.select(jnp.where(is_kept_PWC, score_PWC, NEVER), num_beams)
    rows_R, choice_R = beams.rows_of(place_PW // shape[2]), (place_PW % shape[2]).reshape(-1)
    new = beams.with_lookahead(
        config,
        beams.survive(state, candidates, score_PW, place_PW),
        is_held_PW=beams.pick(candidates.is_held_PWC, place_PW),
        tag_log_prob_PW=beams.pick(tag_PWC, place_PW),
        next_log_probs_PWV=beams.pick(log_probs_PWCV, place_PW),
    )
    cache = forward.write_next(forward.take_rows(cache, rows_R), forward.take_rows(new_kv, rows_R), choice_R, lengths_R)
    return asked_lib.keep(~state.is_running_PW.any(axis=1), state, new), cache


@functools.partial(jax.jit, static_argnames=("config", "num_beams", "num_candidates"))
def begin(
    config: ModelConfig,
    num_beams: int,
    num_candidates: int,
    weights: Weights,
    asked: Asked,
    tokens_PT: Int[Array, "P T"],
) -> tuple[BeamState, Cache]:
    """The state after the prompts."""
    cache, logits_PV = forward.read_prompts(config, weights, tokens_PT, asked.prompt_lengths_P)
    sizes = {"num_beams": num_beams, "num_candidates": num_candidates, "max_len": NEW_TOKENS}
    with_room = ((0, 0), (0, 0), (0, NEW_TOKENS), (0, 0))
    cache = jax.tree.map(lambda kv: jnp.repeat(jnp.pad(kv, with_room), num_beams, axis=0), cache)
    return beams.start(config, asked, logits_PV, **sizes), cache


def decode(model: Checkpoint, ids: Sequence[Sequence[int]], rule: Search) -> list[tuple[list[int], float]]:
    """The new tokens of every prompt and the highest P(tag) along them."""
    method, tokenizer, weights = rule.method, model.tokenizer, prepare(model.config, model.params)
    width = bucket(max(map(len, ids)), SMALLEST_BUCKET, model.config.max_seq_len - NEW_TOKENS)
    found = []
    for start in range(0, len(ids), ROWS):
        batch = ids[start : start + ROWS]
        rows = [(len(tokens), NEW_TOKENS, tokenizer.conventions.end_ids, method, 0) for tokens in batch]
        rows += [None] * (ROWS - len(batch))
        pool = method.num_beams * method.num_candidates
        asked = asked_lib.ask(rows, harm_tag_id=tokenizer.harm_tag_id, max_pool=pool)
        tokens_PT = np.zeros((ROWS, width), np.int32)
        for row, tokens in enumerate(batch):
            tokens_PT[row, : len(tokens)] = tokens
        state, cache = begin(model.config, method.num_beams, method.num_candidates, weights, asked, tokens_PT)
        for _ in range(NEW_TOKENS):
            state, cache = search_step(model.config, method.num_beams, weights, jnp.float32(rule.anchor), state, cache)
        new_PT, tags_PT, counts_P, *_ = (np.asarray(each) for each in state.outcome())
        for row in range(len(batch)):
            count = counts_P[row]
            highest = float(np.exp(tags_PT[row, :count].max(initial=NEVER)))
            found.append((new_PT[row, :count].tolist(), highest))
    return found


def answer(model: Checkpoint, prompts: Sequence[Prompt], name: str, journals: pathlib.Path) -> list[Judged]:
    """Every prompt's answer under one of SEARCHES, judged."""
    rule, tokenizer = SEARCHES[name], model.tokenizer
    path = journals / f"{records.fingerprint([model.name, hash_prompts(prompts), repr(rule)])[:16]}.json"
    if not path.is_file():
        found = decode(model, [text_prompt(tokenizer, prompt.prompt) for prompt in prompts], rule)
        write_whole(path, json.dumps(found))
    return [
        Judged(word_lists.judge(tokenizer.decode(answer_tokens(tokenizer, tokens), keep_special=False)), highest)
        for tokens, highest in json.loads(path.read_text())
    ]


def answer_all(
    model: Checkpoint, prompts: Sequence[Prompt], names: Sequence[str], journals: pathlib.Path
) -> dict[str, list[Judged]]:
    """Every rule's judged answers; a checked one's are put together from those of the rules it names."""
    checked = {name: rule for name in names if isinstance(rule := RULES[name], Checked)}
    wanted = {*names, *(part for rule in checked.values() for part in ("greedy", rule.other))}
    found = {name: answer(model, prompts, name, journals) for name in SEARCHES if name in wanted}
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
