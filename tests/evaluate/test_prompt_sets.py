"""Every set of prompts by ids and texts, for keeping them out of training data."""

import json

import pytest

from safelm.evaluate.suites.prompt_sets import read_prompt_sets


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_benchmarks_capability_tasks_and_folders_of_prompts_are_read(tmp_path):
    one, two = (write(tmp_path / f"{name}.jsonl", [{"goal": f"goal {name}"}]) for name in "ab")
    write(tmp_path / "gsm8k_test.jsonl", [{"question": "How many?", "answer": "#### 2"}])
    write(tmp_path / "gsm8k_train.jsonl", [{"question": "An example?", "answer": "#### 2"}])
    sentence = {"sentence": "The cup is in _ now.", "option1": "here", "option2": "there", "answer": "2"}
    write(tmp_path / "winogrande.jsonl", [sentence])
    prompt = {"category": "c", "topic": "t", "kind": "page", "protective": False}
    for name, is_harmful in (("harmful", True), ("safe", False)):
        write(tmp_path / f"{name}.jsonl", [{"id": name, "prompt": f"{name} page", "harmful": is_harmful} | prompt])
    sources = [f"advbench:{one}", f"advbench:{two}", f"capability:{tmp_path}", str(tmp_path)]
    assert read_prompt_sets(sources, "--decontaminate") == {
        "advbench": (["advbench/00001", "advbench/00001~2"], ["goal a", "goal b"]),
        "gsm8k": (["gsm8k/00001"], ["How many?"]),
        "winogrande": (["winogrande/00001"], ["The cup is in there now."]),
        "synthetic_web": (["harmful", "safe"], ["harmful page", "safe page"]),
    }


@pytest.mark.parametrize(
    "source, message",
    [
        ("advbench:{0}/no.csv", "--decontaminate=advbench:{0}/no.csv: {0}/no.csv: no such file"),
        ("advbench:{0}/empty.jsonl", "--decontaminate=advbench:{0}/empty.jsonl: holds no prompts"),
        ("planet:{0}", "--decontaminate=planet:{0}: want NAME:PATH with a name of advbench"),
        ("{0}", "--decontaminate={0}: there is no file harmful.jsonl"),
        ("capability:{0}", "--decontaminate=capability:{0}: {0} holds no file of a capability task"),
    ],
)
def test_an_unreadable_set_is_named_with_its_flag(tmp_path, source, message):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read_prompt_sets([source.format(tmp_path)], "--decontaminate")
    assert message.format(tmp_path) in str(error.value)
