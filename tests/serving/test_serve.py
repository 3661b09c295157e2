"""The server on the real engine with a tiny model, and the command: what is served is what the library generates."""

import asyncio
import concurrent.futures
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import side_files
import tiny_runs
from serving_fakes import http as ask
from serving_fakes import running, tiny_model, wait_for

from safelm import inference, serve
from safelm.checkpoints import checkpoint
from safelm.inference import Greedy, SafeBeam
from safelm.inference.engine import Engine
from safelm.serving import app, models
from safelm.serving.limits import Limits

ROOT = Path(__file__).parents[2]
TOKENIZER = tiny_runs.tokenizer()
PROMPTS = ["the cat", "the dog did not"]
NEW = 8
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def model():
    made = tiny_model()
    spread = jax.tree.map(lambda leaf: leaf * 8, made.params)  # else every token is as likely as any other
    return dataclasses.replace(made, params=spread)


@pytest.fixture(scope="module")
def server(model):
    def engine():
        return Engine(model.config, model.params, harm_tag_id=TOKENIZER.harm_tag_id, slots=4, steps_per_call=2)

    with running({"tiny": model}, {"tiny": engine}, limits=Limits(new_tokens=400)) as up:
        yield up


def complete(server, prompt, **fields):
    answer = ask(server, "POST", "/v1/completions", {"prompt": prompt, "max_tokens": NEW} | fields)
    assert answer.status == 200, answer.body
    return answer


def generated(model, method):
    return inference.generate(
        model.config,
        model.params,
        [TOKENIZER.encode(prompt) for prompt in PROMPTS],
        method,
        max_new_tokens=NEW,
        end_ids=[TOKENIZER.eos_id],
        harm_tag_id=TOKENIZER.harm_tag_id,
    )


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        (Greedy(), {"method": "greedy"}),
        (SafeBeam(2, 3), {"method": "safe_beam", "num_beams": 2, "num_candidates": 3, "want_trace": True}),
    ],
    ids=str,
)
def test_served_is_what_the_library_generates(server, model, method, fields):
    with concurrent.futures.ThreadPoolExecutor() as pool:  # all at once
        replies = [reply.json for reply in pool.map(lambda each: complete(server, each, safelm=fields), PROMPTS)]
    for want, reply in zip(generated(model, method), replies, strict=True):
        shown = want.text_tokens
        assert [token["id"] for token in reply["safelm"]["tokens"]] == shown
        assert reply["choices"][0]["text"] == TOKENIZER.decode(shown, keep_special=False)
        got = [token["tag_prob"] for token in reply["safelm"]["tokens"]]
        assert got == pytest.approx(want.tag_probs[: len(shown)], rel=1e-3)
        assert reply["safelm"]["stopped_by"] == want.stopped_by
        assert reply["safelm"]["log_prob"] == pytest.approx(want.logprob, abs=1e-3)
        if "want_trace" in fields:
            chosen = [[each["id"] for each in step if each.get("chosen")] for step in reply["safelm"]["trace"]]
            assert chosen[: len(want.tokens)] == [[token] for token in want.tokens]
            for step in reply["safelm"]["trace"]:
                dropped = [each["tag_prob"] for each in step if each["outcome"] == "dropped"]
                others = [each["tag_prob"] for each in step if each["outcome"] != "dropped"]
                assert len(dropped) == len(step) // 2
                assert max(others) <= min(dropped, default=1.0), "those with the highest P(tag)"


def test_a_seed_gives_the_same_text_whatever_else_is_running(server):
    fields = {"temperature": 1.0, "seed": 11}
    alone = complete(server, PROMPTS[0], **fields).json["choices"]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        others = [pool.submit(complete, server, prompt, seed=seed) for seed, prompt in enumerate(PROMPTS)]
        assert complete(server, PROMPTS[0], **fields).json["choices"] == alone
        assert all(other.result().status == 200 for other in others)
    texts = {json.dumps(complete(server, PROMPTS[0], seed=seed).json["choices"]) for seed in range(4)}
    assert len(texts) > 1


def test_a_stream_is_the_whole_in_parts(server):
    whole = complete(server, PROMPTS[1], safelm={"method": "greedy"}).json["choices"][0]["text"]
    events = complete(server, PROMPTS[1], safelm={"method": "greedy"}, stream=True).events
    assert len(events) > 2 and "".join(event["choices"][0]["text"] for event in events) == whole


def test_beams_stream_what_all_of_them_share(server):
    fields = {"max_tokens": 60, "safelm": {"method": "safe_beam", "num_beams": 2, "num_candidates": 3}}
    whole = complete(server, PROMPTS[0], **fields).json
    events = complete(server, PROMPTS[0], **fields, stream=True).events
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
    tokens = [token for event in events for token in event["safelm"].get("tokens", ())]
    assert tokens == whole["safelm"]["tokens"] and len(events) > 4
    assert events[-1]["safelm"]["log_prob"] == whole["safelm"]["log_prob"]


def test_safe_beam_goes_by_the_servers_monitor(folder):
    """In the place of P(tag): of the words that a refusal begins with, at a header."""
    spec = "refusal?header=%0AOn&words=the|a"
    loaded = models.load_model("tiny", str(folder), monitor=spec)
    method = loaded.steered(SafeBeam(2, 3))
    assert method.monitor is loaded.monitor and loaded.steered(Greedy()) == Greedy()

    def engine():
        return Engine(loaded.config, loaded.params, harm_tag_id=TOKENIZER.harm_tag_id, slots=2, steps_per_call=2)

    fields = {"method": "safe_beam", "num_beams": 2, "num_candidates": 3}
    with running({"tiny": loaded}, {"tiny": engine}) as up:
        told = complete(up, PROMPTS[0], safelm=fields).json["safelm"]
    (want,) = loaded.complete([loaded.encode(PROMPTS[0], is_chat=False)], method, max_new_tokens=NEW)
    got = [token["tag_prob"] for token in told["tokens"]]
    assert told["settings"]["monitor"].startswith("refusal ")
    assert got == pytest.approx(list(want.tag_probs)[: len(got)], rel=1e-3)
    knob = inference.Knob("red_flag", TOKENIZER.special_token(TOKENIZER.harm_tag_id), 0.5)
    with pytest.raises(ValueError, match=r"--monitor=tag: a knob of red_flag steers SafeBeam by itself"):
        models.load_model("tiny", str(folder), monitor="tag", knob=knob)


def test_who_goes_away_gives_everything_back(server):
    worker = server.server.service.worker
    fields = {"max_tokens": 400, "safelm": {"method": "greedy"}}
    assert complete(server, "the cat", **fields).json["choices"][0]["finish_reason"] == "length", "it goes on and on"
    with server.connect() as client:
        body = json.dumps({"prompt": "the cat", "stream": True} | fields).encode()
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert b"200 OK" in client.recv(100)
        wait_for(lambda: worker.tokens_reserved["tiny"] > 0, "it has a slot")
    wait_for(lambda: worker.tokens_reserved == worker.num_active == worker.num_waiting == {"tiny": 0}, "all is free")


def test_what_never_fits_the_cache_is_refused(model):
    def engine():
        return Engine(model.config, model.params, harm_tag_id=TOKENIZER.harm_tag_id, slots=2, max_tokens=128)

    with running({"tiny": model}, {"tiny": engine}) as server:
        body = {"prompt": "the cat", "max_tokens": 200, "safelm": {"method": "beam", "num_beams": 2}}
        answer = ask(server, "POST", "/v1/completions", body)
        assert answer.status == 400 and answer.error["code"] == "context_length_exceeded"
        assert "the engine's has 128" in answer.error["message"] and answer.error["param"] == "prompt"
        body["safelm"]["num_beams"] = 4
        error = ask(server, "POST", "/v1/completions", body).error
        assert "more than the engine's 2 slots" in error["message"]
        assert error["param"] == "safelm.method" and error["code"] is None

    async def begin(method):
        config = app.ServerConfig(Limits(), port=0, default_method=method)
        async with app.serving(config, {"tiny": model}, {"tiny": engine}):
            pass

    asyncio.run(begin("greedy"))
    for method, why in (("safe_beam", "num_beams=4 is more than the engine's 2 slots"), ("self_stop", "<note>")):
        with pytest.raises(ValueError, match=rf"method={method}: model tiny: .*{why}"):
            asyncio.run(begin(method))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("served") / "tiny"
    checkpoint.save_params(str(path), model.config, model.params, TOKENIZER)
    return path


def test_a_checkpoints_own_chat_template_is_used(folder):
    template = "{% for m in messages %}<|im_start|>[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}>"
    config = folder / "tokenizer" / "tokenizer_config.json"
    saved = config.read_text()
    config.write_text(json.dumps({"chat_template": template, "eos_token": "<|endoftext|>"}))
    try:
        loaded = models.load_model("tiny", str(folder))
    finally:
        config.write_text(saved)
    messages = ({"role": "system", "content": "a"}, {"role": "user", "content": "<|im_end|>"})
    ids = loaded.encode(messages, is_chat=True)
    assert TOKENIZER.decode(ids) == "<|im_start|>[system] a<|im_end|><|im_start|>[user] <|im_end|><|im_end|>>"
    assert ids.count(TOKENIZER.chat_end_id) == 2, "a message can't close its turn"
    assert TOKENIZER.chat_end_id in loaded.end_ids


def start_command(*flags):
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["SAFELM_TESTS_XLA"],
    }
    command = [sys.executable, "-m", "safelm.serve", "--port=0", *flags]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT
    )


def test_the_command_serves_and_ends_gracefully(folder):
    flags = ["--method=greedy", "--steps_per_call=2", "--grace_seconds=300", "--warm_tokens=100"]
    process = start_command(f"--checkpoint=mine={folder}", *flags)
    try:
        url = re.search(r"http://\S+", process.stdout.readline())[0]

        @dataclasses.dataclass
        class Where:
            address: tuple[str, int]

        where = Where(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        assert [each["id"] for each in ask(where, "GET", "/v1/models").json["data"]] == ["mine"]
        with concurrent.futures.ThreadPoolExecutor() as pool:
            body = {"prompt": "the cat", "max_tokens": 200, "stream": True}
            reply = pool.submit(ask, where, "POST", "/v1/completions", body)
            wait_for(lambda: b"safelm_open_requests 1.0" in ask(where, "GET", "/metrics").body, "it is under way")
            process.send_signal(signal.SIGTERM)
            assert reply.result().events[-1]["safelm"]["method"] == "greedy", "what is under way is finished"
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out == "", err
        assert "model mine" in err and "the cat" not in err
        assert "warming up: compiling the first programs (mine)" in err and "warm after" in err
        side_files.assert_only_documents("serve", folder)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint=/no/such/folder"], "/no/such/folder: no such file or folder"),
        (["--checkpoint=a=x", "--checkpoint=a=y"], "--checkpoint=a=y: the name a is given twice"),
        (["--checkpoint=a b=x"], "--checkpoint=a b=x: want NAME=DIR"),
        (["--checkpoint=x", "--port=70000"], "--port=70000: want 0 to 65535"),
        (["--checkpoint=x", "--slots=0"], "--slots=0: must be at least 1"),
        (["--checkpoint=x", "--prefix_tokens=-1"], "--prefix_tokens=-1: must be at least 0"),
        (["--checkpoint=x", "--request_seconds=-1"], "--request_seconds=-1.0: must be above 0"),
        (["--checkpoint=x", "--method=best"], "--method: invalid choice: 'best'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_flags_are_named(flags, message, capsys):
    from safelm import cli

    with pytest.raises(SystemExit) as ended:
        cli.run(serve.main, serve.arguments(), flags)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(folder, server):
    port = server.address[1]
    with pytest.raises(OSError, match=rf"--port={port}: can't listen there on 127\.0\.0\.1"):
        serve.main(serve.arguments().parse_args([f"--checkpoint={folder}", f"--port={port}"]))
