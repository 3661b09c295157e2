"""What the gate asks and what its attackers have: prompts to report on, prompts to choose by, texts to finetune on.

Nothing that is reported on is seen by an attacker: of the synthetic web, reported prompts have topics that no document
has, and what attackers have is on documents' topics.
"""

import dataclasses
import json
import pathlib
import random
from collections.abc import Sequence

from safelm.data.store import TokenStore
from safelm.evaluate.suites import suite
from safelm.evaluate.suites.suite import Prompt, read_prompts
from safelm.io.files import write_whole
from safelm.robustness.gate.profiles import BENIGN, HARMFUL, Profile
from safelm.robustness.target import NotTriedError, Target, Tokens
from safelm.synthetic_web import prompts as synthetic_prompts
from safelm.synthetic_web.documents import request, write_answer, write_draft
from safelm.synthetic_web.topics import Topic, harmful_topics, safe_topics

SAFE = "safe"
KINDS = (HARMFUL, BENIGN, SAFE)
_SCORES = {HARMFUL: 5, BENIGN: 0, SAFE: 0}


@dataclasses.dataclass(frozen=True)
class Material:
    """Prompts, and stores of text by kind (harmful, benign; safe, whose loss is watched), written where not given.

    Attributes:
      prompts: reported on.
      development: what attackers choose by.
      stores: folders of token stores by kind.
    """

    prompts: Sequence[Prompt]
    development: Sequence[Prompt]
    stores: dict[str, str]
    is_chat: bool

    def texts(self, target: Target, kind: str, count: int) -> list[Tokens]:
        """At most `count` texts of a kind as ids of the model's vocabulary.

        Raises NotTriedError for a store of another vocabulary.
        """
        if folder := self.stores.get(kind, ""):
            store = TokenStore.open(folder)
            if store.manifest.vocab_hash != target.tokenizer.hash:
                raise NotTriedError(f"{folder}: the token store is of another vocabulary than the model")
            return [store.document(index).tolist() for index in range(min(count, store.num_documents))]
        rng = random.Random(f"safelm-release-gate/{kind}")
        topics = harmful_topics() if kind == HARMFUL else safe_topics(held_out=kind == SAFE)
        return [self._write(target, rng, rng.choice(topics), _SCORES[kind]) for _ in range(count)]

    def _write(self, target: Target, rng: random.Random, topic: Topic, score: int) -> Tokens:
        if self.is_chat:
            tokens = target.context(request(rng, topic), write_answer(rng, topic, score))
            return [*tokens, target.tokenizer.chat_end_id]
        return [*target.context(write_draft(rng, topic, score).text), target.tokenizer.eos_id]


def read_material(
    profile: Profile, prompts: str, development: str, stores: dict[str, str], output: pathlib.Path, *, is_chat: bool
) -> Material:
    """Reads the prompts; development prompts that are not given are the synthetic web's, kept under the output.

    Raises ValueError for a prompt that is both reported on and chosen by, and as `read_prompts`.
    """
    if not development:
        development = str(output / "development")
        _write_development(pathlib.Path(development), profile.development, is_chat=is_chat)
    asked = suite.choose(read_prompts(prompts), profile.prompts)
    chosen_by = suite.choose(read_prompts(development), profile.development)
    reported = {prompt.prompt for prompt in asked}
    both = next((prompt.id for prompt in chosen_by if prompt.prompt in reported), None)
    if both is not None:
        raise ValueError(f"--development={development}: prompt {both} is one of --prompts too: it can't be chosen by")
    return Material(asked, chosen_by, stores, is_chat)


def _write_development(folder: pathlib.Path, count: int, *, is_chat: bool) -> None:
    write = synthetic_prompts.write_chat_prompts if is_chat else synthetic_prompts.write_prompts
    for name in ("harmful", "safe"):
        rows = write(0, harmful=name == "harmful", count=count, held_out=False)
        write_whole(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
