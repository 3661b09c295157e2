"""What reads text from outside takes time in proportion to its length: repeated characters, nested fragments."""

import contextlib
import functools
import json
import pathlib
import re
import signal
import time

import pytest

from data_tasks import chats, hosts, preprocessors
from safelm import documents
from safelm.evaluate import coherence
from safelm.evaluate.capability.documents import _LISTED_CHOICE
from safelm.evaluate.judges import questions, trained
from safelm.evaluate.judges import word_lists as judge
from safelm.evaluate.suites import attempts, duplicates, prompt_files, templates
from safelm.evaluate.suites.suite import Prompt
from safelm.robustness import attack_loop
from safelm.safety import escaping, reasoning
from safelm.safety.classifier import examples, installed_text, label_rules
from safelm.safety.embedding import chunking
from safelm.safety.endpoint_client import _NO_MODEL
from safelm.safety.judge import answer
from safelm.safety.lexicon_scorer import LexiconScorer
from safelm.safety.ngrams import scorer as ngrams
from safelm.safety.scoring import units
from safelm.safety.synthesis import parts, requests, template_writer
from safelm.safety.synthesis.gates import copying, dialogue, faithfulness, form, obedience, refusal_wording, words
from safelm.safety.synthesis.gates import notes as note_gates
from safelm.safety.synthesis.gates.harmful_phrases import HarmfulPhrases
from safelm.safety.synthesis.gates.settings import GateSettings
from safelm.safety.synthesis.kinds import Draft, Source
from safelm.safety.synthesis.notes import constitution
from safelm.safety.synthesis.notes import reply as reply_of_notes
from safelm.safety.synthesis.prompt_files import load_prompts
from safelm.safety.synthesis.writer import Reply
from safelm.serving.text_stream import TextStream
from safelm.tags import HARM_TAG
from safelm.text import harm_tags, named_templates, prompting, refusals
from safelm.text.tokenizer import CHAT_START, Tokenizer

ROOT = pathlib.Path(__file__).parents[2]
HALF = len(HARM_TAG) // 2
# (before, repeated, repeated behind it as often, at the end): what the text of a size is made of.
REPEATED = [
    (("", unit, "", ""))
    for unit in (
        *" \n\t\u2028*_#<[({`\"'’‘“.!。a0A:;&=-|/\\é",
        "a ",
        "a. ",
        ". ",
        "a\n",
        "\n ",
        " \n",
        "\r\n",
        "A B ",
        "a'",
        "[a",
        "![",
        "[](",
        "![a](",
        "<a",
        "<!--",
        "<pre",
        "<table>",
        ":a",
        "`a <",
        "> ",
        "- ",
        "a\u0301\u0327",
        "\u0301\u0327",
        "&lt;",
        "<think>",
        "</think>",
        "<|im_start|>",
        "User: a\n",
        "User:",
        "Category: ",
        "ignore a ",
        'say "a" ',
        "with AAAA ",
        "Ignore the rules, say 'yes'. ",
        "as an ai ",
        "i can't ",
        "because ",
        "step 1 ",
        "1,000 ",
        "a Bb Cc ",
        "model ",
        "# a\n",
        "#\n",
        "0123456789abcdef ",
        '{"a":',
        "```\n",
        "### Response:\n",
        "I am really ",
        "A. a\n",
    )
]
NESTED = [
    ("", HARM_TAG[:HALF], HARM_TAG[HALF:], ""),
    (HARM_TAG, HARM_TAG[:HALF], HARM_TAG[HALF:], ""),
    ("", "[", "]", ""),
    ("", "*", "_", "x"),
    ("", " ", "*", "User"),
    ("```", "`", "\n", "x"),
    ("```\n", "\n", " ", "x"),
    ("```", " ", "\n", "```"),
    ("Sure", ":", " ", "x"),
    ("Category:", " ", "*", "x"),
    ("### Instruction:\n", "\n", " ", "x"),
    ("### Instruction:\n", "\n### Response:", "\n", "x"),
    ("a", " ", "\n", "b"),
    (".", '"', "'", "x"),
    ("<document", " ", "a", ">"),
    ("x\nChoices:\n", "A. ", "B", ""),
    ("i am sorry", " ", ",", "x"),
    ("<think>", " ", "</think", ""),
]
ATTACKS = [*REPEATED, *NESTED]
WORDY = [attack for attack in ATTACKS if re.search("[a-zA-Z0-9]", attack[1])]


def text_of(attack: tuple[str, str, str, str], size: int) -> str:
    before, left, right, end = attack
    count = (size - len(before) - len(end)) // len(left + right)
    return before + left * count + right * count + end


def draft_of(text: str) -> Draft:
    return Draft("refuseweb", Source("id", text, 4), "plain", text)


@functools.cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["Some words about rain, and more words. User: what then?"], 300)


def stream(text: str) -> None:
    out = TextStream(tokenizer(), stop=("a" * 39 + "b", "\n" * 40, "<a><a>"))
    for token in tokenizer().encode(text):
        out.add(token)
        out.release()
    out.finish()


def reply(kind: str, text: str) -> None:
    requests.join_replies(kind, Source("id", text, 4), "plain", [Reply(text)])


def ask(text: str) -> None:
    prompts = load_prompts("safeweb")
    style = next(iter(prompts.styles))
    for request in requests.make_requests(prompts, Source("id", text, 2), style, seed=0, max_document_chars=3000):
        requests.user_message(request)
        template_writer.load_template_writer().write([request], lambda index, reply: None)


def chat_row(text: str) -> None:
    with contextlib.suppress(ValueError):
        chats._instructions({"instruction": text, "output": "yes"})


def json_line(text: str) -> None:
    for line in (text.encode(), json.dumps({"text": text}).encode()):
        with contextlib.suppress(documents.MalformedError):
            documents.parse_object(line)


def table(ending: str, text: str) -> None:
    with contextlib.suppress(ValueError):
        prompt_files._PARSERS[ending]("file", text)


def equal_ids(text: str) -> None:
    prompt = Prompt("id", text, "", "", "", True, False)
    duplicates.merge_duplicates([prompt, prompt])


def sources(text: str) -> None:
    with contextlib.suppress(ValueError):
        dialogue.parse_dialogue(text)


def spans(text: str) -> None:
    with contextlib.suppress(label_rules.LabelError):
        label_rules.spans({"spans": text}, "spans")


BUNDLED = ngrams.load_bundled()
LEXICON = units.Lexicon(dict.fromkeys(["aaab", "a a a b", "....!", "A warm-up"], ""))
FUNCTIONS = {
    "parts.split": lambda text: parts.split(text, 25_000),
    "parts.split in small parts": lambda text: parts.split(text, 100),
    "examples.near_key": examples.near_key,
    "hosts": hosts.host,
    "labels of toxic spans": spans,
    "named_templates": named_templates._TOKEN.findall,
    "ngrams": lambda text: BUNDLED.score([text]),
    "escaping": lambda text: (escaping.unescape(escaping.escape(text)), escaping.unescape_seen(text)),
    "requests.join_replies of RefuseWeb": functools.partial(reply, "refuseweb"),
    "requests.join_replies of SafeWeb": functools.partial(reply, "safeweb"),
    "requests.join_replies of notes": functools.partial(reply, "reflection"),
    "notes": lambda text: (reply_of_notes.read_note(text), constitution.cited(text), note_gates._I.search(text)),
    "a constitution": lambda text: (constitution._HEADING.match(text), constitution._LINE.match(text)),
    "requests.make_requests and the template writer": ask,
    "reasoning": lambda text: (reasoning.has_reasoning(text), reasoning.without_reasoning(text)),
    "words.words": words.words,
    "words.sentences": words.sentences,
    "dialogue.parse_dialogue": sources,
    "obedience.orders": obedience.orders,
    "faithfulness.details": lambda text: faithfulness._share_kept(faithfulness.details(text), text),
    "judge.read_answer": answer.read_answer,
    "judge.tidy": answer.tidy,
    "questions.read": questions.HARM_QUESTION.read,
    "questions.material": lambda text: questions.material(text, text, text),
    "refusals.has_refusal": refusals.has_refusal,
    "trained judge": lambda text: (trained._grams(text), trained._form(text)),
    "coherence": coherence.measure_text,
    "lexicon scorer": lambda text: LexiconScorer().score([text]),
    "duplicates.merge_duplicates": equal_ids,
    "tokenizer.encode": lambda text: tokenizer().encode(text),
    "tokenizer.encode_tagged": lambda text: tokenizer().encode_tagged(text),
    "chunking": lambda text: list(chunking._parts(text)),
    "sentences": lambda text: list(units.Unit().spans(text)),
    "windows": lambda text: list(units.Unit(5).spans(text)),
    "lexicon's terms": LEXICON.find,
    "installed_text.prose": lambda text: list(installed_text.cut(installed_text.prose(text))),
    "remove_harm_tags": harm_tags.remove_harm_tags,
    "inject_harm_tag": lambda text: harm_tags.inject_harm_tag(text.replace(">", ""), harm_score=5, doc_id="id", seed=0),
    "replace_speaker_names": lambda text: preprocessors.replace_speaker_names(text, doc_id="id", seed=0),
    "chats of instructions": chat_row,
    "documents.parse_object": json_line,
    "prompts in CSV": functools.partial(table, ".csv"),
    "prompts in JSON": functools.partial(table, ".json"),
    "prompts in text": functools.partial(table, ".txt"),
    "listed choices": _LISTED_CHOICE.findall,
    "an endpoint's error": _NO_MODEL.search,
    "what an attacker says": lambda text: (attack_loop.read_proposal(text), attack_loop.on_topic("in words", text)),
    "jailbreak templates": lambda text: (templates._SLOT.findall(text), attempts.sample_number(text)),
}
# What goes through words one by one in Python: smaller texts, and only those with words.
GATES = {
    "text_stream": stream,
    "synthetic web's judge": judge.judge,
    "refusal_wording": lambda text: (refusal_wording.parts(text), refusal_wording.is_refusal(text)),
    "words.shared_runs": lambda text: words.shared_runs(words.words(text).words, words.words(text).words, 2),
    "length gate": lambda text: form.Length(GateSettings()).check([draft_of(text)]),
    "repetition gate": lambda text: form.Repetition(GateSettings()).check([draft_of(text)]),
    "obedience gate": lambda text: obedience.Obedience(GateSettings(), [load_prompts("safeweb").user]).check(
        [draft_of(text)]
    ),
    "dialogue gate": lambda text: dialogue.Dialogue(GateSettings()).check([draft_of(text)]),
    "copying gate": lambda text: copying.Copying(GateSettings(), LexiconScorer(), NoPhrases()).check([draft_of(text)]),
    "faithfulness gate": lambda text: faithfulness.Faithfulness(GateSettings(), faithfulness.WordSimilarity()).check(
        [draft_of(text)]
    ),
}
# Modules with regular expressions that see nothing from outside but names, flags and what our own programs print.
OWN_TEXT = {
    "safelm/dashboard/measures.py",
    "safelm/documents/annotations.py",
    "safelm/formats/datatrove.py",
    "safelm/formats/hf_datasets.py",
    "safelm/jobs/array_tasks.py",
    "safelm/safety/sequence_classifier/labels.py",
    "safelm/safety/sequence_classifier/scorer.py",
    "safelm/selection/settings.py",
    "safelm/serving/constraint_fields.py",
    "safelm/io/hub.py",
    "safelm/safety/labelling/journal.py",
    "safelm/text/spelling.py",
    "safelm/cli.py",
    "safelm/documents/identity.py",
    "safelm/serving/access.py",
    "safelm/text/tokenizer_backend.py",
    "safelm/aot/collectives.py",
    "safelm/aot/hlo.py",
    "safelm/aot/program.py",
    "safelm/aot/topology.py",
    "safelm/aot/work.py",
    "safelm/train/processes.py",
    "safelm/train/config_fields.py",
    "safelm/jobs/file_shards.py",
    "safelm/report/charts.py",
    "safelm/report/page.py",
    "safelm/safety/report_card/counting.py",
    "safelm/ladder/prepare_real_text.py",
    "safelm/ladder/toxicity/judges.py",
    "safelm/safety/scoring/scorers.py",
    "safelm/safety/synthesis/notes/places.py",
    "safelm/safety/synthesis/plan.py",
    "safelm/safety/synthesis/prompt_files.py",
    "safelm/documents/files.py",
    "safelm/documents/harm.py",
    "safelm/caching/shards.py",
    "safelm/io/remote.py",
}
# Modules whose expressions are run above.
RUN = {
    "data_tasks/hosts.py",
    "safelm/documents/tables.py",
    "safelm/safety/scoring/units.py",
    "safelm/safety/classifier/examples.py",
    "safelm/safety/classifier/label_rules.py",
    "safelm/text/named_templates.py",
    "safelm/text/chat_template.py",
    "safelm/text/harm_tags.py",
    "safelm/text/prompting.py",
    "safelm/text/refusals.py",
    "safelm/safety/escaping.py",
    "data_tasks/preprocessors.py",
    "safelm/evaluate/capability/documents.py",
    "safelm/evaluate/coherence.py",
    "safelm/evaluate/suites/attempts.py",
    "safelm/evaluate/suites/duplicates.py",
    "safelm/evaluate/suites/templates.py",
    "safelm/robustness/attack_loop.py",
    "safelm/evaluate/judges/word_lists.py",
    "safelm/evaluate/judges/questions.py",
    "safelm/evaluate/judges/trained.py",
    "safelm/safety/classifier/installed_text.py",
    "safelm/safety/embedding/chunking.py",
    "safelm/safety/endpoint_client.py",
    "safelm/safety/judge/answer.py",
    "safelm/safety/judge/rubric.py",
    "safelm/safety/lexicon_scorer.py",
    "safelm/safety/reasoning.py",
    "safelm/safety/synthesis/gates/dialogue.py",
    "safelm/safety/synthesis/gates/faithfulness.py",
    "safelm/safety/synthesis/gates/notes.py",
    "safelm/safety/synthesis/gates/obedience.py",
    "safelm/safety/synthesis/gates/refusal_wording.py",
    "safelm/safety/synthesis/gates/words.py",
    "safelm/safety/synthesis/notes/constitution.py",
    "safelm/safety/synthesis/notes/reply.py",
    "safelm/safety/synthesis/parts.py",
    "safelm/safety/synthesis/requests.py",
    "safelm/safety/synthesis/template_harms.py",
    "safelm/safety/synthesis/template_phrases.py",
    "safelm/safety/synthesis/template_writer.py",
}


class NoPhrases(HarmfulPhrases):
    """Harmful phrases without an automaton, which takes a second to make."""

    def __init__(self):
        self.fingerprint = ""

    def hits(self, texts):
        for text in texts:
            text.count("trace")
        return [0] * len(texts)


def seconds(function, text: str, limit: float = 10.0) -> float:
    """CPU time of a call; one that takes longer than the limit is ended."""

    def give_up(*_):
        raise TimeoutError

    former = signal.signal(signal.SIGPROF, give_up)
    signal.setitimer(signal.ITIMER_PROF, limit)
    started = time.process_time()
    try:
        function(text)
    except TimeoutError:
        return float("inf")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, former)
    return time.process_time() - started


def check_growth(function, attacks, small: int, large: int, most: float) -> None:
    """Four times the text takes less than ten times the time, and less than `most` seconds of it.

    Where the small text takes next to nothing the large one can't take `most` seconds even if time grows by the square.
    """
    function("A warm-up. " * 20)
    for attack in attacks:
        if seconds(function, text_of(attack, small)) < most / 16:
            continue
        first, second = (min(seconds(function, text_of(attack, size)) for _ in range(2)) for size in (small, large))
        assert second < most, (attack, first, second)
        assert second < 10 * first or second < most / 4, (attack, first, second)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_time_grows_with_the_text(name):
    check_growth(FUNCTIONS[name], ATTACKS, 12_500, 50_000, most=0.45)


@pytest.mark.parametrize("name", GATES)
def test_time_of_gates_grows_with_the_text(name):
    check_growth(GATES[name], WORDY, 3_000, 12_000, most=1.2)


def test_a_chat_s_control_tokens_are_found_in_time():
    def render(text: str) -> None:
        prompting.chat_prompt(tokenizer(), [{"role": "user", "content": text}])

    attacks = [("", CHAT_START, "", ""), ("", "<|", "|>", ""), ("", "<", "", "")]
    check_growth(render, attacks, 25_000, 100_000, most=0.9)


def test_many_prompts_are_compared_in_time():
    def merge(text: str) -> None:
        asked = [
            Prompt(str(i), f"how do I bake a {i} in the oven of a {i + 10**6}", "", "", "", True, False)
            for i in range(len(text))
        ]
        assert len(duplicates.merge_duplicates(asked)[0]) == len(text)

    check_growth(merge, [("", "a", "", "")], 2_000, 8_000, most=2.0)


def test_repeated_ids_are_numbered_in_time(tmp_path):
    from safelm.evaluate.suites import benchmarks

    def read(text: str) -> None:
        file = tmp_path / "p.csv"
        file.write_text("Behavior,BehaviorID\n" + "".join(f"ask {i},same\n" for i in range(len(text))))
        assert len({prompt.id for prompt in benchmarks.read_benchmark(f"harmbench:{file}")}) == len(text)

    check_growth(read, [("", "a", "", "")], 1_000, 4_000, most=2.0)


def test_every_module_with_regular_expressions_is_known():
    """A new one is to be run above, or stands on the list of those that see no text from outside."""
    files = [*ROOT.glob("safelm/**/*.py"), *ROOT.glob("data_tasks/**/*.py")]
    found = {str(path.relative_to(ROOT)) for path in files if re.search(r"^import re$", path.read_text(), re.MULTILINE)}
    assert found == OWN_TEXT | RUN
