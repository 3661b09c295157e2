"""Prepares the ladder's data, shared by all its jobs: corpus, vocabulary and token stores."""

import json
import os
import pathlib
from collections.abc import Sequence

from ml_collections import ConfigDict

from safelm import documents, lm
from safelm.data.store import MANIFEST_NAME
from safelm.formats import sources
from safelm.io import hub, records
from safelm.io.files import write_whole
from safelm.ladder.answers import train_judge
from safelm.ladder.jobs import tokens_folder
from safelm.ladder.plan import TOXICITY, Model, chosen_models, study_of
from safelm.ladder.processes import run_command
from safelm.ladder.real import write_real_corpus
from safelm.ladder.records import INIT
from safelm.ladder.toxicity import prepare as toxicity_data
from safelm.safety.model_fingerprint import model_fingerprint
from safelm.synthetic_web.corpus import Recipe, write_corpus
from safelm.tags import TAG_RATE

WEB = ("raw_web", "filtered_web", "safeweb", "refuseweb", "moral_education")
CHATS = ("ultrachat", "wildguardmix", "wildjailbreak", "gsm8k")
TAGGED = ("harm_tagged_web", "harm_tagged_chat")

_SPELLED = ("raw_web", "safeweb", "refuseweb", "moral_education")
_REAL_PARTS = ("text", "classifier", "sft", "eval_prompts")
_JUDGED = "judge_calibration"


def check(config: ConfigDict) -> None:
    """Raises ValueError or FileNotFoundError for settings that can't work, before anything is written."""
    for name, known in (("methods", study_of(config).methods), ("seeds", None)):
        values = config[name]
        wrong = [each for each in values if each not in known] if known else [s for s in values if type(s) is not int]
        if wrong or not values or len(set(values)) < len(values):
            wanted = f"some of {', '.join(known)}" if known else "different whole numbers"
            raise ValueError(f"--config.{name}={tuple(values)}: want {wanted}")
    _check_interventions(config)
    for name in ("real", "init_checkpoint"):
        if config[name] is None:
            raise ValueError(f"--config.{name}: this config needs it, a folder")
    parts = toxicity_data.PARTS if study_of(config) is TOXICITY else (*_REAL_PARTS, *([_JUDGED] * config.answers))
    missing = [part for part in parts if not (pathlib.Path(config.real) / part).is_dir()] if config.real else []
    if missing:
        raise FileNotFoundError(f"--config.real={config.real}: there is no folder {missing[0]}/")
    is_named = config.init_checkpoint and hub.is_name(config.init_checkpoint)
    if config.init_checkpoint and not is_named and not (pathlib.Path(config.init_checkpoint) / "tokenizer").is_dir():
        raise FileNotFoundError(f"--config.init_checkpoint={config.init_checkpoint}: no checkpoint with a tokenizer/")


def _check_interventions(config: ConfigDict) -> None:
    """Raises ValueError for a model that needs what the config doesn't have."""
    for model in chosen_models(config.models):
        mixtures = (model.rung, model.instruction_mixture)[: 1 + ("instruction" in study_of(config).stages)]
        if lacking := [name for name in mixtures if name not in config.rates]:
            raise ValueError(f"--config.models: {model.name} needs a config with rates of {lacking[0]}: :interventions")
        if lacking := [token for token in model.control_tokens if token not in config.get("control_tokens", ())]:
            raise ValueError(f"--config.control_tokens: {model.name} needs {', '.join(lacking)} in the vocabulary")
    if config.get("control_tokens", ()) and config.init_checkpoint:
        raise ValueError("--config.control_tokens: the vocabulary is that of --config.init_checkpoint")


def prepare(config: ConfigDict, output: pathlib.Path, models: Sequence[Model]) -> None:
    """Makes the data that is still missing. Raises OSError or ValueError if a step fails."""
    corpus = output / "corpus"
    if study_of(config) is TOXICITY:
        toxicity_data.prepare(config, output, models, lambda: _vocabulary(config, output, toxicity_data.SPELLED))
        return
    if config.real:
        write_real_corpus(config.real, corpus)
        if config.answers:
            train_judge(config.real, output)
    else:
        write_corpus(str(corpus), Recipe(**config.corpus.to_dict()))
    if config.init_checkpoint and not (output / INIT).exists():
        begun = lm.load(config.init_checkpoint)
        records.write(output / INIT, {"sha256": model_fingerprint("", begun.params, begun.tokenizer.hash, settings={})})
    vocabulary = _vocabulary(config, output)
    rates = sorted({TAG_RATE, *(model.tag_rate for model in models)}, key=lambda rate: rate != TAG_RATE)
    for rate in rates:
        folder, tasks = tokens_folder(output, rate), TAGGED if rate != TAG_RATE else (*WEB, *CHATS, *TAGGED)
        if not all((folder / task / "train" / MANIFEST_NAME).exists() for task in tasks):
            flags = [f"--data_dir={corpus}", f"--tokenizer={vocabulary}", f"--output={folder}", f"--tag_rate={rate}"]
            run_command("safelm.cache_tasks", f"--tasks={','.join(tasks)}", *flags, "--workers=1")
        for name in (*WEB, *CHATS):
            if not (folder / name).exists():
                os.symlink(os.path.relpath(tokens_folder(output, TAG_RATE) / name, folder), folder / name)
    _prepare_interventions(config, output, models, vocabulary)


def _prepare_interventions(
    config: ConfigDict, output: pathlib.Path, models: Sequence[Model], vocabulary: pathlib.Path
) -> None:
    """The annotations and token stores of the interventions beyond the paper that models have."""
    folder, corpus = tokens_folder(output, TAG_RATE), output / "corpus"
    by_annotations: dict[str, set[str]] = {}
    for model in models:
        own = {*config.rates[model.rung], *config.rates[model.instruction_mixture]} - {*WEB, *CHATS, *TAGGED}
        if own:
            by_annotations.setdefault(_annotations(config, output, model, vocabulary), set()).update(own)
    if "alignment_text" in set().union(*by_annotations.values()):  # a quarter of the lessons, by themselves
        (texts := corpus / "alignment_text").mkdir(exist_ok=True)
        shard = min((corpus / "moral_education").glob("train-*"))
        if not any(texts.iterdir()):
            link = texts / f"train-00000-of-00001{documents.suffix(shard.name)}"
            os.symlink(os.path.join("..", "moral_education", shard.name), link)
    flags = [f"--data_dir={corpus}", f"--tokenizer={vocabulary}", f"--output={folder}", "--workers=1"]
    if config.get("interventions"):
        flags.append(f"--interventions={json.dumps(config.interventions.to_dict())}")
    for annotations, tasks in sorted(by_annotations.items()):
        if not all((folder / task / "train" / MANIFEST_NAME).exists() for task in tasks):
            given = [f"--tasks={','.join(sorted(tasks))}", *flags, f"--tag_rate={TAG_RATE}"]
            run_command("safelm.cache_tasks", *given, *([f"--annotations={annotations}"] if annotations else []))


def _annotations(config: ConfigDict, output: pathlib.Path, model: Model, vocabulary: pathlib.Path) -> str:
    """The folder of the annotations that a model's raw text has, made if it isn't there; "" for none."""
    raw = f"--input={output}/corpus/raw_web"
    if model.notes:
        folder, rules = output / "notes" / model.notes, output / "constitution.md"
        if not (folder / MANIFEST_NAME).exists():
            write_whole(rules, config.constitution)
            given = [f"--constitution={rules}", f"--tokenizer={vocabulary}", f"--scorer={config.span_scorers}"]
            given += [f"--kind={model.notes}", "--writer=template:", f"--output={folder}", "--workers=1"]
            run_command("safelm.synthesize", raw, *given)
        return str(folder)
    if not model.needs_spans:
        return ""
    folder = output / "spans"
    if not (folder / MANIFEST_NAME).exists():
        given = ["--unit=sentence", f"--scorers={config.span_scorers}", f"--output={folder}", "--workers=1"]
        run_command("safelm.annotate", raw, *given)
    return str(folder)


def _vocabulary(config: ConfigDict, output: pathlib.Path, corpora: Sequence[str] = _SPELLED) -> pathlib.Path:
    folder = output / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        if config.init_checkpoint:
            sources.load_tokenizer(config.init_checkpoint).save(str(folder))
        else:
            inputs = [f"{output}/corpus/{name}/train-*" for name in corpora]
            flags = [f"--vocab_size={config.vocab_size}", f"--output={folder}"]
            if tokens := config.get("control_tokens", ()):
                flags.append(f"--control_tokens={','.join(tokens)}")
            run_command("safelm.train_tokenizer", "--input", *inputs, *flags)
    return folder
