"""The third tier behind an OpenAI-compatible endpoint: a reply must be one of the choices; any other is unscored."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any

from safelm.evaluate.judges.questions import HARM_QUESTION, MANNER_QUESTION, material, question_for
from safelm.evaluate.judges.verdicts import UNSCORED, Exchange
from safelm.safety import endpoint_client
from safelm.safety.endpoint_client import EndpointError, EndpointSettings, RequestRefusedError
from safelm.safety.endpoint_queue import RequestQueue
from safelm.safety.options import check_least, check_share, make_settings
from safelm.text.prompting import question_messages


@dataclasses.dataclass(frozen=True)
class EndpointJudgeSettings(EndpointSettings):
    """How an endpoint is asked for verdicts; see `EndpointSettings`.

    Attributes:
      max_tokens: of a reply, its reasoning included.
      answer_chars: read of an answer, from its beginning.
      max_unscored: share of replies that are none of those asked for, above which the judge gives up.
    """

    max_tokens: int = 8
    answer_chars: int = 8000
    max_unscored: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("endpoint", self, max_tokens=1, answer_chars=1)
        check_share("endpoint", self, "max_unscored")


_LEAST_REPLIES = 20  # before the share of unscored ones says anything


class EndpointJudge:
    """A judge behind an OpenAI-compatible address. Neither texts nor the key are ever logged or shown."""

    tier = "model"
    judges_harm = judges_manner = True

    def __init__(
        self, url: str, model_name: str, settings: EndpointJudgeSettings | None = None, *, name: str = "endpoint"
    ):
        """Raises ValueError for an address or a model that can't be."""
        self.name, self._settings = name, settings or EndpointJudgeSettings()
        self._num_truncated = 0
        self._endpoint = self._settings.client(url, model_name)
        questions = (HARM_QUESTION.hash, MANNER_QUESTION.hash)
        shaping = (*questions, self._settings.answer_chars, self._settings.max_tokens)
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
        fields = {"temperature": 0, "max_tokens": self._settings.max_tokens}
        try:
            completion = await self._endpoint.complete(client, question_messages(question, text), fields)
        except RequestRefusedError:
            return UNSCORED
        self._num_truncated += completion.finish_reason == "length"
        return question.read(completion.text) or UNSCORED


def load(url: str, model_name: str, *, name: str = "endpoint", **settings: Any) -> EndpointJudge:
    """A model behind an address; see `EndpointClient` for its key."""
    checked = make_settings(EndpointJudgeSettings, settings, where="endpoint", others="name")
    return EndpointJudge(url, model_name, checked, name=name)
