"""Other people's harnesses: lm-evaluation-harness's own client against our server, and the fields that they send."""

import dataclasses
import json
import random

import jax
import pytest
import tiny_runs
from serving_fakes import http as ask
from serving_fakes import running, tiny_model

from safelm.inference import Engine
from safelm.models import decoder as model

WORDS = "the cat sat on the mat, the dog did not; caf\u00e9 \u2603".split(" ")
NUM_ITEMS = 24
pytestmark = pytest.mark.usefixtures("quick_compilation")


def items(count, seed=0):
    """Questions with a few choices each, some with an empty context or choices of one token."""
    rng = random.Random(seed)

    def words(low, high):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(low, high)))

    return [(words(0, 30), [" " + words(1, 6) for _ in range(rng.randint(2, 4))]) for _ in range(count)]


def instances(*arguments):
    from lm_eval.api.instance import Instance

    return [Instance("any", {}, each, index) for index, each in enumerate(arguments)]


@pytest.fixture(scope="module")
def served():
    """Weights so large that choices differ clearly."""
    tiny = tiny_model()
    config = dataclasses.replace(tiny.config, init_std=0.4)
    return dataclasses.replace(tiny, config=config, params=model.init(config, jax.random.key(5)))


def begins(tokenizer):
    """The vocabulary of a model whose texts begin with a token of their own."""
    return tokenizer.beginning_with([tokenizer.eos_id])


@pytest.fixture(scope="module")
def server(served):
    def engine():
        return Engine(served.config, served.params, harm_tag_id=served.tokenizer.harm_tag_id, slots=4)

    begun = dataclasses.replace(served, tokenizer=begins(served.tokenizer), name="begun")
    with running({"tiny": served, "begun": begun}, {"tiny": engine, "begun": engine}) as up:
        yield up


@pytest.fixture(scope="module")
def ours(served):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is in the extra `eval`")
    from safelm.evaluate.capability.lm_eval_model import SafeLM

    return SafeLM(served.config, served.params, served.tokenizer)


def client(server, model="tiny", **settings):
    pytest.importorskip("tenacity", reason="the harness's clients need tenacity, in the extra `eval`")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(base_url=f"{server.url}/v1/completions", model=model, max_length=512, **settings)


def compare(ours, theirs, questions):
    pairs = [(question, choice) for question, choices in questions for choice in choices]
    mine, other = ours.loglikelihood(instances(*pairs)), theirs.loglikelihood(instances(*pairs))
    assert len(mine) == len(other) == len(pairs)
    for pair, (want, is_greedy), (found, found_greedy) in zip(pairs, mine, other, strict=True):
        assert found == pytest.approx(want, abs=1e-4), pair
        assert found_greedy == is_greedy, pair


@pytest.mark.parametrize(
    "settings",
    [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in ({"batch_size": 8}, {"num_concurrent": 3}))],
    ids=str,
)
def test_loglikelihoods_are_those_of_our_own_harness(server, ours, settings):
    theirs = client(server, **settings)
    assert theirs.tokenizer_backend == "remote", "the server tells its vocabulary"
    compare(ours, theirs, items(NUM_ITEMS))


def test_a_model_that_begins_its_texts_is_asked_by_texts(server, served):
    from safelm.evaluate.capability.lm_eval_model import SafeLM

    ours = SafeLM(served.config, served.params, begins(served.tokenizer))
    asked = [(question, choices) for question, choices in items(NUM_ITEMS) if question]
    compare(ours, client(server, "begun", tokenized_requests=False), asked)


def test_a_greedy_continuation_is_told_as_greedy(server, ours):
    (text,) = ours.generate_until(instances(("the cat", {"until": [], "max_gen_toks": 1})))
    pairs = instances(("the cat", text), ("the cat", text + " dog"))
    assert client(server).loglikelihood(pairs) == [
        (pytest.approx(log_prob, abs=1e-4), is_greedy) for log_prob, is_greedy in ours.loglikelihood(pairs)
    ]


def test_generated_texts_are_those_of_our_own_harness(server, ours):
    settings = {"until": ["mat", "\n"], "do_sample": False, "max_gen_toks": 12}
    asked = instances(*((question or "the", settings) for question, _ in items(4)))
    assert client(server).generate_until(asked) == ours.generate_until(asked)


def test_rolling_loglikelihoods_are_those_of_our_own_harness(server, ours):
    texts = instances(("the cat sat on the mat. " * 5,), ("dog",))
    assert client(server).loglikelihood_rolling(texts) == pytest.approx(ours.loglikelihood_rolling(texts), abs=1e-3)


def test_an_echoed_prompt_has_openais_shape(server, served):
    prompt = "the caf\u00e9 sat"
    body = {"prompt": prompt, "max_tokens": 0, "echo": True, "logprobs": 2}
    choice = ask(server, "POST", "/v1/completions", body).json["choices"][0]
    told, ids = choice["logprobs"], served.tokenizer.encode(prompt)
    assert choice["text"] == prompt and choice["finish_reason"] == "length"
    assert {len(each) for each in told.values()} == {len(ids)}
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    rows = zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True)
    for token, log_prob, top in list(rows)[1:]:
        assert top[token] == log_prob and 2 <= len(top) <= 3 and max(top.values()) <= 0
    for token, start in zip(told["tokens"], told["text_offset"], strict=True):
        assert token.startswith("bytes:") or prompt[start:].startswith(token)


def test_samples_and_prompts_are_choices_in_order(server, served):
    def texts(**fields):
        reply = ask(server, "POST", "/v1/completions", {"max_tokens": 8, "seed": 3, "logprobs": 1} | fields).json
        assert [choice["index"] for choice in reply["choices"]] == list(range(len(reply["choices"])))
        return [choice["text"] for choice in reply["choices"]], reply["usage"]

    (one,), _ = texts(prompt="the cat")
    several, usage = texts(prompt="the cat", n=3)
    assert several[0] == one and len(set(several)) > 1, "the first sample is that of the seed"
    assert usage["prompt_tokens"] == len(served.tokenizer.encode("the cat"))
    both, usage = texts(prompt=["the cat", "a dog"], n=2)
    assert both[:2] == several[:2] and len(both) == 4
    assert usage["prompt_tokens"] == sum(len(served.tokenizer.encode(text)) for text in ("the cat", "a dog"))


def joined(events, index, is_chat):
    """A choice of a stream as that of a whole reply."""
    parts = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    texts = [part["delta"].get("content", "") if is_chat else part["text"] for part in parts]
    told = [part["logprobs"] for part in parts if part["logprobs"]]
    names = ("content",) if is_chat else ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    log_probs = {name: [each for part in told for each in part[name]] for name in names}
    assert [part["finish_reason"] for part in parts[:-1]] == [None] * (len(parts) - 1)
    return "".join(texts), parts[-1]["finish_reason"], log_probs, len(told)


@pytest.mark.parametrize("is_chat", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_stream_has_the_samples_and_log_probs_of_the_whole(server, is_chat):
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    body = {"n": 2, "seed": 3, "max_tokens": 24, "stop": ["\n"]}
    body |= (
        {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 2}
        if is_chat
        else {"prompt": ["the cat", "a dog"], "logprobs": 2}
    )
    whole = ask(server, "POST", path, body).json["choices"]
    *events, usage = ask(
        server, "POST", path, body | {"stream": True, "stream_options": {"include_usage": True}}
    ).events
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 24
    pieces = 0
    for choice in whole:
        text, finish, log_probs, parts = joined(events, choice["index"], is_chat)
        assert text == (choice["message"]["content"] if is_chat else choice["text"])
        assert finish == choice["finish_reason"]
        pieces = max(pieces, parts)
        for name, want in log_probs.items():
            got = choice["logprobs"][name]
            assert json.dumps(want).count("token") == json.dumps(got).count("token") and len(want) == len(got)
        if not is_chat:
            assert log_probs["tokens"] == choice["logprobs"]["tokens"]
            assert log_probs["text_offset"] == choice["logprobs"]["text_offset"]
            assert log_probs["token_logprobs"] == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-4)
    assert len(whole) == (2 if is_chat else 4) and pieces > 2, "in parts"


@pytest.mark.parametrize("method", [pytest.param("greedy", marks=pytest.mark.slow), "safe_beam"])
def test_a_chats_logprobs_are_the_models_own(server, method):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 6, "logprobs": True, "top_logprobs": 3}
    reply = ask(server, "POST", "/v1/chat/completions", body | {"safelm": {"method": method}}).json
    (choice,) = reply["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == len(reply["safelm"]["tokens"])
    spelled = bytes(byte for each in content for byte in each["bytes"])
    assert spelled.decode(errors="replace") == choice["message"]["content"]
    if choice["finish_reason"] == "length":
        assert sum(each["logprob"] for each in content) == pytest.approx(reply["safelm"]["log_prob"], abs=1e-3)
    for each in content:
        assert len(each["top_logprobs"]) == 3 and each["logprob"] <= each["top_logprobs"][0]["logprob"] + 1e-6


def test_bias_and_penalties_reach_the_engine(server, served):
    def text(**fields):
        body = {"prompt": "the cat", "max_tokens": 8, "safelm": {"method": "greedy"}} | fields
        return ask(server, "POST", "/v1/completions", body).json["choices"][0]["text"]

    (token,) = served.tokenizer.encode(" the")
    assert text(logit_bias={str(token): 100}) == " the" * 8
    assert text(logit_bias={str(token): 100}, frequency_penalty=0, presence_penalty=0.0) == " the" * 8
    biased = {str(each): 50 for each in served.tokenizer.encode(" the dog")}
    assert set(text(logit_bias=biased).split()) <= {"the", "dog"}
    taking_turns = text(logit_bias=dict.fromkeys(biased, 100), frequency_penalty=2)
    assert taking_turns != text(logit_bias=dict.fromkeys(biased, 100))


@pytest.mark.parametrize("method", ["greedy", pytest.param("sample", marks=pytest.mark.slow)])
def test_a_text_keeps_to_its_json_schema(server, method):
    pytest.importorskip("llguidance", reason="grammars need llguidance, in the extra `scoring`")
    schema = {
        "type": "object",
        "properties": {"is_kind": {"type": "boolean"}, "kind": {"enum": ["cat", "dog"]}},
        "required": ["is_kind", "kind"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": schema, "strict": True}}
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60, "response_format": wanted}
    choice = ask(server, "POST", "/v1/chat/completions", body | {"safelm": {"method": method}}).json["choices"][0]
    found = json.loads(choice["message"]["content"])
    assert choice["finish_reason"] == "stop" and found.keys() == {"is_kind", "kind"}
    assert isinstance(found["is_kind"], bool) and found["kind"] in ("cat", "dog")
    anything = body | {"response_format": {"type": "json_object"}}
    text = ask(server, "POST", "/v1/chat/completions", anything).json["choices"][0]["message"]["content"]
    assert text.lstrip().startswith("{") or not text.strip()


def test_the_vocabulary_over_http(server):
    tokenizer = tiny_runs.tokenizer()
    info = ask(server, "GET", "/tokenizer_info").json
    assert info["eos_token"] == "<|endoftext|>" and info["bos_token"] is None

    def tokenize(text):
        return ask(server, "POST", "/tokenize", {"prompt": text, "add_special_tokens": False}).json["tokens"]

    assert tokenize("the caf\u00e9") == tokenizer.encode("the caf\u00e9")
    assert tokenize("<|endoftext|>") == [tokenizer.eos_id] and len(tokenize("a<|endoftext|>")) > 2
    back = ask(server, "POST", "/detokenize", {"tokens": tokenizer.encode("the caf\u00e9")}).json
    assert back == {"prompt": "the caf\u00e9"}
    for path, body in (
        ("/tokenize", {"prompt": 3}),
        ("/tokenize", {}),
        ("/detokenize", {"tokens": [10**9]}),
        ("/detokenize", {"tokens": "a"}),
    ):
        answer = ask(server, "POST", path, body)
        assert answer.status == 400 and answer.error["param"] in ("prompt", "tokens")
