"""Knobs, Any-Depth Alignment and self-stopping against single generations that do the same by hand; their command."""

import asyncio
import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import side_files
import tiny_runs

from safelm import calibrate_knob, generate
from safelm.evaluate.commands import flags as evaluate_flags
from safelm.inference import AnyDepth, Greedy, Knob, SafeBeam, Sampling, SelfStop, planner, planning, read_knob
from safelm.inference import generate as decode
from safelm.inference.engine import Engine
from safelm.inference.knob_values import Answering, knob_values
from safelm.inference.knobs import logit_bias
from safelm.inference.monitors import TagProbability
from safelm.inference.requests import EngineRequest
from safelm.models import decoder
from safelm.models.decoder import ModelConfig
from safelm.serving.errors import ApiError
from safelm.serving.generation import RunningGeneration
from safelm.serving.limits import Limits
from safelm.serving.models import ServedModel
from safelm.serving.replies import Replies, finish_reason
from safelm.serving.request import read_completion
from safelm.serving.worker import EngineWorker
from safelm.text.control_tokens import control_id, with_control_tokens
from safelm.text.prompting import text_prompt

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONTROLS = ("<refuse>", "<respond>", "<red_flag>", "<note>", "</note>")
TOKENIZER = with_control_tokens(tiny_runs.tokenizer(), CONTROLS)
ENDS = TOKENIZER.conventions.end_ids
CONFIG = ModelConfig(
    **tiny_runs.model_fields(vocab_size=TOKENIZER.vocab_size, num_layers=1, init_std=0.5, max_seq_len=64)
)
PROMPTS = [[5 + i, 6, 7 + 3 * i] for i in range(4)]  # of one bucket, as few programs as there can be
REFUSAL = Knob("refusal", "<refuse>", 0.5, "<respond>")
NEW = 10


@pytest.fixture(scope="module")
def params():
    return decoder.init(CONFIG, jax.random.key(0))


def answers(params, prompts=PROMPTS, method=Greedy(), *, new=NEW, tag=TOKENIZER.harm_tag_id, **settings):  # noqa: B008
    plan = planner(CONFIG, TOKENIZER, method, **settings)
    return decode(
        CONFIG, params, prompts, method, max_new_tokens=new, end_ids=ENDS, harm_tag_id=tag, seed=3, planner=plan
    )


def values(params, knob, method=Greedy()):  # noqa: B008
    given = Answering(method, NEW, ENDS, seed=3)
    tag = TOKENIZER.harm_tag_id
    found = knob_values(CONFIG, params, PROMPTS, knob.bound(TOKENIZER), given, harm_tag_id=tag)
    return found if knob.categories else found[:, 0]


def test_a_refusal_knob_chooses_the_first_token_and_the_method_goes_on(params):
    method = Sampling(temperature=2.0)
    of_prompts = values(params, REFUSAL)
    threshold = float(np.sort(of_prompts)[2])
    knob = dataclasses.replace(REFUSAL, threshold=threshold)
    refuse, respond = (control_id(TOKENIZER, token) for token in CONTROLS[:2])
    opened = [[*p, refuse if value >= threshold else respond] for p, value in zip(PROMPTS, of_prompts, strict=True)]
    by_hand = answers(params, opened, method, new=NEW - 1)
    assert [each.tokens for each in answers(params, method=method, knob=knob)] == [each.tokens for each in by_hand]
    assert sum(prompt[-1] == refuse for prompt in opened) == 2
    # The threshold as a bias of the token's logit: the same choice.
    odds = np.log(of_prompts / (1 - of_prompts))
    assert ((odds + logit_bias(threshold) >= -1e-6) == (of_prompts >= threshold)).all()


def test_a_category_has_a_threshold_of_its_own_and_the_likeliest_token_under_the_biases_begins(params):
    categories = {"<note>": 0.5, "</note>": 0.5}
    knob = dataclasses.replace(REFUSAL, categories=categories)
    values_PK = values(params, knob)
    thresholds = np.median(values_PK, axis=0)
    knob = dataclasses.replace(
        knob, threshold=thresholds[0], categories=dict(zip(categories, thresholds[1:], strict=True))
    )
    tokens = ["<respond>", *knob.thresholds]
    scores = np.log(values_PK / (1 - values_PK)) + [logit_bias(each) for each in thresholds]
    chosen = [tokens[k] for k in np.concatenate([np.zeros((len(PROMPTS), 1)), scores], axis=1).argmax(axis=1)]
    assert len(set(chosen)) > 2
    opened = [[*p, control_id(TOKENIZER, token)] for p, token in zip(PROMPTS, chosen, strict=True)]
    assert [a.tokens for a in answers(params, knob=knob)] == [a.tokens for a in answers(params, opened, new=NEW - 1)]


def test_thresholds_of_categories_keep_their_shares_and_a_joint_bound():
    values_NK = np.random.default_rng(0).random((400, 3))
    shares = {"a": 0.02, "b": 0.03, "c": 0.0}
    thresholds, facts = calibrate_knob.calibrate(values_NK, shares)
    over = values_NK >= list(thresholds.values())
    assert over.mean(axis=0).tolist() <= list(shares.values()) and not over[:, 2].any()
    assert facts["flagged"] == over.any(axis=1).sum() > over.sum(axis=0).max()
    assert facts["expected_at_most"] == pytest.approx(sum(facts["tokens"][t]["expected_at_most"] for t in "ab"))
    assert facts["flagged"] / 400 <= facts["expected_at_most"] <= 0.05 < facts["with_confidence_at_most"]
    # Of many samples the joint bound at 95% confidence holds in at least 95% for further prompts, here independent.
    drawn = np.random.default_rng(1).random((300, 200, 3))
    held = 0
    for each in drawn:
        found, bound = calibrate_knob.calibrate(each, shares)
        refused = 1 - np.prod([min(t, 1.0) for t in found.values()])
        held += refused <= bound["with_confidence_at_most"]
    assert held >= 0.95 * len(drawn)
    alone, of_one = calibrate_knob.calibrate(values_NK[:, :1], {"a": 0.05})
    assert of_one["expected_at_most"] <= 0.05 and alone["a"] == np.nextafter(np.sort(values_NK[:, 0])[-20], 1)


def test_a_red_flag_withholds_an_answer_along_which_it_becomes_likely(params):
    method = Sampling(temperature=2.0)
    flag = Knob("red_flag", "<red_flag>", 0.5, message="the cat")
    of_prompts = values(params, flag, method)
    threshold = float(np.sort(of_prompts)[2])
    found = answers(params, method=method, knob=dataclasses.replace(flag, threshold=threshold))
    plain = answers(params, method=method, tag=control_id(TOKENIZER, "<red_flag>"))
    message = TOKENIZER.encode("the cat")
    for value, each, free in zip(of_prompts, found, plain, strict=True):
        assert value >= max(free.tag_probs) - 1e-6 and control_id(TOKENIZER, "<red_flag>") not in free.tokens
        wanted = (message, "withheld") if value >= threshold else (free.tokens, free.stopped_by)
        assert (each.tokens, each.stopped_by) == wanted
        assert each.text_tokens == (message if value >= threshold else free.text_tokens)
        assert each.logprob == (0 if value >= threshold else pytest.approx(free.logprob, rel=1e-4))
    assert len({each.stopped_by == "withheld" for each in found}) == 2
    monitored = SafeBeam(monitor=TagProbability(TOKENIZER.harm_tag_id))
    with pytest.raises(ValueError, match="a knob of red_flag steers SafeBeam by itself"):
        answers(params, method=monitored, knob=flag)
    assert planner(CONFIG, TOKENIZER, monitored, knob=REFUSAL).flag_id is None


def test_any_depth_thinks_again_behind_the_header_and_a_refusal_there_is_the_answer(params, monkeypatch):
    method = AnyDepth(check_every=4, rethink_tokens=3)
    header = planning._header(method, TOKENIZER, True)
    assert TOKENIZER.decode(header) == "<|im_start|>assistant\n"
    plain = answers(params)
    monkeypatch.setattr(planning, "has_refusal", lambda text: False)
    assert [each.tokens for each in answers(params, method=method, is_chat=True)] == [each.tokens for each in plain]
    first = [[*prompt, *each.tokens[:4], *header] for prompt, each in zip(PROMPTS, plain, strict=True)]
    thoughts = [TOKENIZER.decode(each.text_tokens, keep_special=False) for each in answers(params, first, new=3)]
    refused = thoughts[0]
    monkeypatch.setattr(planning, "has_refusal", lambda text: text == refused)
    found = answers(params, method=method, is_chat=True)
    assert found[0].stopped_by == "withheld" and TOKENIZER.decode(found[0].tokens, keep_special=False) == refused
    others = [i for i, thought in enumerate(thoughts) if thought != refused and found[i].stopped_by != "withheld"]
    assert others and all(found[i].tokens == plain[i].tokens for i in others)
    with pytest.raises(ValueError, match="needs a chat, or a header that is given"):
        planner(CONFIG, TOKENIZER, method)
    assert planning._header(AnyDepth(header="the"), TOKENIZER, False) == tuple(TOKENIZER.encode("the"))


def test_self_stopping_withholds_at_the_verdict_and_hides_the_models_own_notes(params):
    open_id, close_id = (control_id(TOKENIZER, token) for token in ("<note>", "</note>"))
    verdict, unsafe, safe = planning._verdicts(TOKENIZER)
    method = SelfStop(check_every=4, message="the dog", threshold=1.0)
    plain = answers(params)
    without = [i for i, each in enumerate(plain) if open_id not in each.tokens]
    found = answers(params, method=method)
    assert without and all(found[i].tokens == plain[i].tokens for i in without)
    assert not any({open_id, close_id} & set(each.tokens) for each in found)
    # The first look, by hand.
    looks = [[*prompt, *each.tokens[:4], open_id, *verdict] for prompt, each in zip(PROMPTS, plain, strict=True)]
    engine = Engine(CONFIG, params, harm_tag_id=TOKENIZER.harm_tag_id, slots=4)
    shares = []
    for look in looks:
        engine.submit(EngineRequest(tuple(look), Greedy(), 1, ENDS, watch_ids=(unsafe, safe)))
        (update,) = engine.step()
        odds = np.exp(update.watched)
        shares.append(odds[0] / odds.sum())
    i = max(without, key=lambda i: shares[i])
    stopped = answers(params, method=dataclasses.replace(method, threshold=float(shares[i]) * 0.999))
    assert stopped[i].stopped_by == "withheld" and stopped[i].tokens == TOKENIZER.encode("the dog")
    # A model that begins a note at once: what it says there is read on and not shown.
    noted = jax.tree.map(lambda leaf: leaf, params)
    table = np.array(params["embedder"]["embedding"])
    table[open_id] = 4 * table[plain[0].tokens[2]]
    noted["embedder"] = {"embedding": table}
    assert open_id in answers(noted)[0].tokens
    shown = answers(noted, method=method)
    assert not any({open_id, close_id} & set(each.tokens) for each in shown) and shown[0].stopped_by != "withheld"
    (full,) = answers(noted, PROMPTS[:1], method=method, new=CONFIG.max_seq_len - 3)  # notes fill the context
    assert len(full.tokens) < CONFIG.max_seq_len - 3


def test_plans_end_in_the_engine_as_requests_do(params):
    plan = planner(CONFIG, TOKENIZER, AnyDepth(check_every=2), is_chat=True)
    engine = Engine(CONFIG, params, harm_tag_id=TOKENIZER.harm_tag_id, slots=4)
    request = EngineRequest((5, 6), AnyDepth(), NEW, ENDS, plan=plan)
    one, other = engine.submit(request), engine.submit(dataclasses.replace(request, prompt=(7,)))
    told = engine.step()
    engine.cancel(one)
    while not engine.is_idle:
        told += engine.step()
    assert [(update.request_id, update.finished) for update in told if update.request_id == one] == [(one, "cancelled")]
    assert [update.finished for update in told if update.request_id == other][-1] in ("eos", "length", "withheld")
    for change, message in (({"max_new_tokens": 99}, "make 101, more"), ({"mask": object}, "takes no token mask")):
        with pytest.raises(ValueError, match=message):
            engine.submit(dataclasses.replace(request, **change))
    with pytest.raises(ValueError, match="AnyDepth needs a request's plan"):
        engine.submit(dataclasses.replace(request, plan=None))
    with pytest.raises(ValueError, match="doesn't go with AnyDepth"):
        planner(CONFIG, TOKENIZER, AnyDepth(), is_chat=True, knob=Knob("red_flag", "<red_flag>", 0.5))


def served(params, knob, body):
    """A server's reply without HTTP: its text, what stopped it, and how many tokens its usage counts."""
    model = ServedModel(CONFIG, params, TOKENIZER, "m", None, knob)
    engine = functools.partial(Engine, CONFIG, params, harm_tag_id=model.watched_id, slots=4)
    request = read_completion({"max_tokens": NEW, **body}, Limits(), default_method="greedy")

    async def reply():
        worker = EngineWorker({"m": engine})
        worker.start()
        try:
            generation = await RunningGeneration.prepare(model, request, Limits())
            deadline = asyncio.get_running_loop().time() + 300
            text = "".join([chunk.text async for chunk in generation.chunks(worker, deadline=deadline)])
            await generation.finish(worker, deadline=deadline)
            counted = json.loads(Replies([generation]).whole())["usage"]["completion_tokens"]
            return text, finish_reason(generation.stopped_by), counted
        finally:
            worker.stop()

    return asyncio.run(reply())


def test_a_server_keeps_to_its_knob(params, caplog):
    prompt = text_prompt(TOKENIZER, "the cat")
    knob = dataclasses.replace(REFUSAL, threshold=1e-6)
    (opened,) = answers(params, [[*prompt, control_id(TOKENIZER, "<refuse>")]], new=NEW - 1)
    text, _, counted = served(params, knob, {"prompt": "the cat"})
    assert text == TOKENIZER.decode(opened.text_tokens, keep_special=False)
    assert counted == 1 + len(opened.tokens)  # with the refusal token, which counts against max_tokens too
    assert served(params, knob, {"prompt": "the cat", "max_tokens": 1})[1:] == ("length", 1)
    flag = Knob("red_flag", "<red_flag>", 1e-9, message="the dog")
    withheld = ("the dog", "content_filter", len(TOKENIZER.encode("the dog")))
    assert served(params, flag, {"prompt": "the cat"}) == withheld
    assert served(params, flag, {"prompt": "the cat", "max_tokens": 1})[1:] == ("content_filter", 1)
    full = {"prompt": [5] * (CONFIG.max_seq_len - 2), "max_tokens": 2, "logprobs": 1}
    assert served(params, flag, full) == (TOKENIZER.decode(TOKENIZER.encode("the dog")[:2]), "content_filter", 2)
    broken = jax.tree.map(lambda leaf: leaf * np.nan, params)
    many = {"safelm": {"method": "safe_beam", "num_beams": 8}}
    for values_, body, status, message in (
        (params, many, 400, "num_beams=8 is more than the engine's 4 slots"),  # told before the knob's look
        (broken, {}, 500, "the model's log-probs are not numbers"),
    ):
        with pytest.raises(ApiError, match=message) as told:
            served(values_, knob, {"prompt": "the cat", **body})
        assert told.value.status == status and told.value.code != "context_length_exceeded"
    assert "the engine ended a request: the model's log-probs are not numbers" in caplog.text
    never = dataclasses.replace(flag, threshold=1.0)
    (plain,) = answers(params, [prompt], tag=control_id(TOKENIZER, "<red_flag>"))
    assert served(params, never, {"prompt": "the cat"})[2] == len(plain.tokens)
    with pytest.raises(ApiError, match="needs a chat"):
        served(params, None, {"prompt": "the cat", "safelm": {"method": "any_depth", "check_every": 8}})


def test_the_command_sets_a_threshold_that_generate_and_evaluate_use(params, tmp_path, capsys, monkeypatch):
    model = calibrate_knob.lm.LanguageModel(CONFIG, params, TOKENIZER)
    monkeypatch.setattr(calibrate_knob.lm, "load", lambda *_, **__: model)
    rows = [json.dumps({"prompt": text}) for text in ("the cat", "on", "mat", "sat the")]
    for name, some in (("all", rows), ("safe", rows[:3]), ("harmful", rows[3:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(some))

    def command(module, *argv):
        module.main(module.arguments().parse_args(["--checkpoint=m=x", *argv]))
        return capsys.readouterr().out

    safe, path = f"--safe_prompts={tmp_path}/safe.jsonl", f"{tmp_path}/knobs/knob.json"
    ask = ["--kind=refusal", safe, f"--harmful_prompts={tmp_path}/harmful.jsonl", f"--output={path}"]
    said = command(calibrate_knob, *ask, "--max_over_refusal=0.3")
    knob = read_knob(path)
    side_files.assert_only_documents("calibrate_knob", tmp_path / "knobs")
    assert "refuses 0 of 3 safe prompts; of further ones at most 25.00% are expected, " in said
    assert "harmful prompts refused: " in said and knob.calibration["flagged"] == 0
    lines = command(generate, f"--prompts_file={tmp_path}/all.jsonl", f"--knob={path}", "--max_new_tokens=3", "--json")
    assert len(lines.splitlines()) == 4
    assert evaluate_flags.knob([path], "m", ["m", "n"]) == evaluate_flags.knob([f"m={path}"], "m", ["m", "n"]) == knob
    assert evaluate_flags.knob([f"n={path}"], "m", ["m", "n"]) is None
    for argv, message in (
        ([*ask, "--max_over_refusal=0.05"], "safe.jsonl: 3 prompts; to refuse at most 0.05 of safe ones at least 19"),
        ([*ask, "--max_over_refusal=2"], "--max_over_refusal=2.0: must be above 0 and below 1"),
        ([*ask, "--max_over_refusal=0.3", "--token=<no>"], "the vocabulary has no control token '<no>'"),
    ):
        with pytest.raises(ValueError, match=message):
            command(calibrate_knob, *argv)
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"--safe_prompts=.*none.jsonl: no prompts in it"):
        command(calibrate_knob, *ask, f"--safe_prompts={tmp_path}/none.jsonl", "--max_over_refusal=0.3")
    by_category = ["--category=<note>=0.26", "--category=</note>", "--max_over_refusal=0.8"]
    said = command(calibrate_knob, *ask, *by_category)
    assert (
        "together: refuses" in said
        and "threshold" in said
        and list(read_knob(path).categories) == ["<note>", "</note>"]
    )
    assert "<note> never refuses" in command(calibrate_knob, *ask, "--category=<note>=0", "--max_over_refusal=0.3")
    for more, message in (
        (["--category=<respond>"], "--category=<respond>: want a refusal token"),
        (["--category=<note>", "--category=<note>=0.1"], "--category=<note>: want a refusal token, each once"),
        (["--category=<note>=2"], "--category=<note>=2: must be at least 0 and below 1"),
        (["--category=<note>=abc"], "--category=<note>=abc: the share 'abc' is no number"),
        (["--category=<note>=0.3"], "add up to 0.3, and leave nothing for <refuse>"),
        (["--category=<note>=0", "--category=<refuse>=0"], "--category=<note>=0: the share of every token is 0: none"),
        (["--category=<note>=0.2"], "to refuse at most 0.1 of safe ones by <refuse> at least 9 are needed"),
        (["--category=<note>", "--kind=red_flag"], "--category=<note>: goes with --kind=refusal only"),
    ):
        with pytest.raises(ValueError, match=message):
            command(calibrate_knob, *ask, "--max_over_refusal=0.3", *more)
    other = with_control_tokens(TOKENIZER, ["<more>"])
    with pytest.raises(ValueError, match=f"{path}: calibrated with the vocabulary {TOKENIZER.hash[:12]}, and "):
        read_knob(path).bound(other)
    flag = dataclasses.replace(knob, calibration={"parameters": 7, "method": "greedy", "max_new_tokens": 64})
    assert flag.beyond_calibration(7, "greedy", 32, is_chat=True) == []
    for given, said in (
        ((8, "greedy", 64), "parameters 7"),
        ((7, "beam", 1), "greedy"),
        ((7, "greedy", 65), "64, here"),
    ):
        (line,) = flag.beyond_calibration(*given, is_chat=True)
        assert said in line
    with pytest.raises(FileNotFoundError, match=r"nosuch.json: no such file of a knob"):
        read_knob(tmp_path / "nosuch.json")
    for values_, message in (
        ({"kind": "x"}, "kind 'x': one of refusal, red_flag"),
        ({"a": 1}, "unknown field 'a'"),
        ({"threshold": 2}, "threshold is 2: must be above 0 and no more than 1"),
        ({"categories": {"b": 0.5}}, "categories b: red_flag has none, refusal may"),
        ({"kind": "refusal", "other": "o", "categories": {"b": 2}}, "threshold of b is 2: must be above 0"),
        ({"kind": "refusal", "other": "o", "categories": {"a": 0.5}}, "token is 'a': must be a string and none of"),
        ({"origin": "a"}, "unknown field 'origin'"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps({"kind": "red_flag", "token": "a", "threshold": 1} | values_))
        with pytest.raises(ValueError, match=f"bad.json: .*{message}"):
            read_knob(tmp_path / "bad.json")
