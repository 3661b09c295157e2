"""Monitors compared: measures by hand, thresholds from development alone, the command, and bad input."""

import json

import numpy as np
import pytest
import random_decoders

import safelm
from safelm.checkpoints import checkpoint
from safelm.evaluate.commands import measure as evaluate
from safelm.evaluate.commands import monitors as command
from safelm.evaluate.monitors import measures, probes
from safelm.evaluate.monitors.cases import Case
from safelm.safety.monitors import read_head
from safelm.safety.monitors.loading import parse_monitors
from safelm.text.tokenizer import Tokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")


def case(name, levels, *, asks=False, answers=False, group=""):
    """A case of a prompt of one token and an answer with these levels, and all of its levels."""
    return Case(name, group or name, asks, answers, (len(name),), tuple(range(len(levels) - 1))), np.array(levels)


HARMFUL = [case(f"h{'x' * i}", [0.2 + i / 10, 0.1, 0.6, 0.9], asks=True, answers=True) for i in range(4)]
MISSED = [case("missed-one", [0.9, 0.1, 0.1, 0.2], asks=True, answers=True)]
SAFE = [case(f"safe-{'x' * (i + 20)}", [0.1, 0.2, 0.3 + i / 100, 0.1]) for i in range(10)]
DECLINED = [case(f"declined-{'x' * (i + 40)}", [0.5, 0.55, 0.1, 0.1], asks=True) for i in range(2)]


def test_thresholds_allow_as_many_false_alarms_as_were_asked_for():
    cases, levels = zip(*[*SAFE, *HARMFUL], strict=True)
    for allowed, alarms in ((0.0, 0), (0.1, 1), (0.25, 2), (0.99, 9)):
        threshold = measures.alarm_threshold(cases, levels, allowed)
        found = [bool((measures.answer_levels(*pair) >= threshold).any()) for pair in SAFE]
        assert sum(found) == alarms
    with pytest.raises(ValueError, match="no safe chats"):
        measures.alarm_threshold([HARMFUL[0][0]], [HARMFUL[0][1]], 0.1)


def test_measures_by_hand():
    cases, levels = zip(*[*HARMFUL, *MISSED, *SAFE, *DECLINED], strict=True)
    found = measures.measure(cases, levels, 0.5)
    value = {name: figure["value"] for name, figure in found.items()}
    assert value["detected"] == 4 / 5 and value["false_alarms"] == 0 and value["alarms_on_declined"] == 1
    assert value["delay"] == 2  # the second token of the answer is the first to reach .5
    asked = [0.2, 0.3, 0.4, 0.5, 0.9, 0.5, 0.5]
    assert value["prompt_auroc"] == pytest.approx(np.mean([(a > 0.1) + 0.5 * (a == 0.1) for a in asked]))
    assert value["answer_auroc"] == pytest.approx(4 / 5)  # the missed one's .2 is below every safe peak
    positive = np.array([0.1, 0.6, 0.9] * 4 + [0.1, 0.1, 0.2])
    negative = np.concatenate([levels_T[1:] for _, levels_T in SAFE])
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    assert value["token_auroc"] == pytest.approx(wins.mean())
    assert all(figure["low"] <= figure["value"] <= figure["high"] for figure in found.values())
    alone = [Case(each.id, each.group, each.asks_harm, None, each.prompt_ids) for each in cases]
    assert set(measures.measure(alone, [of[:1] for of in levels], None)) == {"prompt_auroc"}


def test_a_group_is_in_one_half():
    names = [(kind, i) for i in range(20) for kind in "hs"]
    cases = [case(f"{kind}{i}", [0, 0], answers=kind == "h", group=f"{kind}{i % 5}")[0] for kind, i in names]
    parts = probes.halves(cases)
    assert len(parts.train) + len(parts.chosen_on) == 40
    assert not {each.group for each in parts.train} & {each.group for each in parts.chosen_on}
    assert {each.answers_harm for each in parts.train} == {each.answers_harm for each in parts.chosen_on}
    with pytest.raises(ValueError, match="1 groups with harmful cases"):
        probes.halves([case("h", [0, 0], answers=True)[0], *(each for each in cases if not each.answers_harm)])


def test_tokens_of_answers_alone_are_thinned_and_no_batch_of_states_is_kept(place, monkeypatch):
    lm = safelm.load(place / "model")
    cases = [Case(str(i), "g", True, True, tuple(range(5, 45)), tuple(range(5, 14))) for i in range(40)]
    kept, concatenate = [], np.concatenate
    monkeypatch.setattr(probes.np, "concatenate", lambda parts, **how: kept.append(parts) or concatenate(parts, **how))
    for most, wanted in (
        (400, 400),
        (200, 200),
        (399, 200),
        (150, 134),
        (3, 3),
    ):  # a case has 10, the prompt's last too
        monkeypatch.setattr(probes, "MOST_TOKENS", most)
        states_LND, scores_N = probes._states_of(lm, cases, (1, 2), ())
        assert states_LND.shape[1] == len(scores_N) == wanted
        assert all(part.base is None for part in kept[-1] if part.ndim == 3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Labelled answers in which one word tells, prompts of the synthetic web, and a model of random weights."""
    folder = tmp_path_factory.mktemp("monitors")
    words = [f"word{i}" for i in range(8)]
    vocabulary = Tokenizer.train([" ".join([*words, "vultox"])] * 20, 300)
    config, params = random_decoders.wild_model(vocabulary.vocab_size, 128)
    checkpoint.save_params(str(folder / "model"), config, params, vocabulary)
    rng = np.random.default_rng(0)
    for name, count in (("development", 24), ("test", 12)):
        rows = []
        for number in range(count):
            harmful = number % 2 == 0
            answer = [str(word) for word in rng.choice(words, 6)]
            answer = ["vultox" if harmful and i > 1 else word for i, word in enumerate(answer)]
            label = "harmful" if harmful else "harmless"
            asked = " ".join([name, *map(str, rng.choice(words, 4))])  # which says nothing of the answer
            row = {"prompt": asked, "response": " ".join(answer), "label": label}
            rows.append(row | {"kind": "compliance" if harmful else "chat"})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(place, output, *flags):
    argv = [f"--checkpoint=model={place / 'model'}", f"--output={output}", "--template=text", *flags]
    command.main(command.parser().parse_args(argv))
    return json.loads((output / "monitors.json").read_text())


def test_the_command_trains_probes_on_development_and_safe_beam_takes_them(place, tmp_path, capsys):
    flags = [f"--labelled={place / 'test.jsonl'}", f"--development={place / 'development.jsonl'}", "--monitor=tag"]
    flags += ["--monitor=probe", "--monitor=header_probe?header=%0Aword1&every=2", "--false_alarms=0"]
    found = run(place, tmp_path / "out", *flags)
    assert set(found["monitors"]) == {"tag", "probe", "header_probe"}
    assert found["cases"]["test"] == {"harmful_answers": 6, "safe_chats": 6, "declined": 0, "prompts": 12}
    probe = found["monitors"]["probe"]
    assert probe["token_auroc"]["value"] > 0.8 and probe["detected"]["value"] > 0.8
    assert probe["delay"]["value"] >= 2  # the word stands from the third word on
    costs = {name: of["cost"] for name, of in found["monitors"].items()}
    assert costs["tag"]["extra_flops"] == 0 < costs["probe"]["extra_flops"] < costs["header_probe"]["extra_flops"]
    assert all(of["cost"]["microseconds"] > 0 for of in found["monitors"].values())
    report = (tmp_path / "out" / "monitors.md").read_text()
    assert "vultox" not in report and "vultox" not in (tmp_path / "out" / "monitors.json").read_text()
    assert "header_probe" in capsys.readouterr().out
    head = read_head(str(tmp_path / "out" / "probe"))
    again = run(place, tmp_path / "out", *flags)  # trains nothing anew
    assert again["monitors"]["probe"]["fingerprint"] == probe["fingerprint"]
    other = [flag.replace("word1", "word2") for flag in flags]
    with pytest.raises(ValueError, match="trained on other development cases or another header"):
        run(place, tmp_path / "out", *other)
    lm = safelm.load(place / "model")
    monitor = safelm.load_monitor(str(tmp_path / "out" / "probe"), lm)
    assert monitor == head.monitor(monitor.name)


def test_evaluate_adds_safe_beam_by_a_monitor(place, tmp_path):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    row = {"prompt": "word1", "category": "a", "topic": "t", "kind": "completion", "protective": False}
    for name, harmful in (("harmful", True), ("safe", False)):
        lines = [json.dumps(row | {"id": f"{name}-{i}", "harmful": harmful}) + "\n" for i in range(2)]
        (prompts / f"{name}.jsonl").write_text("".join(lines))
    labelled = [f"--labelled={place / 'test.jsonl'}", f"--development={place / 'development.jsonl'}"]
    run(place, tmp_path / "out", *labelled, "--monitor=probe")
    head = read_head(str(tmp_path / "out" / "probe"))
    argv = [f"--checkpoint=model={place / 'model'}", f"--prompts={prompts}", "--methods=greedy", "--max_new_tokens=3"]
    argv += [f"--monitor=mine={tmp_path / 'out' / 'probe'}", f"--output={tmp_path / 'evaluated'}", "--drop_above=0.1"]
    evaluate.main(evaluate.evaluate_flags.parser("").parse_args(argv))
    results = json.loads((tmp_path / "evaluated" / "results.json").read_text())
    assert [of["method"] for of in results["runs"]] == ["greedy", "safe_beam_mine"]
    settings = results["runs"][1]["protocol"]["method_settings"]
    assert settings["monitor"] == f"mine {head.monitor('mine').fingerprint}" and settings["drop_above"] == 0.1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "want one of --prompts, --labelled and --data"),
        (["--labelled={test}"], "--development: needed"),
        (["--labelled={test}", "--development={test}"], "12 of its prompts are among those that are measured"),
        (["--labelled={test}", "--false_alarms=1"], "--false_alarms=1.0: must be a share"),
        (["--labelled={test}", "--development={dev}", "--monitor=probe?x=1"], "--monitor=probe"),
    ],
    ids=str,
)
def test_bad_input_is_named(place, tmp_path, flags, message):
    named = {"test": place / "test.jsonl", "dev": place / "development.jsonl"}
    with pytest.raises(ValueError, match=message):
        run(place, tmp_path / "out", *(flag.format(**named) for flag in flags))
    with pytest.raises(ValueError, match="is there already; NAME=b/probe names it"):
        parse_monitors(["a/probe", "b/probe"])
