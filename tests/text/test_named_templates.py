"""Chat templates given by name or file, and the token behind every document as a setting of its own."""

import json
import pickle
import re

import chat_folders
import pytest
import tiny_runs

from safelm.text import named_templates, prompting
from safelm.text.tokenizer import Tokenizer
from safelm.train import config as train_config

TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": " Hi. "},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye."},
]
RENDERED = {
    "chatml": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n Hi. <|im_end|>\n<|im_start|>assistant\nHello."
    "<|im_end|>\n<|im_start|>user\nBye.<|im_end|>\n<|im_start|>assistant\n",
    "gemma": "<B><start_of_turn>user\nBe kind.\n\nHi.<end_of_turn>\n<start_of_turn>model\nHello.<end_of_turn>\n"
    "<start_of_turn>user\nBye.<end_of_turn>\n<start_of_turn>model\n",
    "llama-2": "<B>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi. [/INST] Hello. <E><B>[INST] Bye. [/INST]",
    "llama-3": "<B><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "user-assistant": "Be kind.\n\nUser: Hi.\n\nAssistant: Hello.<E>\n\nUser: Bye.\n\nAssistant:",
}


@pytest.mark.parametrize("name", named_templates.NAMES)
def test_what_each_template_of_ours_writes_and_teaches(name):
    from safelm.text import chat_template

    def rendered(turns, open_answer):
        specials = {"bos_token": "<B>", "eos_token": "<E>"}
        source = named_templates.source(name)
        return chat_template.render(source, turns, add_generation_prompt=open_answer, special_tokens=specials)

    assert chat_template.without_marks(rendered(TURNS, True)) == RENDERED[name]
    if name != "chatml":  # whose spans are found without marks
        learned = rendered(TURNS, False).split(chat_template.LEARNED)[1].split(chat_template.LEARNED_END)[0]
        assert "Hello." in learned and "Hi." not in learned and learned.strip() != "Hello."


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as of the released instruct model: ChatML's tokens, its eos is a turn's end, no chat template."""
    folder = tmp_path_factory.mktemp("published")
    tiny_runs.tokenizer().save(str(folder))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template")
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|im_end|>"}))
    return folder


def test_a_template_by_file_is_used_and_kept_the_released_instruct_model_has_no_chat_template(published, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}<|im_end|>{% endfor %}[assistant]")
    own = Tokenizer.from_pretrained(published)
    given = own.with_chat_template(str(file))
    asked = prompting.chat_prompt(given, TURNS[1:2])
    assert own.decode(asked) == "[user]  Hi. <|im_end|>[assistant]"
    assert given.hash == own.hash and given.chat_template_hash != own.chat_template_hash
    given.save(str(tmp_path / "kept"))
    for again in (Tokenizer.from_pretrained(tmp_path / "kept"), pickle.loads(pickle.dumps(given))):
        assert prompting.chat_prompt(again, TURNS[1:2]) == asked
        assert again.chat_template_hash == given.chat_template_hash and again.conventions == given.conventions
    chatml = given.with_chat_template("chatml")
    assert prompting.chat_prompt(chatml, TURNS) == prompting.chat_prompt(own, TURNS)
    assert chatml.chat_template_hash == own.chat_template_hash


def test_a_template_that_cannot_be_is_told_in_one_line(published, tmp_path):
    own = Tokenizer.from_pretrained(published)
    for text, message in (
        ("", "mine.jinja: the file is empty"),
        ("{% for m in messages %}", "mine.jinja: chat template can't be rendered"),
        ("{{ raise_exception('no users') }}", "mine.jinja: chat template can't be rendered .no users"),
    ):
        (tmp_path / "mine.jinja").write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            own.with_chat_template(str(tmp_path / "mine.jinja"))
        assert "\n" not in str(caught.value)
    with pytest.raises(
        FileNotFoundError, match="'llama-4': no such file, and not one of chatml, gemma, llama-2, llama-3"
    ):
        own.with_chat_template("llama-4")
    with pytest.raises(
        ValueError, match=r"llama-3: writes <\|end_header_id\|>, which is no token of the vocabulary of"
    ):
        own.with_chat_template("llama-3")
    assert prompting.knows_chats(Tokenizer(chat_folders.backend()).with_chat_template("user-assistant"))


@pytest.mark.parametrize(
    "token", ["<|start|>", "<|\uff5cUser\uff5c|>", "<\uff5cUser\uff5c>", "<start_of_turn>", "</s>"]
)
def test_a_files_tokens_that_the_vocabulary_lacks_are_refused(published, tmp_path, token):
    file = tmp_path / "mine.jinja"
    for turn in ("{{ m.role }}: {{ m.content }}" + token, "{% if m.role == 'system' %}" + token + "{% endif %}"):
        file.write_text("{% for m in messages %}" + turn + "{% endfor %}")
        with pytest.raises(ValueError, match=rf"mine.jinja: writes {re.escape(token)}, which is no token of the"):
            Tokenizer.from_pretrained(published).with_chat_template(str(file))


@pytest.mark.parametrize(
    ("turn", "is_told"),
    [
        ("User: {{ m.content }}\n", False),
        ("<|im_start|>{{ m.content }}<|im_end|>{{ eos_token }}", False),
        ("{% if m.tool_calls %}<|python_tag|>{% endif %}{{ m.content }}", False),  # which no conversation of ours has
        ("<user>{{ m.content }}</user>", True),
        ("{{ m.content }}<think>", True),
    ],
)
def test_a_files_plain_words_stay_plain_words(published, tmp_path, caplog, turn, is_told):
    (tmp_path / "mine.jinja").write_text("{% for m in messages %}" + turn + "{% endfor %}")
    given = Tokenizer.from_pretrained(published).with_chat_template(str(tmp_path / "mine.jinja"))
    assert "Bye." in given.decode(prompting.chat_prompt(given, TURNS))
    assert ("it will be plain text" in caplog.text) is is_told


def test_the_instruct_tokenizers_eos_is_im_end_pretraining_needs_endoftext(published, tmp_path):
    own = Tokenizer.from_pretrained(published)
    assert own.conventions.special_tokens["eos_token"] == "<|im_end|>"
    assert own.special_token(own.eos_id) == "<|endoftext|>"  # what documents end with
    other = own.with_document_end("<|im_end|>")
    other.save(str(tmp_path))
    for again in (other, Tokenizer.from_pretrained(tmp_path), other.beginning_with([own.eos_id])):
        assert again.eos_id == own.chat_end_id == again.conventions.document_end_id and again.hash == own.hash
    with pytest.raises(ValueError, match=r"end of document 'the' is no special token; there are <.*<\|endoftext\|>"):
        own.with_document_end("the")


def test_a_run_refuses_stores_whose_documents_end_otherwise(tmp_path):
    inputs = tiny_runs.write_inputs(tmp_path)
    config = tiny_runs.tiny_config(inputs, document_end="<|im_end|>", chat_template="chatml")
    resolved = train_config.resolve(config)
    assert resolved.tokenizer.special_token(resolved.tokenizer.eos_id) == "<|im_end|>"
    from safelm.train.data import TrainData

    with pytest.raises(
        ValueError, match=r"end with '<\|endoftext\|>' .id 0., this run's with '<\|im_end\|>': give --conf"
    ):
        TrainData(resolved.config, resolved.tokenizer)
