"""The third tier behind an OpenAI-compatible endpoint: a reply must be one of the choices; any other is unscored.

Where a scale needs log-probs, the endpoint's alternatives for the first token are the choices' probabilities; that
works where a number from 0 to 100 is one token, and an endpoint that gives none, or digits, is refused.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from safelm.evaluate.judges.questions import HARM_QUESTION, MANNER_QUESTION, Question, material, question_for
from safelm.evaluate.judges.scaled import ScaledJudge
from safelm.evaluate.judges.scales import SCALES, Distribution, normalized
from safelm.evaluate.judges.verdicts import UNSCORED, Exchange
from safelm.safety import endpoint_client
from safelm.safety.endpoint_client import Completion, EndpointError, EndpointSettings, RequestRefusedError
from safelm.safety.endpoint_queue import RequestQueue
from safelm.safety.options import check_least, check_share, make_settings
from safelm.text.prompting import question_messages


@dataclasses.dataclass(frozen=True)
class EndpointJudgeSettings(EndpointSettings):
    """How an endpoint is asked for verdicts; see `EndpointSettings`.

    Attributes:
      max_tokens: of a reply, its reasoning included.
      answer_chars: read of an answer, from its beginning.
      max_unscored: share of all replies that are none of those asked for, above which the judge gives up.
    """

    max_tokens: int = 8
    answer_chars: int = 8000
    max_unscored: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least("endpoint", self, max_tokens=1, answer_chars=1)
        check_share("endpoint", self, "max_unscored")


_LEAST_REPLIES = 20  # before the share of unscored ones says anything
_ALTERNATIVES = 20  # of a first token, as many as OpenAI's API gives
_NUMBER_TOKENS = 4  # of a reply by log-probs: enough to see whether its number is cut into digits


class EndpointJudge:
    """A judge behind an OpenAI-compatible address. Neither texts nor the key are ever logged or shown."""

    tier = "model"
    judges_harm = judges_manner = True

    def __init__(
        self,
        url: str,
        model_name: str,
        settings: EndpointJudgeSettings | None = None,
        *,
        name: str = "endpoint",
        questions: Sequence[Question] = (),
    ):
        """`questions` are those beside the two that every judge is asked.

        Raises ValueError for an address or a model that can't be.
        """
        self.name, self._settings = name, settings or EndpointJudgeSettings()
        self._num_replies = self._num_unscored = self._num_truncated = 0
        self._endpoint = self._settings.client(url, model_name)
        hashes = [question.hash for question in (HARM_QUESTION, MANNER_QUESTION, *questions)]
        shaping = (*hashes, self._settings.answer_chars, self._settings.max_tokens)
        digest = hashlib.sha256(repr([url, model_name, *shaping]).encode()).hexdigest()
        self.version = f"{model_name} {digest[:16]}"

    def judge(self, exchanges: Sequence[Exchange]) -> list[str]:
        """See `safelm.evaluate.judges.Judge`; EndpointError if it is down."""

        async def ask(client: Any, exchange: Exchange) -> str | None:
            question = question_for(exchange)
            completion = await self._complete(client, question, exchange, {})
            return completion and question.read(completion.text)

        return [verdict or UNSCORED for verdict in self._run(exchanges, ask)]

    def distributions(
        self, question: Question, exchanges: Sequence[Exchange], *, least_mass: float, by_log_probs: bool
    ) -> list[Distribution | None]:
        """See `scaled.AskedModel`. Without log-probs, all probability lies on the choice that was the reply."""
        replies = [choice.reply for choice in question.choices]

        async def ask(client: Any, exchange: Exchange) -> Distribution | None:
            fields: dict[str, Any] = {}
            if by_log_probs:
                fields = {"logprobs": True, "top_logprobs": _ALTERNATIVES, "max_tokens": _NUMBER_TOKENS}
            completion = await self._complete(client, question, exchange, fields)
            if completion is None:
                return None
            if by_log_probs:
                return normalized(self._by_log_probs(completion, replies), least_mass)
            place = question.place(completion.text)
            return None if place is None else np.eye(len(replies))[place]

        return self._run(exchanges, ask)

    def _by_log_probs(self, completion: Completion, replies: Sequence[str]) -> Distribution:
        """P(reply) among the first token's alternatives. Raises EndpointError where they don't tell."""
        if not completion.first_tokens:
            raise EndpointError(f"{self._endpoint.label}: gives no log-probs (top_logprobs), which this judge needs")
        said, first = (completion.text or "").strip(), max(completion.first_tokens, key=lambda each: each[1])[0].strip()
        if said in replies and len(said) > 1 and first.isdigit() and len(first) < len(said):
            raise EndpointError(
                f"{self._endpoint.label}: cuts numbers into digits, so that the log-probs of one token don't tell a "
                "score from 0 to 100; a model on our own engine (judge:MODEL) can be asked"
            )
        found = np.zeros(len(replies))
        for token, log_prob in completion.first_tokens:
            if token.strip() in replies:
                found[replies.index(token.strip())] += math.exp(log_prob)
        return found

    def _run(self, exchanges: Sequence[Exchange], ask: Callable[[Any, Exchange], Any]) -> list[Any]:
        """What `ask` finds for each exchange, None for nothing."""
        if not exchanges:
            return []
        found: list[Any] = [None] * len(exchanges)

        def deliver(index: int, value: Any) -> None:
            found[index] = value

        queue: RequestQueue[Exchange, Any] = RequestQueue(
            self._endpoint, ask, deliver, book=lambda _: None, concurrency=self._settings.concurrency
        )
        endpoint_client.run(queue.run(exchanges))
        self._num_replies += len(found)
        self._num_unscored += sum(value is None for value in found)
        return found

    def check_replies(self) -> None:
        """Raises EndpointError if too few of all replies so far were of use."""
        most = self._settings.max_unscored
        if self._num_replies >= _LEAST_REPLIES and self._num_unscored > most * self._num_replies:
            raise EndpointError(
                f"{self._endpoint.label}: {self._num_unscored} of {self._num_replies} replies are neither of those "
                f"asked for (max_unscored={most}); {self._num_truncated} were cut off at "
                f"max_tokens={self._settings.max_tokens}"
            )

    async def _complete(
        self, client: Any, question: Question, exchange: Exchange, fields: Mapping[str, Any]
    ) -> Completion | None:
        """The endpoint's answer to a question; None where it refuses the request."""
        text = material(exchange.request, exchange.start, exchange.answer[: self._settings.answer_chars])
        sent = {"temperature": 0, "max_tokens": self._settings.max_tokens, **fields}
        try:
            completion = await self._endpoint.complete(client, question_messages(question, text), sent)
        except RequestRefusedError as error:
            if "logprobs" in fields and not error.is_filtered:
                raise EndpointError(
                    f"{self._endpoint.label}: refuses a request for log-probs ({error}), which this judge needs"
                ) from None
            return None
        self._num_truncated += completion.finish_reason == "length" and "logprobs" not in fields
        return completion


def load(
    url: str,
    model_name: str,
    *,
    name: str = "endpoint",
    ask: str = "",
    questions: Sequence[Question] = (),
    **settings: Any,
) -> EndpointJudge | ScaledJudge:
    """A model behind an address; see `EndpointClient` for its key, `engine.load` for `ask` and `questions`."""
    checked = make_settings(EndpointJudgeSettings, settings, where="endpoint", others="ask, name")
    if not ask:
        return EndpointJudge(url, model_name, checked, name=name, questions=questions)
    judge = EndpointJudge(url, model_name, checked, name=name, questions=SCALES[ask].questions)
    return ScaledJudge(judge, SCALES[ask])
