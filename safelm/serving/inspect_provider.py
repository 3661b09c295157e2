"""Our checkpoints as a model of Inspect: `inspect eval TASK --model safelm/DIR`, found by an entry point.

The model is served on a free loopback port of this process, and Inspect's own client of OpenAI-compatible servers asks
it. So an answer is the same as from `safelm serve`, and every setting of Inspect's that the server has works.
Importing this module needs the packages `inspect_ai` and `openai`.
"""

import asyncio
import functools
import secrets
import threading
from typing import Any

from inspect_ai.model import GenerateConfig, modelapi
from inspect_ai.model._providers.openai_compatible import OpenAICompatibleAPI

from safelm.inference.engine import Engine
from safelm.inference.methods import METHODS
from safelm.serving import app
from safelm.serving.limits import Limits
from safelm.serving.models import load_model

_NAME = "model"
_LONGEST_WAIT = 24 * 3600.0  # seconds for an answer: Inspect has limits of its own


class _Background:
    """A server in a daemon thread, until the process ends."""

    def __init__(self, source: str, key: str, *, method: str, slots: int, dtype: str, chat_template: str):
        if method not in METHODS:
            raise ValueError(f"-M method={method}: want one of {', '.join(METHODS)}")
        if not isinstance(slots, int) or slots < 1:
            raise ValueError(f"-M slots={slots}: must be at least 1")
        model = load_model(_NAME, source, dtype=dtype, chat_template=chat_template)
        context = model.config.max_seq_len
        limits = Limits(
            body_bytes=2**26,
            body_seconds=_LONGEST_WAIT,
            prompt_tokens=context,
            new_tokens=context,
            open_requests=4096,
            request_seconds=_LONGEST_WAIT,
            beams=min(Limits.beams, slots),
            connections=8192,
        )
        engine = functools.partial(
            Engine, model.config, model.params, harm_tag_id=model.tokenizer.harm_tag_id, slots=slots
        )
        self._config = app.ServerConfig(limits, key=key, default_method=method, port=0)
        self._models, self._engines = {_NAME: model}, {_NAME: engine}
        self._is_up, self._error = threading.Event(), None
        self.url = ""
        threading.Thread(target=self._run, name="safelm-inspect", daemon=True).start()
        self._is_up.wait()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        async def serve() -> None:
            async with app.serving(self._config, self._models, self._engines) as server:
                self.url = server.url
                self._is_up.set()
                await asyncio.Event().wait()

        try:
            asyncio.run(serve())
        except Exception as error:
            self._error = error
            self._is_up.set()


@modelapi(name="safelm")
class SafeLMAPI(OpenAICompatibleAPI):
    """A checkpoint of any kind that `safelm serve` takes.

    Model arguments (`-M NAME=VALUE`): `method` (of requests; "sample"), `slots` (answers decoded at once), `dtype` and
    `chat_template`.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        method: str = "sample",
        slots: int = 16,
        dtype: str = "",
        chat_template: str = "",
        **model_args: Any,
    ):
        """Loads the checkpoint. Raises ValueError or OSError if it can't be read or an argument is unknown."""
        if model_args:
            raise ValueError(f"-M {min(model_args)}: unknown; want one of method, slots, dtype, chat_template")
        if base_url:
            raise ValueError("--model-base-url: safelm/DIR serves by itself; openai-api/safelm/NAME asks a server")
        key = secrets.token_urlsafe()
        settings = {"method": method, "slots": slots, "dtype": dtype, "chat_template": chat_template}
        server = _Background(model_name, key, **settings)
        super().__init__(
            model_name=model_name,
            base_url=f"{server.url}/v1",
            api_key=key,
            config=config or GenerateConfig(),
            service="safelm",
        )

    def service_model_name(self) -> str:
        """The name that the server knows."""
        return _NAME
