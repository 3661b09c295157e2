"""The third tier behind an OpenAI-compatible endpoint: a reply must be one of the choices; any other is unscored."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from safelm.evaluate.judges.questions import HARM_QUESTION, MANNER_QUESTION, material, question_for
from safelm.evaluate.judges.verdicts import UNSCORED, Exchange
from safelm.safety import endpoint_client
from safelm.safety.endpoint_client import EndpointClient, EndpointError, RequestRefusedError
from safelm.safety.endpoint_queue import RequestQueue
from safelm.safety.options import make_settings


@dataclasses.dataclass(frozen=True)
class Settings:
    """How an endpoint is asked.

    Attributes:
      max_tokens: of a reply, its reasoning included.
      answer_chars: read of an answer, from its beginning.
      key_env: the environment variable with the key, if not SAFELM_ENDPOINT_KEY.
    """

    concurrency: int = 8
    timeout_s: float = 60.0
    retries: int = 6
    max_tokens: int = 8
    answer_chars: int = 8000
    max_unscored: float = 0.5
    key_env: str = ""

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("retries", 0), ("max_tokens", 1), ("answer_chars", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"endpoint: {name}={getattr(self, name)}: must be at least {least}")
        if not self.timeout_s > 0 or not 0 <= self.max_unscored <= 1:
            raise ValueError("endpoint: timeout_s must be above 0 and max_unscored a share from 0 to 1")


_LEAST_REPLIES = 20  # before the share of unscored ones says anything


class EndpointJudge:
    """A judge behind an OpenAI-compatible address. Neither texts nor the key are ever logged or shown."""

    tier = "model"
    judges_harm = judges_manner = True

    def __init__(self, url: str, model_name: str, settings: Settings | None = None, *, name: str = "endpoint"):
        """Raises ValueError for an address or a model that can't be."""
        self.name, self._settings = name, settings or Settings()
        self._num_truncated = 0
        timeout_s, retries = self._settings.timeout_s, self._settings.retries
        self._endpoint = EndpointClient(
            url, model_name, timeout_s=timeout_s, retries=retries, key_env=self._settings.key_env
        )
        shaping = [question.hash for question in (HARM_QUESTION, MANNER_QUESTION)] + [
            self._settings.answer_chars,
            self._settings.max_tokens,
        ]
        digest = hashlib.sha256(repr([url, model_name, *shaping]).encode()).hexdigest()
        self.version = f"{model_name} {digest[:16]}"

    def judge(self, exchanges: Sequence[Exchange]) -> list[str]:
        """See `safelm.evaluate.judges.Judge`; EndpointError if it is down or gives too few usable replies."""
        if not exchanges:
            return []
        verdicts = endpoint_client.run(self._judge(exchanges))
        unscored = verdicts.count(UNSCORED)
        if len(verdicts) >= _LEAST_REPLIES and unscored > self._settings.max_unscored * len(verdicts):
            raise EndpointError(
                f"{self._endpoint.label}: {unscored} of {len(verdicts)} replies are neither of those asked for "
                f"(max_unscored={self._settings.max_unscored}); {self._num_truncated} were cut off at "
                f"max_tokens={self._settings.max_tokens}"
            )
        return verdicts

    async def _judge(self, exchanges: Sequence[Exchange]) -> list[str]:
        verdicts = [UNSCORED] * len(exchanges)

        def deliver(index: int, verdict: str | None) -> None:
            verdicts[index] = verdict or UNSCORED

        queue: RequestQueue[Exchange, str] = RequestQueue(
            self._endpoint, self._ask, deliver, book=lambda _: None, concurrency=self._settings.concurrency
        )
        await queue.run(exchanges)
        return verdicts

    async def _ask(self, client: Any, exchange: Exchange) -> str:
        question = question_for(exchange)
        text = material(exchange.request, exchange.start, exchange.answer[: self._settings.answer_chars])
        messages = [
            {"role": "system", "content": question.system},
            {"role": "user", "content": question.before + text + question.after},
        ]
        fields = {"temperature": 0, "max_tokens": self._settings.max_tokens}
        try:
            completion = await self._endpoint.complete(client, messages, fields)
        except RequestRefusedError:
            return UNSCORED
        self._num_truncated += completion.finish_reason == "length"
        return question.read(completion.text) or UNSCORED


def load(url: str, model_name: str, *, name: str = "endpoint", **settings: Any) -> EndpointJudge:
    """A model behind an address; see `EndpointClient` for its key."""
    checked = make_settings(Settings, settings, where="endpoint", others="name")
    return EndpointJudge(url, model_name, checked, name=name)
