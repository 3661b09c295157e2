"""The vocabulary over HTTP, in vLLM's form: so lm-evaluation-harness counts tokens without a tokenizer's files."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from aiohttp import web

from safelm.serving.errors import ApiError
from safelm.serving.fields import Fields, read_body
from safelm.serving.limits import Limits
from safelm.serving.models import ServedModel
from safelm.serving.output_fields import read_text


def routes(find: Callable[[str | None], ServedModel], limits: Limits) -> list[web.RouteDef]:
    """`/tokenizer_info`, `/tokenize` and `/detokenize`; `find` gives a model by name, the first for None."""

    async def body_of(request: web.Request) -> tuple[Fields, ServedModel]:
        fields = Fields(await read_body(request, most_bytes=limits.body_bytes, seconds=limits.body_seconds))
        return fields, find(fields.text("model"))

    async def describe(request: web.Request) -> web.Response:
        return web.json_response(_describe(find(request.query.get("model"))))

    async def tokenize(request: web.Request) -> web.Response:
        fields, model = await body_of(request)
        text, begins = fields.text("prompt"), fields.flag("add_special_tokens", True)
        fields.refuse_rest()
        if text is None:
            raise ApiError(400, "prompt is missing: want a string", param="prompt")
        ids = await asyncio.to_thread(_encode, model, read_text(text, "prompt"), begins)
        found = {"tokens": ids, "count": len(ids), "max_model_len": model.config.max_seq_len}
        return web.json_response(found)

    async def detokenize(request: web.Request) -> web.Response:
        fields, model = await body_of(request)
        ids = fields.take("tokens")
        fields.refuse_rest()
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise ApiError(400, "tokens: want an array of token ids", param="tokens")
        try:
            checked = model.encode(tuple(ids), is_chat=False) if ids else []
        except ValueError as error:
            raise ApiError(400, str(error), param="tokens") from None
        return web.json_response({"prompt": await asyncio.to_thread(model.tokenizer.decode, checked)})

    return [
        web.get("/tokenizer_info", describe),
        web.post("/tokenize", tokenize),
        web.post("/detokenize", detokenize),
    ]


def _encode(model: ServedModel, text: str, begins: bool) -> list[int]:
    """The ids of a text, or of a control token if the text is nothing but its string."""
    controls: Mapping[str, int] = model.tokenizer.conventions.control_tokens
    if text in controls:
        return [controls[text]]
    return model.encode(text, is_chat=False) if begins else model.tokenizer.encode(text)


def _describe(model: ServedModel) -> dict[str, Any]:
    """The strings of the tokens around a text: `bos_token` begins one, if the model's texts begin so."""
    conventions = model.tokenizer.conventions
    begin, end = conventions.begin_ids, conventions.document_end_id
    return {
        "tokenizer_class": "safelm",
        "bos_token": model.tokenizer.special_token(begin[-1]) if begin else conventions.special_tokens.get("bos_token"),
        "eos_token": model.tokenizer.special_token(end),
        "pad_token": None,
        "chat_template": conventions.chat_template,
        "model_max_length": model.config.max_seq_len,
    }
