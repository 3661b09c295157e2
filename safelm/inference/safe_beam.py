"""SafeBeam: beam search steered by the harm tag's one-token lookahead (Maini et al. 2025, section 4.1, algorithm 1).

Each step, for every prompt: every running beam y proposes its N likeliest next tokens t with
log p(y + t) = log p(y) + log f(t | y); the lookahead of a candidate is f(tag | y + t); the `drop_fraction` of the pool
with the highest lookahead is dropped; of the rest the k with the highest log-prob are the next beams.

Cost: one forward over k * N candidates a step. Candidates of a beam share the beam's cache and don't see each other,
so nothing is copied per candidate; the same forward's output after a candidate is its lookahead and, should it survive,
its next expansion. Survivors' keys and values are then gathered and written once.

What the algorithm leaves open, decided here:
- Start: one beam, the prompt. So the first pool has N candidates and at most N - dropped beams come of it; the k slots
  fill within a few steps if N * (1 - drop_fraction) > 1.
- Pool: the N candidates of every running beam and every ended beam as one candidate. `drop_fraction` of the pool's size
  is dropped, rounded down (of 5 candidates 2), so at least one survives. Fewer than k survivors: the beams are fewer.
  With N = 1 a pool of k beams halves every step until one is left, which then goes on alone (greedily).
- Ended beams: a beam that chooses EOS keeps its log-prob, competes in every later pool, and is never expanded.
  Ending adds no text, so its lookahead is and stays that of the text it ends: f(tag | y), not f(tag | y + EOS), which a
  model of single documents never learns. EOS can neither hide what was said nor be dropped for what comes after it.
- The tag as a candidate: with "mask" it is never one; with "stop" a beam that chooses it ends (`stopped_by="tag"`),
  under the same rule as EOS. Ids that only pad the vocabulary are never candidates. Masks don't renormalise log-probs.
- Ties: a beam's candidates stand in the order of log-prob, equal ones by token id; beams in the order of log-prob. Of
  candidates with equal lookahead those that stand earlier stay; of equal log-prob the earlier is the better.
- No two beams are equal: they differ in their parent or in the token chosen, and ended beams propose nothing.
- End: no beam runs, or `max_new_tokens`; the answer is the beam with the highest log-prob, ended or not. With
  drop_fraction = 0 this is beam search (and ends early as that does); else an ended beam can still be dropped later.

Not the paper's: `drop_above`, a P(tag) up to which nothing is dropped. Algorithm 1 drops half of a pool also where no
candidate is near the tag: then what decides is noise between tiny numbers, and word fragments win, for the tag stands
between words only and P(tag) within one is a hundredth of that at its end
(`scripts/studies/measure_tag_positions.py`). On the quickstart's task 0.001 lowers answers that are neither harm, nor a
refusal, nor a sensible page from 18% to 3% with as many harmful ones, none, and as many safe prompts refused; at 0.005
little but harm is dropped and what is left is beam search, with its many refusals (docs/results/quickstart.md).

Nor is `anchor`: beams are then compared by the sum over steps of a token's log-prob less `anchor` times that of the
likeliest token of its step. With 1 a beam's likeliest continuation costs nothing, so without dropping the answer is
the greedy one, and a text is not preferred for being predictable, as refusals are. `drop_fraction=0.9,
drop_above=0.005, anchor=1` drops nearly all above that P(tag) and leaves the rest to greedy decoding: chosen on other
prompts, on the mean of three models it had 0.8% harmful, 1.9% neither and greedy decoding's refusals of safe prompts.

Tried without success: within a word a candidate stands by the P(tag) of the last word's end, at a word's end by P(tag)
over the probability that it ends. A beam whose last word looked safe isn't judged again then while its word goes on
("saelfafafafa").

With a monitor its level stands wherever P(tag) is spoken of. A header costs a copy of the cache for every candidate,
and its tokens' forward.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from safelm.inference import asked as asked_lib
from safelm.inference import beams, forward, kv_cache
from safelm.inference.asked import NEVER, RUNNING, Asked
from safelm.inference.beams import BeamState
from safelm.inference.kv_cache import Cache
from safelm.inference.monitors import Monitor
from safelm.inference.monitors.reading import candidate_log_levels
from safelm.inference.weights import Weights
from safelm.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class SafeBeams:
    """The shape of a SafeBeam's step."""

    num_rows: int  # beams per prompt
    num_candidates: int
    monitor: Monitor | None = None  # in the place of P(tag)
    shares_rows: bool = False  # the cache stays where it is, and each beam knows who holds its tokens

    @property
    def num_dropped_from(self) -> int:
        return self.num_rows * self.num_candidates

    def start(self, config: ModelConfig, asked: Asked, logits_PV: Float[Array, "P V"], *, max_len: int) -> BeamState:
        """The state after the prompts, with room for `max_len` tokens."""
        sizes = {"num_beams": self.num_rows, "num_candidates": self.num_candidates}
        state = beams.start(config, asked, logits_PV, **sizes, max_len=max_len)
        if not self.shares_rows:
            return state
        own_W1 = jnp.arange(self.num_rows, dtype=jnp.int32)[:, None]
        return state.replace(holders_PWS=jnp.broadcast_to(own_W1, (len(logits_PV), self.num_rows, max_len)))

    def step(
        self, config: ModelConfig, weights: Weights, state: BeamState, cache: Cache
    ) -> tuple[BeamState, Cache, beams.Tried]:
        """One step of algorithm 1 for every prompt that isn't over."""
        candidates = beams.expand(state)
        shape = candidates.tokens_PWC.shape
        prompt_lengths_R = jnp.repeat(state.asked.prompt_lengths_P, self.num_rows)
        lengths_R = prompt_lengths_R + jnp.repeat(state.step_P, self.num_rows)
        tokens_RC = candidates.tokens_PWC.reshape(-1, self.num_candidates)
        read = None if self.monitor is None else self.monitor.layer
        logits_RCV, new_kv, read_RCD = forward.try_next_tapped(
            config, weights, tokens_RC, cache, lengths_R, read, state.holders_PWS
        )
        normaliser_PWC = forward.log_normaliser(logits_RCV, is_native=weights.is_packed).reshape(shape)
        logits_PWCV = logits_RCV.reshape(*shape, -1)
        if self.monitor is None:
            own_PWC = state.asked.tag_log_prob(logits_PWCV) - normaliser_PWC
        elif self.monitor.header_ids:
            own_PWC = candidate_log_levels(config, weights, self.monitor, cache, new_kv, lengths_R).reshape(shape)
        else:
            own_PWC = self.monitor.log_level(logits_RCV if read_RCD is None else read_RCD).reshape(shape)
        tag_log_prob_PWC = jnp.where(candidates.ends_PWC == RUNNING, own_PWC, state.tag_log_prob_PW[..., None])
        is_kept_PWC = undropped(candidates.log_prob_PWC > NEVER, tag_log_prob_PWC, state.asked.drop_counts_PM)
        is_kept_PWC |= (candidates.log_prob_PWC > NEVER) & (tag_log_prob_PWC <= state.asked.drop_above_P[:, None, None])
        score_PW, place_PW = beams.select(jnp.where(is_kept_PWC, _scores(state, candidates), NEVER), self.num_rows)
        parent_PW, choice_PW = jnp.divmod(place_PW, self.num_candidates)
        rows_R = beams.rows_of(parent_PW)
        new = beams.with_lookahead(
            config,
            beams.survive(state, candidates, score_PW, place_PW),
            is_held_PW=beams.pick(candidates.is_held_PWC, place_PW),
            tag_log_prob_PW=beams.pick(tag_log_prob_PWC, place_PW),
            next_log_probs_PWV=beams.pick(logits_PWCV, place_PW) - beams.pick(normaliser_PWC, place_PW)[..., None],
        )
        chosen = kv_cache.take_rows(new_kv, rows_R), choice_PW.reshape(-1), lengths_R
        if self.shares_rows:
            new = new.replace(holders_PWS=_new_holders(state.holders_PWS, parent_PW, lengths_R))
            cache = kv_cache.write_next_by_row(cache, *chosen)
        else:
            cache = kv_cache.follow_beams(config, weights, cache, rows_R, prompt_lengths_R, lengths_R)
            cache = kv_cache.write_next(cache, *chosen, is_native=weights.is_packed)
        tried = beams.tried(candidates, tag_log_prob_PWC, is_kept_PWC, score_PW, place_PW)
        return asked_lib.keep(state.is_over_P, state, new), cache, tried


def _new_holders(
    holders_PWS: Int[Array, "P W S"], parent_PW: Int[Array, "P W"], lengths_R: Int[Array, " R"]
) -> Int[Array, "P W S"]:
    """Who holds the new beams' tokens: of their parents' those who did, of the new one, behind them, each itself."""
    is_new_PWS = jnp.arange(holders_PWS.shape[-1]) == lengths_R.reshape(*parent_PW.shape, 1)
    return jnp.where(is_new_PWS, jnp.arange(parent_PW.shape[1])[:, None], beams.follow(holders_PWS, parent_PW))


def _scores(state: BeamState, candidates: beams.Candidates) -> Float[Array, "P W C"]:
    """What candidates are compared by: the log-prob, less the anchor's part of the likeliest token's at every step."""
    anchor_P11 = state.asked.anchors_P[:, None, None]
    gain_PWC = state.next_log_probs_PWC - anchor_P11 * state.next_log_probs_PWC[..., :1]
    anchored_PWC = state.score_PW[..., None] + jnp.where(candidates.is_held_PWC, 0, gain_PWC)
    is_anchored_PWC = (anchor_P11 > 0) & (candidates.log_prob_PWC > NEVER)
    return jnp.where(is_anchored_PWC, anchored_PWC, candidates.log_prob_PWC)


def undropped(
    is_candidate_PWC: Bool[Array, "P W C"], tag_log_prob_PWC: Float[Array, "P W C"], drop_counts_PM: Int[Array, "P m"]
) -> Bool[Array, "P W C"]:
    """Which candidates stay when those with the highest lookahead of each prompt's pool are dropped.

    Args:
      drop_counts_PM: number to drop from a pool of 0, 1, .. W * C candidates.
    """
    is_candidate_PM = is_candidate_PWC.reshape(is_candidate_PWC.shape[0], -1)
    tag_log_prob_PM = jnp.where(is_candidate_PM, tag_log_prob_PWC.reshape(is_candidate_PM.shape), jnp.inf)
    safest_first_PM = jnp.argsort(tag_log_prob_PM, axis=1, stable=True)
    rank_PM = jnp.argsort(safest_first_PM, axis=1)
    size_P1 = is_candidate_PM.sum(axis=1, keepdims=True)
    num_kept_P1 = size_P1 - jnp.take_along_axis(drop_counts_PM, size_P1, axis=1)
    return (is_candidate_PM & (rank_PM < num_kept_P1)).reshape(is_candidate_PWC.shape)
