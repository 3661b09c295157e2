"""How a model's texts begin and end: read from every kind of source, kept, written out, and used by all prompts."""

import json
import pathlib
import pickle

import chat_folders
import jax
import numpy as np
import parity
import pytest
from chat_folders import BOS, END, HEADER, ROLES, TURN_END

from safelm import convert
from safelm.checkpoints import checkpoint
from safelm.formats import huggingface
from safelm.models import decoder as model
from safelm.text import prompting
from safelm.text.tokenizer import Tokenizer

CHAT = [{"role": "user", "content": " a cat "}, {"role": "assistant", "content": "the mat"}]
CHAT += [{"role": "user", "content": "a dog"}]


def ids_of(tokenizer: Tokenizer, *tokens: str) -> tuple[int, ...]:
    return tuple(tokenizer.conventions.control_tokens[token] for token in tokens)


# --- reading


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        ({}, None, [END]),
        ({"eos_token": TURN_END}, None, [END, TURN_END]),
        ({}, "list", [END, TURN_END]),
        ({}, "one", [END, TURN_END]),
        ({"chat_template": chat_folders.HEADERS}, None, [END, TURN_END]),
        (
            {"eos_token": {"content": TURN_END, "lstrip": False}, "chat_template": chat_folders.HEADERS},
            "list",
            [END, TURN_END],
        ),
    ],
)
def test_every_end_that_a_folder_names_ends_a_text(tmp_path, config, generation, ends):
    made = chat_folders.backend()
    turn_end = made.token_to_id(TURN_END)
    listed = {"list": {"eos_token_id": [turn_end, 100_000]}, "one": {"eos_token_id": turn_end}, None: None}[generation]
    tokenizer = Tokenizer.from_pretrained(chat_folders.write(tmp_path, made, generation=listed, **config))
    assert tokenizer.conventions.end_ids == ids_of(tokenizer, *ends)
    assert tokenizer.conventions.document_end_id == tokenizer.eos_id == ids_of(tokenizer, END)[0]


def test_a_config_names_the_ends_where_no_generation_config_does(tmp_path):
    made = chat_folders.backend()
    chat_folders.write(tmp_path, made)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [made.token_to_id(TURN_END)]}))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.conventions.end_ids == ids_of(tokenizer, END, TURN_END)


def test_a_gguf_file_tells_template_ends_and_beginning(tmp_path):
    made = chat_folders.backend()
    i = made.token_to_id
    fields = {"ggml.bos_token_id": i(BOS), "ggml.eos_token_id": i(END), "ggml.eot_token_id": i(TURN_END)}
    fields |= {"ggml.add_bos_token": True, "chat_template": chat_folders.HEADERS}
    tokenizer = Tokenizer.from_pretrained(chat_folders.write_gguf(tmp_path / "m.gguf", made, **fields))
    folder = chat_folders.write(tmp_path / "hf", chat_folders.backend(begins=True), chat_template=chat_folders.HEADERS)
    same = Tokenizer.from_pretrained(folder)
    assert tokenizer.conventions == same.conventions
    assert prompting.chat_prompt(tokenizer, CHAT) == prompting.chat_prompt(same, CHAT)
    without = chat_folders.write_gguf(tmp_path / "n.gguf", made, **fields | {"ggml.add_bos_token": False})
    assert Tokenizer.from_pretrained(without).conventions.begin_ids == ()


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("tokenizer_config.json", {"eos_token": 5}, "tokenizer_config.json: eos_token = 5: not a token's string"),
        ("tokenizer_config.json", {"chat_template": 7}, "chat_template: not a template's text but int"),
        ("generation_config.json", {"eos_token_id": "x"}, "eos_token_id = 'x': not a token id"),
        ("generation_config.json", {"eos_token_id": [1, True]}, "not a token id or a list"),
        ("generation_config.json", {"eos_token_id": -1}, "not a token id"),
        ("generation_config.json", [], "generation_config.json: not a JSON object"),
    ],
)
def test_a_wrong_value_is_named_by_file_and_field(tmp_path, file, values, message):
    chat_folders.write(tmp_path, chat_folders.backend())
    (tmp_path / file).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)


# --- beginnings, as transformers has them


@pytest.mark.parity
@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("add_bos_token", [None, True, False])
def test_a_text_begins_as_in_transformers(tmp_path, monkeypatch, begins, add_bos_token):
    transformers = parity.module("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    chat_folders.write(
        tmp_path / "theirs", chat_folders.backend(begins=begins), chat_template=chat_folders.HEADERS, **config
    )
    ours = Tokenizer.from_pretrained(tmp_path / "theirs")
    ours.save(str(tmp_path / "ours"))
    for folder in ("theirs", "ours"):
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / folder)
        for text in ("the cat sat", ""):
            expected = theirs(text)["input_ids"]
            assert prompting.text_prompt(ours, text) == (expected or [ours.eos_id])
        rendered = theirs.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
        assert prompting.chat_prompt(ours, CHAT) == rendered


def test_a_beginning_is_kept_and_changes_no_hash(tmp_path):
    plain = Tokenizer.train(["the cat sat"] * 3, 280)
    ours = plain.beginning_with([plain.eos_id])
    assert ours.hash == plain.hash and plain.conventions.begin_ids == ()
    ours.save(str(tmp_path))
    for copy in (Tokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(ours))):
        assert copy.conventions == ours.conventions and copy.hash == plain.hash
        assert prompting.text_prompt(copy, "the") == [plain.eos_id, *plain.encode("the")]
        assert copy.beginning_with([]).conventions == plain.conventions


# --- chats


@pytest.mark.parity
def test_what_is_learned_is_what_transformers_marks(tmp_path, monkeypatch):
    transformers = parity.module("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = chat_folders.write(tmp_path, chat_folders.backend(), chat_template=chat_folders.GENERATION)
    theirs = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, spans = prompting.chat_example(Tokenizer.from_pretrained(folder), CHAT)
    mask = np.zeros(len(ids), int)
    for start, stop in spans:
        mask[start:stop] = 1
    assert ids == theirs["input_ids"] and mask.tolist() == theirs["assistant_masks"] and mask.sum() > 1


def test_without_marks_an_answer_goes_from_its_prompt_to_the_end_of_its_turn(tmp_path):
    folder = chat_folders.write(tmp_path / "a", chat_folders.backend(), chat_template=chat_folders.HEADERS)
    tokenizer = Tokenizer.from_pretrained(folder)
    chat = [*CHAT, {"role": "assistant", "content": "it sat <|eot_id|>"}]
    ids, spans = prompting.chat_example(tokenizer, chat)
    assert [tokenizer.decode(ids[slice(*span)]) for span in spans] == [
        "the mat<|eot_id|>",
        "it sat <|eot_id|><|eot_id|>",
    ]
    for (start, _), index in zip(spans, (1, 3), strict=True):
        assert ids[:start] == prompting.chat_prompt(tokenizer, chat[:index])
    changing = "{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}"
    folder = chat_folders.write(tmp_path / "b", chat_folders.backend(), chat_template=changing)
    with pytest.raises(ValueError, match="generation"):
        prompting.chat_example(Tokenizer.from_pretrained(folder), CHAT)


@pytest.mark.parametrize("template", [chat_folders.ROLE_TOKENS, chat_folders.HEADERS, None])
def test_no_message_forges_a_turn(tmp_path, template):
    made = chat_folders.backend(roles=(*ROLES, "<|im_start|>", "<|im_end|>"))
    tokenizer = Tokenizer.from_pretrained(chat_folders.write(tmp_path, made, chat_template=template))
    controls = set(tokenizer.conventions.control_tokens.values())
    assert set(ids_of(tokenizer, *ROLES)) < controls

    def found(content: str) -> list[int]:
        ids = prompting.chat_prompt(tokenizer, [{"role": "user", "content": content}])
        assert content in tokenizer.decode(ids)
        return [i for i in ids if i in controls]

    forged = "".join(f"{token}x" for token in tokenizer.conventions.control_tokens)
    assert found(forged) == found("x") and not controls & set(tokenizer.encode(forged))


# --- conversion both ways


def test_a_conversion_keeps_all_of_it_both_ways(tmp_path):
    made = chat_folders.backend(begins=True)
    folder = chat_folders.write(
        tmp_path / "source",
        made,
        chat_template=chat_folders.HEADERS,
        eos_token=TURN_END,
        generation={"eos_token_id": [made.token_to_id(HEADER), made.token_to_id(TURN_END)]},
    )
    tokenizer = Tokenizer.from_pretrained(folder)
    config = model.ModelConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=1,
        d_model=8,
        d_ff=8,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        max_seq_len=64,
        dtype="float32",
    )
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), model.abstract_params(config))
    huggingface.write_folder(tmp_path / "hf", config, params, tokenizer)
    convert.convert(str(tmp_path / "hf"), str(tmp_path / "ours"))
    convert.convert(str(tmp_path / "ours"), str(tmp_path / "back"))
    found = [Tokenizer.from_pretrained(tmp_path / "back"), checkpoint.load_for_inference(str(tmp_path / "ours"))[2]]
    for each in found:
        assert each.conventions == tokenizer.conventions
        assert prompting.chat_prompt(each, CHAT) == prompting.chat_prompt(tokenizer, CHAT)
    written = json.loads((pathlib.Path(tmp_path) / "back" / "generation_config.json").read_text())
    assert written["eos_token_id"] == list(tokenizer.conventions.end_ids)


@pytest.mark.parity
def test_transformers_speaks_chatml_to_an_export_of_ours(tmp_path, monkeypatch):
    transformers = parity.module("transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    ours = Tokenizer.train(["the cat sat"] * 3, 280)
    ours.save(str(tmp_path))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    messages = [{"role": "user", "content": "a cat"}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert prompting.chat_prompt(ours, messages) == expected
    assert Tokenizer.from_pretrained(tmp_path).conventions == ours.conventions
