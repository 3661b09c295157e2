"""The official client, unmodified: completions, chats and streams of both, errors, a key."""

import asyncio

import openai
import pytest
from serving_fakes import FakeEngine, Script, running, tiny_model

TEXT = " the cat sat on the mat"
MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server():
    script = Script(TEXT)
    with running({"tiny": tiny_model()}, {"tiny": lambda: FakeEngine(script)}, key="sesame") as up:
        yield up


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0) as ready:
        yield ready


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "safelm"


def test_chat(client):
    reply = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=100, temperature=0)
    assert reply.choices[0].message.content == TEXT and reply.choices[0].finish_reason == "stop"
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    steered = client.chat.completions.create(
        model="tiny", messages=MESSAGES, extra_body={"safelm": {"method": "safe_beam", "num_beams": 2}}
    )
    assert steered.safelm["method"] == "safe_beam" and steered.safelm["summary"]["max"] > 0
    assert "".join(token["text"] for token in steered.safelm["tokens"]) == TEXT


def test_chat_stream(client):
    chunks = list(client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"
    with client.chat.completions.stream(model="tiny", messages=MESSAGES) as stream:  # puts the reply together
        assert stream.get_final_completion().choices[0].message.content == TEXT


def test_completion_and_stream(client):
    assert client.completions.create(model="tiny", prompt="one", max_tokens=100).choices[0].text == TEXT
    chunks = client.completions.create(
        model="tiny", prompt="one", max_tokens=100, stream=True, stop="mat", stream_options={"include_usage": True}
    )
    texts, usage = [], None
    for chunk in chunks:
        texts += [choice.text for choice in chunk.choices]
        usage = chunk.usage or usage
    assert "".join(texts) == TEXT.removesuffix("mat") and usage.prompt_tokens > 0


def test_async_client(server):
    async def both():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="sesame", max_retries=0) as client:
            ask = client.chat.completions.create
            whole, stream = await asyncio.gather(
                ask(model="tiny", messages=MESSAGES), ask(model="tiny", messages=MESSAGES, stream=True)
            )
            return whole.choices[0].message.content, [chunk.choices[0].delta.content async for chunk in stream]

    whole, parts = asyncio.run(both())
    assert whole == TEXT == "".join(part or "" for part in parts)


def test_errors_are_the_clients_own(server, client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=MESSAGES, n=99)
    assert caught.value.param == "n" and "n=99: want an integer from 1 to 32" in str(caught.value)
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="gpt", prompt="one")
    assert caught.value.code == "model_not_found"
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
