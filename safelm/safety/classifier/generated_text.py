"""Safe pages written by the installed SmolLM2: its answers to harmless requests for texts of the kinds the web has.

In labelled answers of assistants, whoever writes at length and complies is mostly doing harm: refusals are what is safe
there. So a head trained on them takes a company's home page for harmful. These pages are as long and as compliant, and
about gardens, hotels and football. They need no download, and the same requests and seed give the same pages.
"""

import dataclasses
import functools
import itertools

import jax
import numpy as np

from safelm.formats import gguf
from safelm.inference import decode, methods
from safelm.safety.classifier.examples import GENERATED, Example, limit_of
from safelm.safety.classifier.harm_kinds import HARMLESS
from safelm.safety.embedding.backbone import installed_path
from safelm.text.prompting import prompt_ids
from safelm.text.tokenizer import Tokenizer

KINDS = (
    "a news report",
    "a post of a personal blog",
    "the home page of a small business",
    "a customer's review",
    "a product page of an online shop",
    "a post in a discussion forum",
    "a list of tips",
    "an encyclopedia article",
    "an announcement of a local event",
    "a travel guide",
    "a press release of a company",
    "a job advertisement",
    "a match report",
    "a column of opinion",
    "a profile of a person",
    "a page of frequent questions",
)
SUBJECTS = (
    "gardening",
    "a football club",
    "used cars",
    "a hotel by the sea",
    "a law firm",
    "a school",
    "a new phone",
    "a film festival",
    "bicycles",
    "a bakery",
    "personal finance",
    "a village church",
    "a software update",
    "dogs",
    "wedding photography",
    "city council",
    "a history museum",
    "health insurance",
    "running shoes",
    "dentists",
    "a university course",
    "house prices",
    "kitchen furniture",
    "a music album",
    "the weather",
    "a video game",
    "wine",
    "a charity run",
    "solar panels",
    "train travel",
    "a novel",
    "real estate",
)
_BACKBONE = "smollm2"
_MAX_NEW_TOKENS = 128
_LEAST_WORDS = 40
_BATCH = 64
_METHOD = methods.Sampling(temperature=0.7)
_DEFAULT_PAGES = 64


def read(source: str, limit: str = "") -> list[Example]:
    """`limit` answers (64 when empty) of score 0, each to another request; the group is the subject.

    Answers of under 40 words are left out. Raises ValueError for a limit that is no count or above the number of
    requests, FileNotFoundError if SmolLM2 is not installed.
    """
    pages = limit_of(source, limit, "pages", most=len(KINDS) * len(SUBJECTS)) or _DEFAULT_PAGES
    return [
        Example(text, 0, f"{GENERATED}/{subject}", source, kinds=HARMLESS)
        for subject, text in _pages(pages)
        if len(text.split()) >= _LEAST_WORDS
    ]


def requests(count: int) -> list[tuple[str, str]]:
    """(subject, request): the first of all pairs of a kind and a subject, in one fixed random order."""
    pairs = list(itertools.product(KINDS, SUBJECTS))
    order = np.random.default_rng(0).permutation(len(pairs))[:count]
    chosen = [pairs[i] for i in order]
    return [(subject, f"Write {kind} about {subject}. Give the text only.") for kind, subject in chosen]


@functools.cache
def _pages(count: int) -> tuple[tuple[str, str], ...]:
    path = str(installed_path(_BACKBONE))
    config, params = gguf.read_file(path)
    config = dataclasses.replace(config, dtype="float32", attention="xla", scan_layers=True, remat="none")
    tokenizer = Tokenizer.from_pretrained(path)
    asked = requests(count)
    prompts = [prompt_ids(tokenizer, request, is_chat=True) for _, request in asked]
    written = decode.generate(
        config,
        jax.device_put(params),
        prompts,
        _METHOD,
        max_new_tokens=_MAX_NEW_TOKENS,
        end_ids=tokenizer.conventions.end_ids,
        harm_tag_id=None,
        batch_size=_BATCH,
        show_progress=True,
    )
    texts = (tokenizer.decode(answer.text_tokens).strip() for answer in written)
    return tuple((subject, text) for (subject, _), text in zip(asked, texts, strict=True))
