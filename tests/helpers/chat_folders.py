"""Tokenizer folders of chat models with templates and special tokens of their own; no weights."""

import functools
import json
import pathlib

import gguf
import tokenizers
from tokenizers import AddedToken, processors

from safelm.text.tokenizer import Tokenizer

BOS, END, HEADER, HEADER_END, TURN_END = SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header|>",
    "<|header_end|>",
    "<|eot_id|>",
)
ROLES = ("<|user|>", "<|assistant|>")  # added, but not special
HEADERS = (
    "{{ bos_token }}{% for turn in messages %}<|header|>{{ turn.role }}<|header_end|>\n\n{{ turn.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|header_end|>\n\n{% endif %}"
)
GENERATION = (
    "{% for m in messages %}<|header|>{{ m.role }}<|header_end|>\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|eot_id|>{% endgeneration %}{% else %}{{ m.content }}<|eot_id|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|header_end|>\n{% endif %}"
)
ROLE_TOKENS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def _plain() -> str:
    """A small vocabulary without special tokens of ours."""
    spec = json.loads(Tokenizer.train(["the cat sat on the mat, and the dog sat too"] * 3, 300).to_json())
    ours = {token["content"] for token in spec["added_tokens"]}
    kept = {token: i for token, i in spec["model"]["vocab"].items() if token not in ours}
    spec["model"]["vocab"] = {token: place for place, token in enumerate(sorted(kept, key=kept.__getitem__))}
    return json.dumps(spec | {"added_tokens": []})


def backend(*, begins: bool = False, roles: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    """A byte-level vocabulary with the special tokens above; `begins`: its post-processor puts BOS in front."""
    made = tokenizers.Tokenizer.from_str(_plain())
    made.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    made.add_tokens([AddedToken(token, normalized=False, special=False) for token in roles])
    if begins:
        template = {"single": f"{BOS} $A", "pair": f"{BOS} $A {BOS} $B"}
        made.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=False),
                processors.TemplateProcessing(**template, special_tokens=[(BOS, made.token_to_id(BOS))]),
            ]
        )
    return made


def write(
    folder: pathlib.Path, made: tokenizers.Tokenizer, *, generation: dict | None = None, **config
) -> pathlib.Path:
    """The folder with tokenizer.json, tokenizer_config.json of `config`, and generation_config.json where given."""
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": END, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def write_gguf(path: pathlib.Path, made: tokenizers.Tokenizer, **fields) -> pathlib.Path:
    """The vocabulary as a GGUF file without tensors; `fields` by their keys behind "tokenizer."."""
    spec = json.loads(made.to_str())
    ids = made.get_vocab(with_added_tokens=True)
    special = {token["content"]: token["special"] for token in spec["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    kinds = {None: gguf.TokenType.NORMAL, True: gguf.TokenType.CONTROL, False: gguf.TokenType.USER_DEFINED}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([kinds[special.get(token)] for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in spec["model"]["merges"]])
    for key, value in fields.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(f"tokenizer.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
