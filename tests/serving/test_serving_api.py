"""The API over real sockets with an engine that computes nothing: replies, streams, fields, methods, scoring."""

import json
import re

import pytest
import tiny_runs
from serving_fakes import FakeEngine, running, tiny_model, wait_for
from serving_fakes import http as ask

from safelm.inference import Beam, Greedy, SafeBeam, Sampling, TagPenalty, tag_probability
from safelm.inference.methods import METHODS
from safelm.serving.errors import ApiError
from safelm.serving.limits import Limits
from safelm.serving.request import read_completion
from safelm.text.prompting import chat_prompt

TEXT = " the cat sat on the mat"
TOKENIZER = tiny_runs.tokenizer()
LIMITS = Limits(prompt_tokens=200, new_tokens=450, score_tokens=100)


@pytest.fixture(scope="module")
def server(script):
    models = {name: tiny_model(name, seed) for seed, name in enumerate(("raw", "safety"))}
    engines = dict.fromkeys(models, lambda: FakeEngine(script))
    with running(models, engines, limits=LIMITS) as up:
        yield up


@pytest.fixture(autouse=True)
def reset(script):
    script.text, script.ids, script.hold_at = TEXT, None, None
    script.requests.clear()


def complete(server, **fields):
    return ask(server, "POST", "/v1/completions", {"prompt": "one", "max_tokens": 100} | fields)


def chat(server, **fields):
    return ask(server, "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]} | fields)


def test_a_completion_has_what_openai_clients_expect_and_p_tag_of_every_token(server, script):
    reply = complete(server, model="safety", safelm={"method": "greedy"}).json
    assert reply["object"] == "text_completion" and reply["id"].startswith("cmpl-") and reply["model"] == "safety"
    assert reply["choices"] == [{"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}]
    ids = TOKENIZER.encode(TEXT)
    prompt_tokens, new = len(TOKENIZER.encode("one")), len(ids) + 1
    assert reply["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new,
        "total_tokens": prompt_tokens + new,
    }
    safelm = reply["safelm"]
    assert [token["id"] for token in safelm["tokens"]] == ids
    assert "".join(token["text"] for token in safelm["tokens"]) == TEXT
    assert [token["tag_prob"] for token in safelm["tokens"]] == [round(0.01 * (i + 1), 2) for i in range(len(ids))]
    assert safelm["method"] == "greedy" and safelm["settings"] == {"tag_candidate": "mask"}
    assert safelm["stopped_by"] == "eos" and safelm["log_prob"] == -1.5
    assert safelm["summary"]["max"] == round(0.01 * len(ids), 2) and safelm["summary"]["argmax"] == len(ids) - 1
    assert script.requests[0].end_ids == TOKENIZER.conventions.end_ids


def test_a_chat_is_rendered_and_ends_with_its_turn(server, script):
    reply = chat(server, max_completion_tokens=100).json
    assert reply["object"] == "chat.completion"
    assert reply["choices"][0]["message"] == {"role": "assistant", "content": TEXT, "refusal": None}
    (request,) = script.requests
    messages = [{"role": "user", "content": "hi"}]
    assert list(request.prompt) == chat_prompt(TOKENIZER, messages)
    assert request.end_ids == TOKENIZER.conventions.end_ids


def test_a_chat_may_have_parts_a_developer_and_history(server, script):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": parts, "name": "someone"},
        {"role": "assistant", "content": "yes", "refusal": None},
        {"role": "user", "content": "<|im_end|>"},
    ]
    assert chat(server, messages=messages).status == 200
    rendered = [
        {"role": role, "content": content}
        for role, content in (("system", "be kind"), ("user", "hi"), ("assistant", "yes"), ("user", "<|im_end|>"))
    ]
    want = chat_prompt(TOKENIZER, rendered)
    assert list(script.requests[0].prompt) == want
    assert want.count(TOKENIZER.chat_end_id) == 4, "a message can't close its turn"


@pytest.mark.parametrize("is_chat", [False, True])
def test_a_stream_says_the_same_as_the_whole(server, is_chat):
    send = chat if is_chat else complete
    whole = send(server, max_tokens=100, safelm={"method": "greedy"}).json
    answer = send(
        server, max_tokens=100, safelm={"method": "greedy"}, stream=True, stream_options={"include_usage": True}
    )
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, usage = answer.events
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert all(event["usage"] is None for event in events)
    assert len({event["id"] for event in answer.events}) == 1
    choices = [event["choices"][0] for event in events]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    if is_chat:
        assert choices[0]["delta"]["role"] == "assistant" and all("role" not in each["delta"] for each in choices[1:])
        text = "".join(choice["delta"].get("content", "") for choice in choices)
    else:
        text = "".join(choice["text"] for choice in choices)
    assert text == TEXT
    told = {key: value for event in events for key, value in event["safelm"].items() if key != "tokens"}
    tokens = [token for event in events for token in event["safelm"].get("tokens", ())]
    assert {"tokens": tokens} | told == whole["safelm"]


def test_streams_send_whole_characters_and_hold_back_what_may_be_a_stop_string(server, script):
    script.text = "caf\u00e9 \U0001f642 END of it"
    events = complete(server, stream=True, stop=["END of us", "\nUser"]).events
    texts = [event["choices"][0]["text"] for event in events]
    assert "".join(texts) == script.text and not any("\ufffd" in text for text in texts)
    assert not any(text.endswith(("E", "EN", "END", "END ", "END o", "END of")) for text in texts[:-3])
    reply = complete(server, stop="END").json
    assert reply["choices"][0]["text"] == "caf\u00e9 \U0001f642 " and reply["choices"][0]["finish_reason"] == "stop"
    assert reply["safelm"]["stopped_by"] == "stop" and reply["safelm"]["log_prob"] is None
    assert "".join(token["text"] for token in reply["safelm"]["tokens"]) == reply["choices"][0]["text"]


def test_a_stop_string_cancels_what_is_left(server, script):
    script.text, script.hold_at, before = "a b " * 50, 10, len(script.cancelled)  # it can't end by itself first
    complete(server, stop=["b"])
    wait_for(lambda: len(script.cancelled) == before + 1, "the engine's request is cancelled")


def test_length_and_other_ends(server, script):
    reply = complete(server, max_tokens=3).json
    assert reply["choices"][0]["finish_reason"] == "length" and reply["safelm"]["stopped_by"] == "length"
    assert reply["usage"]["completion_tokens"] == 3
    reply = complete(server, safelm={"stop_above": 0.035}).json
    assert len(reply["safelm"]["tokens"]) == 3 and reply["safelm"]["stopped_by"] == "threshold"
    assert reply["choices"][0]["finish_reason"] == "content_filter"
    script.ids = [*TOKENIZER.encode("ab"), TOKENIZER.eos_id, *TOKENIZER.encode("cd")]
    assert chat(server).json["choices"][0]["message"]["content"] == "ab", "the end of a document ends a turn too"


def test_special_tokens_are_named_and_have_no_text(server, script):
    script.ids = [*TOKENIZER.encode("a"), TOKENIZER.chat_start_id, *TOKENIZER.encode("b")]
    reply = complete(server).json
    assert reply["choices"][0]["text"] == "ab"
    assert [token.get("special") for token in reply["safelm"]["tokens"]] == [None, "<|im_start|>", None]


def test_without_max_tokens_a_completion_has_16_and_a_chat_what_fits(server, script):
    ask(server, "POST", "/v1/completions", {"prompt": "one"})
    chat(server)
    first, second = script.requests
    assert first.max_new_tokens == 16 and second.max_new_tokens == LIMITS.new_tokens < 512 - len(second.prompt)
    chat(server, messages=[{"role": "user", "content": "a b" * 40}])
    assert script.requests[2].max_new_tokens == 512 - len(script.requests[2].prompt) < LIMITS.new_tokens


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({}, Sampling()),
        ({"temperature": 0}, Greedy()),
        ({"temperature": 0.5, "top_p": 0.9, "safelm": {"top_k": 7}}, Sampling(temperature=0.5, top_p=0.9, top_k=7)),
        ({"safelm": {"method": "greedy", "tag_candidate": "stop"}}, Greedy(tag_candidate="stop")),
        ({"safelm": {"method": "beam", "num_beams": 3, "length_penalty": 1}}, Beam(num_beams=3, length_penalty=1.0)),
        ({"safelm": {"method": "safe_beam", "drop_fraction": 0.3}, "temperature": 0}, SafeBeam(drop_fraction=0.3)),
        ({"safelm": {"method": "safe_beam", "drop_above": 0.02, "anchor": 1}}, SafeBeam(drop_above=0.02, anchor=1.0)),
        ({"safelm": {"method": "tag_penalty", "penalty": 3}, "top_p": 0.8}, TagPenalty(penalty=3.0, top_p=0.8)),
    ],
    ids=str,
)
def test_methods(server, script, fields, method):
    assert complete(server, **fields).status == 200
    assert script.requests[0].method == method


@pytest.mark.parametrize("default_method", METHODS)
def test_a_temperature_of_0_never_takes_the_servers_steering_away(default_method):
    def read(**fields):
        return read_completion({"prompt": "one", **fields}, LIMITS, default_method=default_method).steering.method

    if default_method == "tag_penalty":
        with pytest.raises(ApiError, match=r"temperature=0.0: the server's method tag_penalty draws") as refused:
            read(temperature=0)
        assert refused.value.status == 400 and refused.value.param == "temperature"
    else:
        assert read(temperature=0) == (Greedy() if default_method == "sample" else read())
    assert read(temperature=0, safelm={"method": "greedy"}) == Greedy()


def test_seeds(server, script):
    for seed in (7, 7, -1, 2**64 - 1, None, None):
        assert complete(server, seed=seed).status == 200
    seeds = [request.seed for request in script.requests]
    assert seeds[0] == seeds[1] == 7 and len({*seeds}) == 5 - (seeds[2] == seeds[3])
    assert all(0 <= seed < 2**31 for seed in seeds)


def test_a_trace_on_request(server):
    reply = complete(server, safelm={"method": "safe_beam", "want_trace": True}).json["safelm"]
    assert len(reply["trace"]) == len(reply["tokens"]) + 1  # the ending token has no text
    for step, token in zip(reply["trace"], reply["tokens"], strict=False):
        (chosen,) = [candidate for candidate in step if candidate.get("chosen")]
        assert chosen["id"] == token["id"] and chosen["outcome"] == "kept"
        assert {candidate["outcome"] for candidate in step} == {"kept", "dropped", "outranked"}
    assert "trace" not in complete(server, safelm={"method": "safe_beam"}).json["safelm"]


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": None}, "prompt", "prompt is missing"),
        ({"prompt": 5}, "prompt", "want a string or an array of token ids"),
        ({"prompt": ["a"] * 33}, "prompt", "33 prompts: want at most 32"),
        ({"prompt": ["a", 5]}, "prompt", "want a string or an array"),
        ({"prompt": ["a"] * 9, "n": 4}, "n", "n=4: with 9 prompts more than 32 choices"),
        ({"prompt": [1, True]}, "prompt", "want a string or an array"),
        ({"prompt": [99999]}, "prompt", "id 99999 is not in the model's vocabulary of"),
        ({"prompt": "\ud800"}, "prompt", "lone surrogate at character 0"),
        ({"prompt": "ab" * 500}, "prompt", "tokens: want at most 200"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens=0: want an integer from 1 to 450"),
        ({"max_tokens": 451}, "max_tokens", "want an integer from 1 to 450"),
        ({"max_tokens": 10.5}, "max_tokens", "max_tokens=10.5: want an integer"),
        ({"max_tokens": True}, "max_tokens", "max_tokens=True: want an integer"),
        ({"prompt": [5] * 180, "max_tokens": 400}, "prompt", "180 tokens and max_tokens=400 make 580, more than"),
        ({"n": 33}, "n", "n=33: want an integer from 1 to 32"),
        ({"n": 2, "best_of": 3}, "best_of", "best_of is not supported: want it absent or equal to n=2"),
        ({"logprobs": 21}, "logprobs", "logprobs=21: want an integer from 0 to 20"),
        ({"logprobs": True}, "logprobs", "logprobs=True: want an integer"),
        ({"echo": 1}, "echo", "want true or false"),
        ({"echo": True, "stream": True}, "echo", "echo=true: not in a stream"),
        ({"n": 2, "safelm": {"method": "beam", "want_trace": True}}, "safelm.want_trace", "only with one choice"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5", "logit_bias.5=101: want a number from -100 to 100"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "logit_bias: 'five': want a token id"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "id 99999 is not in the model's vocabulary of"),
        ({"logit_bias": {str(i): 1 for i in range(65)}}, "logit_bias", "at most 64 token ids"),
        ({"presence_penalty": 2.1}, "presence_penalty", "want a number from -2 to 2"),
        ({"frequency_penalty": 1, "safelm": {"method": "beam"}}, "frequency_penalty", "method beam does not take it"),
        ({"logit_bias": {"5": 1}, "safelm": {"method": "safe_beam"}}, "logit_bias", "method safe_beam does not"),
        (
            {"presence_penalty": 1, "safelm": {"method": "any_depth"}},
            "presence_penalty",
            "method any_depth does not take it",
        ),
        ({"response_format": {"type": "yaml"}}, "response_format.type", "one of text, json_object, json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema", "want an object"),
        (
            {"response_format": {"type": "json_object"}, "safelm": {"method": "tag_penalty"}},
            "response_format",
            "method tag_penalty does not take it; want greedy or sample",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {"type": "null"}}}}},
            "response_format",
            "not",
        ),
        ({"temperature": 2.5}, "temperature", "want a number from 0 to 2"),
        ({"temperature": "hot"}, "temperature", "temperature='hot'"),
        ({"top_p": 0}, "safelm", "top_p=0.0"),
        ({"stop": ["a"] * 9}, "stop", "up to 8 strings"),
        ({"stop": [""]}, "stop", "of 1 to 200 characters"),
        *(({"stop": value}, "stop", "want a string or up to 8 strings") for value in (False, 0, {})),
        ({"stream": "yes"}, "stream", "want true or false"),
        ({"temprature": 1}, "temprature", "unknown field 'temprature'"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "unknown field 'stream_options.x'"),
        ({"safelm": 4}, "safelm", "safelm='a number': want an object"),
        ({"safelm": {"methd": "beam"}}, "safelm.methd", "unknown field 'safelm.methd'"),
        ({"safelm": {"method": "beems"}}, "safelm.method", "want one of greedy, sample, beam, safe_beam, tag_penalty"),
        ({"safelm": {"method": "beam", "num_beams": 9}}, "safelm.num_beams", "want an integer from 1 to 8"),
        ({"safelm": {"method": "greedy", "num_beams": 2}}, "safelm.num_beams", "method greedy does not take it"),
        ({"safelm": {"method": "safe_beam", "drop_fraction": 1}}, "safelm.drop_fraction", "from 0 to 0.99"),
        ({"safelm": {"method": "safe_beam", "tag_candidate": "allow"}}, "safelm", "one of mask, stop"),
        ({"safelm": {"method": "safe_beam"}, "temperature": 0.7}, "temperature", "safe_beam does not draw"),
        ({"safelm": {"method": "sample"}, "temperature": 0}, "temperature", "ask for greedy instead"),
        ({"safelm": {"method": "greedy", "want_trace": True}}, "safelm.want_trace", "no candidates to show"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_wrong_fields_are_named(server, script, fields, param, message):
    answer = complete(server, **fields)
    assert answer.status == 400
    assert answer.error["param"] == param and message in answer.error["message"]
    assert answer.error["type"] == "invalid_request_error" and not script.requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_object", "x": 1}}, "response_format.x"),
        ({"chat_template_kwargs": json.loads('{"a":' * 65 + "1" + "}" * 65)}, "chat_template_kwargs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"prompt": "hi"}, "prompt"),
    ],
    ids=str,
)
def test_wrong_chat_fields_are_named(server, fields, param):
    answer = chat(server, **fields)
    assert answer.status == 400 and answer.error["param"] == param


def test_fields_that_ask_for_nothing_are_accepted(server):
    neutral = {
        "n": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "user": "me",
        "metadata": {"a": "b"},
        "stream": False,
        "stream_options": None,
        "tools": [],
        "tool_choice": "none",
        "store": False,
        "response_format": {"type": "text"},
        "logprobs": False,
        "top_p": 1,
        "seed": 3,
        "parallel_tool_calls": True,
        "service_tier": "auto",
    }
    assert chat(server, **neutral).status == 200


def test_as_many_shapes_are_compiled_as_allowed(script):
    with running({"tiny": tiny_model()}, {"tiny": lambda: FakeEngine(script)}, limits=Limits(shapes=3)) as server:

        def ask_for(method, **settings):
            return complete(server, safelm={"method": method} | settings)

        for _ in range(2):
            assert [ask_for("beam", num_beams=beams).status for beams in (4, 3)] == [200, 200]
            assert ask_for("safe_beam", num_beams=3, num_candidates=2).status == 200
            for settings in ({"num_candidates": 3}, {"num_beams": 2}):
                answer = ask_for("safe_beam", **settings)
                assert answer.status == 400 and answer.error["code"] == "too_many_shapes"
            assert ask_for("safe_beam", num_beams=3, num_candidates=2, drop_fraction=0.123).status == 200
            assert ask_for("greedy").status == ask_for("sample", top_k=3).status == 200


def test_models(server):
    listed = ask(server, "GET", "/v1/models").json
    assert [model["id"] for model in listed["data"]] == ["raw", "safety"] and listed["object"] == "list"
    assert listed["data"][0]["safelm"]["limits"]["new_tokens"] == 450
    assert ask(server, "GET", "/v1/models/safety").json == listed["data"][1]
    assert complete(server).json["model"] == "raw", "the first where none is named"
    for answer in (complete(server, model="gpt"), ask(server, "GET", "/v1/models/gpt")):
        assert answer.status == 404 and answer.error["code"] == "model_not_found"
        assert "want one of raw, safety" in answer.error["message"]


def test_a_score_is_p_tag_after_every_token(server):
    text = "the d\u00f6g sat"
    reply = ask(server, "POST", "/v1/safelm/score", {"input": text, "model": "safety"}).json
    ids = TOKENIZER.encode(text)
    model = tiny_model(seed=1)
    (want,) = tag_probability(model.config, model.params, [ids], harm_tag_id=TOKENIZER.harm_tag_id)
    assert [token["id"] for token in reply["tokens"]] == ids
    assert "".join(token["text"] for token in reply["tokens"]) == text
    assert [token["tag_prob"] for token in reply["tokens"]] == pytest.approx(want.tolist(), rel=1e-4)
    assert reply["summary"]["max"] == max(token["tag_prob"] for token in reply["tokens"])
    assert ask(server, "POST", "/v1/safelm/score", {"input": ids}).json["usage"]["prompt_tokens"] == len(ids)
    assert len(ask(server, "POST", "/v1/safelm/score", {"input": ""}).json["tokens"]) == 1, "as after a document"


@pytest.mark.parametrize(
    ("fields", "param"), [({"input": "a b " * 200}, "input"), ({}, "input"), ({"input": "a", "x": 1}, "x")], ids=str
)
def test_wrong_scores_are_refused(server, fields, param):
    answer = ask(server, "POST", "/v1/safelm/score", fields)
    assert answer.status == 400 and answer.error["param"] == param


def test_health_and_metrics(server):
    assert ask(server, "GET", "/health").json == {"status": "ok"}
    complete(server, safelm={"method": "greedy"})
    answer = ask(server, "GET", "/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    text = answer.body.decode()
    value = re.search(r'^safelm_generations_total{method="greedy",model="raw",stopped_by="eos"} (\S+)$', text, re.M)
    assert float(value[1]) >= 1
    assert re.search(r'^safelm_requests_total{route="/v1/completions",status="200"} \S+$', text, re.M)
    assert 'safelm_engine_active{model="safety"} 0.0' in text and "safelm_open_requests 0.0" in text
    assert "process_resident_memory_bytes" in text


def test_paths_and_methods(server):
    assert ask(server, "GET", "/nothing").status == 404 and ask(server, "GET", "/nothing").error
    answer = ask(server, "GET", "/v1/completions")
    assert answer.status == 405 and answer.error and "POST" in answer.headers["allow"]
    assert ask(server, "GET", "/playground/../serve.py").status == 404
