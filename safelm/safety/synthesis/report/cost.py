"""Estimates the cost of a million published documents from this run's tokens, for stated machines and a stated model.

It is a roofline, not a measurement. Each step reads all weights once for the batch, and every token's keys and values;
a prompt token costs 2 operations a parameter:

    seconds = prompt_tokens * 2 * parameters / (flops * FLOPS_USED)
            + completion_tokens * (weight_bytes / batch + kv_bytes * context) / (bandwidth * BANDWIDTH_USED)

over all chips of the machine together. Beside it the report gives the speed of this run's writer, if its ledger counts
seconds: tokens over the time of writing, including prompts but not gates and files, as the mean over processes. `batch`
is what fits beside the weights, at most 256. FLOPS_USED and BANDWIDTH_USED are typical of well-tuned servers and were
not measured here; prices are list prices by the hour when this was written: replace them by yours.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

MILLION = 1_000_000
FLOPS_USED, BANDWIDTH_USED = 0.4, 0.6
_MEMORY_USED = 0.9
_MAX_BATCH = 256


@dataclasses.dataclass(frozen=True)
class Machine:
    """The chips that serve one copy of a model, together: bfloat16 operations/s, memory bytes/s and memory bytes."""

    name: str
    flops: int | float
    bandwidth: int | float
    memory: int | float
    dollars_an_hour: int | float


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A writer in bfloat16; `kv_bytes` is the size of one token's keys and values."""

    name: str
    parameters: int | float
    kv_bytes: int | float


MACHINES = (
    Machine("TPU v5e, 4 chips, our engine", 4 * 197e12, 4 * 819e9, 4 * 16e9, 4 * 1.20),
    Machine("H100 80 GB, a vLLM endpoint", 989e12, 3350e9, 80e9, 3.00),
)
MODELS = (  # the paper wrote with 8B instruct models; the small one is the proof's
    ModelShape("8B, 32 layers, 8 KV heads of 128", 8.0e9, 2 * 32 * 8 * 128 * 2),
    ModelShape("1.7B, 24 layers, 32 KV heads of 64", 1.71e9, 2 * 24 * 32 * 64 * 2),
)


def batch_size(machine: Machine, model: ModelShape, context: int | float) -> int:
    """The number of sequences written at once: as many as fit, at most MAX; 0 if the weights alone don't fit."""
    room = machine.memory * _MEMORY_USED - 2 * model.parameters
    return max(0, min(_MAX_BATCH, int(room / (model.kv_bytes * max(context, 1)))))


def seconds(
    machine: Machine,
    model: ModelShape,
    *,
    prompt_tokens: int | float,
    completion_tokens: int | float,
    context: int | float,
) -> int | float | None:
    """Seconds for so many tokens; None if the model doesn't fit. `context` is a sequence's mean number of tokens."""
    batch = batch_size(machine, model, context)
    if not batch:
        return None
    reading = prompt_tokens * 2 * model.parameters / (machine.flops * FLOPS_USED)
    per_token = 2 * model.parameters / batch + model.kv_bytes * context
    return reading + completion_tokens * per_token / (machine.bandwidth * BANDWIDTH_USED)


def measured(spent: Mapping[str, int | float]) -> dict[str, int | float] | None:
    """The writer's speed by its ledger; None if the ledger counts no seconds or nothing was written."""
    seconds, tokens = spent.get("seconds", 0), spent.get("completion_tokens", 0)
    if not (seconds and tokens):
        return None
    rates = {f"{name}_tokens_per_second": spent.get(f"{name}_tokens", 0) / seconds for name in ("completion", "prompt")}
    return {"seconds": seconds, "completion_tokens": tokens, **rates}


def per_million(totals: Mapping[str, Any], tokens_per_second: int | float) -> dict[str, Any] | None:
    """The cost of a million published documents at this run's tokens per document and pass rate; None if none passed.

    Args:
      totals: `published`, `replies`, `prompt_tokens`, `completion_tokens`, `spent` of a manifest.
      tokens_per_second: this run's speed; 0 if unknown.
    """
    published = totals["published"]
    if not published or not totals["replies"]:
        return None
    tokens = {name: totals[name] / published * MILLION for name in ("prompt_tokens", "completion_tokens")}
    context = (totals["prompt_tokens"] + totals["completion_tokens"] / 2) / totals["replies"]
    reached = measured(totals["spent"])
    machines = []
    for machine in MACHINES:
        for model in MODELS:
            needed = seconds(machine, model, **tokens, context=context)
            hours = None if needed is None else needed / 3600
            facts = {"machine": machine.name, "model": model.name, "batch": batch_size(machine, model, context)}
            facts |= {"hours": hours, "dollars": None if hours is None else hours * machine.dollars_an_hour}
            if needed:
                facts["completion_tokens_per_second"] = tokens["completion_tokens"] / needed
                if reached:
                    facts["times_measured"] = (
                        facts["completion_tokens_per_second"] / reached["completion_tokens_per_second"]
                    )
            machines.append(facts)
    if reached:
        reached = reached | {"hours": tokens["completion_tokens"] / reached["completion_tokens_per_second"] / 3600}
    here = tokens["completion_tokens"] / tokens_per_second / 3600 if tokens_per_second else None
    spent = totals["spent"].get("cost")
    return {
        **tokens,
        "context_tokens": context,
        "hours_as_here": here,
        "cost_as_here": spent / published * MILLION if spent else None,
        "measured": reached,
        "machines": machines,
        "definition": __doc__.split("\n\n", 1)[1].strip(),
        "assumed": {"flops_used": FLOPS_USED, "bandwidth_used": BANDWIDTH_USED},
    }
