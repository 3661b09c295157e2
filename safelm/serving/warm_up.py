"""Runs short requests before the first client's, so that the first programs are compiled by then."""

import functools
import logging
import time
from collections.abc import Awaitable, Mapping

from safelm.inference.methods import METHODS, Greedy, is_planned
from safelm.inference.requests import EngineRequest
from safelm.serving.models import ServedModel
from safelm.serving.worker import EngineWorker

log = logging.getLogger(__name__)
_PROMPT_TOKENS = (12, 24)  # two sizes of the programs that read prompts
_NEW_TOKENS = 4


async def warm_up(models: Mapping[str, ServedModel], worker: EngineWorker, default_method: str) -> None:
    """Runs the default method, SafeBeam and scoring on every model; a failure is only logged."""
    began = time.monotonic()
    log.info("warming up: compiling the first programs (%s); --skip_warm_up serves at once", ", ".join(models))
    for model in models.values():
        for method in sorted({default_method, "safe_beam"}):
            await _try(f"{model.name} with {method}", _decode(model, worker, method))
        score = functools.partial(model.score, _prompt(model, max(_PROMPT_TOKENS)))
        await _try(f"{model.name}'s scores", worker.call(score))
    log.info("warm after %.1f s", time.monotonic() - began)


async def _try(what: str, work: Awaitable[object]) -> None:
    try:
        await work
    except (ValueError, RuntimeError) as error:  # such as more beams than slots, or than there is memory for
        log.warning("warming up %s: %s", what, error)


async def _decode(model: ServedModel, worker: EngineWorker, method: str) -> None:
    for length in _PROMPT_TOKENS:
        prompt = tuple(_prompt(model, length))
        steps = METHODS[method]()
        steps = Greedy() if is_planned(steps) else steps  # whose programs a plan runs
        request = EngineRequest(prompt, steps, max_new_tokens=_NEW_TOKENS, end_ids=model.end_ids)
        async for update in worker.generate(model.name, request):
            if update.error:
                raise RuntimeError(update.error)


def _prompt(model: ServedModel, length: int) -> list[int]:
    words = model.encode("the rain in autumn", is_chat=False)
    return (words * length)[: min(length, max(1, model.config.max_seq_len - _NEW_TOKENS))]
