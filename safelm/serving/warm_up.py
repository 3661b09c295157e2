"""Runs short requests before the first client's, so that the first programs are compiled by then."""

import functools
import logging
import time
from collections.abc import Awaitable, Mapping

from safelm.inference.methods import METHODS, Method, steps_of
from safelm.inference.requests import EngineRequest
from safelm.serving.models import ServedModel
from safelm.serving.worker import EngineWorker

log = logging.getLogger(__name__)
_PROMPT_TOKENS = (12, 24)  # two sizes of the programs that read prompts
_NEW_TOKENS = 4
_OTHERS_LONGEST = 128  # tokens, of SafeBeam where it isn't the default


async def warm_up(
    models: Mapping[str, ServedModel], worker: EngineWorker, default_method: str, *, longest: int
) -> None:
    """Compiles and runs the default method, SafeBeam and scoring on every model; a failure is only logged.

    Args:
      longest: tokens of prompt and reply up to which no request is to wait for the compiler; of SafeBeam 128, unless
        it is the default method.
    """
    began = time.monotonic()
    log.info("warming up: compiling the first programs (%s); --skip_warm_up serves at once", ", ".join(models))
    for model in models.values():
        methods = sorted({default_method, "safe_beam"})
        for method in methods:
            most = longest if method == default_method else min(longest, _OTHERS_LONGEST)
            ahead = worker.compile_ahead(model.name, [_steps(model, method)], longest=most)
            await _try(f"{model.name}'s programs of {method}", ahead)
        for method in methods:
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
        request = EngineRequest(prompt, _steps(model, method), max_new_tokens=_NEW_TOKENS, end_ids=model.end_ids)
        async for update in worker.generate(model.name, request):
            if update.error:
                raise RuntimeError(update.error)


def _steps(model: ServedModel, method: str) -> Method:
    return steps_of(model.steered(METHODS[method]()))


def _prompt(model: ServedModel, length: int) -> list[int]:
    words = model.encode("the rain in autumn", is_chat=False)
    return (words * length)[: min(length, max(1, model.config.max_seq_len - _NEW_TOKENS))]
