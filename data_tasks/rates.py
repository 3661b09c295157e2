"""Mixture rates of the ablation ladder: the share of the training tokens that each source provides.

The ladder is cumulative (Maini et al. 2025, figure 4): every rung keeps the sources of the rung before and adds one
intervention, whose share is taken from the base web text, still the largest source. So the difference between
neighbouring rungs measures one intervention.

    raw             raw web text of every harm score, the control
    score0          only web text of harm score 0
    safeweb         + recontextualized text (scores 1 to 3)
    refuseweb       + refusal dialogues (scores 4 and 5)
    moral_education + moral education made from those dialogues
    harm_tagged     + raw unsafe text with the harm tag, which SafeBeam steers by

The paper states no rates. Here SafeWeb has 20% (the paper: more than 100B of 600B tokens) and every other intervention
5%, enough to be learned and too little to turn the model into a refuser. Rates are shares of *tokens*, not of
documents, and every rung sums to 1. This module imports neither TensorFlow nor SeqIO: configurations read it in
training processes too.
"""

from collections.abc import Mapping
from types import MappingProxyType

from safelm.ladder.plan import RUNGS

SOURCES = ("raw_web", "filtered_web", "safeweb", "refuseweb", "moral_education", "harm_tagged_web")
CHAT_SOURCES = ("ultrachat", "wildguardmix", "wildjailbreak", "gsm8k", "instructions", "harm_tagged_chat")
REFUSAL_SOURCES = ("refusal_ultrachat", "refusal_wildguardmix", "refusal_wildjailbreak")


def _rung(**rates: float) -> Mapping[str, float]:
    return MappingProxyType(rates)


def _ladder(**interventions: float) -> Mapping[str, Mapping[str, float]]:
    """The rates of every rung, from each intervention's share in the order in which they are added."""
    rungs, added = [_rung(raw_web=1.0), _rung(filtered_web=1.0)], {}
    for source, share in interventions.items():
        added[source] = share
        rungs.append(_rung(filtered_web=round(1 - sum(added.values()), 9), **added))
    return MappingProxyType(dict(zip(RUNGS, rungs, strict=True)))


def _by_token(shares: Mapping[str, float]) -> Mapping[str, float]:
    """The shares with the tags by token in place of those by word gap."""
    return _rung(**{"token_tagged_web" if name == "harm_tagged_web" else name: each for name, each in shares.items()})


LADDER = _ladder(safeweb=0.20, refuseweb=0.05, moral_education=0.05, harm_tagged_web=0.05)
# For a budget of a million tokens instead of billions: interventions at 5% each would be 50,000 tokens, too few to
# learn anything from.
SMALL_LADDER = _ladder(safeweb=0.10, refuseweb=0.10, moral_education=0.10, harm_tagged_web=0.20)

POST_TRAINING = ("instruction", "instruction_tagged", "benign")  # mixtures of conversations, among OTHERS

# Mixtures that are no rung: for comparisons within one study, not with the ladder.
OTHERS: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "quickstart": SMALL_LADDER["harm_tagged"],
        # The release gate's controls, with the quickstart's shares: known weak and known strong.
        "refusal_only": _rung(raw_web=0.90, refuseweb=SMALL_LADDER["harm_tagged"]["refuseweb"]),
        "filtered_tagged": _rung(filtered_web=0.80, harm_tagged_web=SMALL_LADDER["harm_tagged"]["harm_tagged_web"]),
        # Planted text (`safelm.canaries`) beside raw web text.
        "canaries": _rung(raw_web=0.90, canaries=0.10),
        # Alignment text, as often as it takes, beside raw web text: for the last phase or the whole run.
        "alignment": _rung(raw_web=0.90, alignment_text=0.10),
        # Post-training (section 5). About half of WildGuardMix and WildJailbreak are refusals: 10% of the whole.
        "instruction": _rung(ultrachat=0.80, wildguardmix=0.10, wildjailbreak=0.10),
        # For models with the tag in pretraining: a tenth of the tokens are tagged harmful answers of WildGuardMix.
        "instruction_tagged": _rung(ultrachat=0.70, wildguardmix=0.10, wildjailbreak=0.10, harm_tagged_chat=0.10),
        # Every answer begins with <refuse> or <respond>: refusal tokens, Jain et al. 2024.
        "instruction_refusal": _rung(refusal_ultrachat=0.80, refusal_wildguardmix=0.10, refusal_wildjailbreak=0.10),
        "benign": _rung(gsm8k=1.0),
        # Interventions on raw web text (`data_tasks.interventions`): each differs from the rung raw by itself alone.
        "masked": _rung(masked_web=1.0),
        "masked_unsafe": _rung(masked_unsafe_web=1.0),
        "unlikelihood": _rung(unlikelihood_web=1.0),
        "weighted": _rung(weighted_web=1.0),
        "span_tagged": _rung(span_tagged_web=1.0),
        "conditioned": _rung(conditioned_web=1.0),
        "red_flag": _rung(red_flag_web=1.0),
        "red_flag_span": _rung(red_flag_span_web=1.0),
        # Gradient routing: what is unsafe trains designated units alone (`config.routing`).
        "routed": _rung(safer_web=0.95, unsafe_web=0.05),
        # MeCo ends with a tenth of the tokens without metadata: a second phase of raw web.
        "metadata": _rung(metadata_web=1.0),
        "reflected": _rung(reflected_web=1.0),
        "preflected": _rung(preflected_web=1.0),
        # As the rung harm_tagged and as "quickstart", their tags by token.
        "token_tagged": _by_token(LADDER["harm_tagged"]),
        "quickstart_token_tagged": _by_token(SMALL_LADDER["harm_tagged"]),
    }
)


def rates(rung: str) -> dict[str, float]:
    """The rates of a mixture: source name -> share of tokens. Raises ValueError for an unknown name."""
    known = {**LADDER, **OTHERS}
    if rung not in known:
        raise ValueError(f"unknown rung {rung!r}: the ladder has {', '.join(LADDER)}; others: {', '.join(OTHERS)}")
    return dict(known[rung])
