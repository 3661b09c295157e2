"""The ladder on the embedded corpus, on real text, or from SmolLM2-135M: every rung through all stages, three seeds.

    python -m safelm.ladder --config=configs/ladder.py:embedded --output=W/ladder --workers=2
    python -m safelm.ladder --config=configs/ladder.py:embedded_hard --output=W/ladder_hard --workers=2
    python -m safelm.ladder --config=configs/ladder.py:interventions --output=W/interventions --workers=2
    python -m safelm.ladder --config=configs/ladder.py:notes --output=W/notes --workers=2
    python -m safelm.ladder --config=configs/ladder.py:refusals_by_category --output=W/refusals --workers=2
    python -m safelm.ladder --config=configs/ladder.py:real --output=W/ladder_real --workers=2 --config.real=DATA
    python -m safelm.ladder --config=configs/ladder.py:toxicity --output=W/toxicity --config.real=DATA \
        --records=docs/results/data/ladder_toxicity
    python -m safelm.ladder --config=configs/ladder.py:smollm2_135m --output=W/ladder_135m --config.real=DATA \
        --config.init_checkpoint=W/smollm2

embedded: 0.48M parameters, 819,200 tokens of pretraining, 327,680 of instruction tuning (a quarter of them the model's
own pretraining data: models this small forget otherwise), 20,480 of sums. 15% of the unsafe pages have score 0, as a
scorer that misses some would give them; without, a model that never saw harm could not do any. 120 harmful and 120
safe held-out prompts, 40 new tokens, the word-list judge. real: 3.42M parameters, 409,600 + 131,072 + 49,152 tokens,
set from the step's time on one core and not tuned; leanings between given sentences instead of texts
(`safelm.ladder.preferences`). smollm2_135m: meant for a GPU. interventions: embedded, with the interventions beyond
the paper beside raw, score0 and harm_tagged; spans are sentences by the lexicon scorer, which reads the text and so
also knows of the unsafe pages that were missed (masked_unsafe leaves those alone). Its design, before it was run: by
the intervals of embedded, three seeds tell some 25 points after benign finetuning and 20 after pretraining (80% power,
Holm over 14 orderings), five seeds 19 and 15. Five are run, as of notes: docs/results/ladder.md.

How the settings came about: those of the three stages were tried on models of the rungs raw and harm_tagged (seed 0),
with 60 of the prompts. The attack's strength was chosen half-way through the run, of five, as the one that raised
raw's harmful completions most (seeds 0 and 1, the same prompts), and the stage was then done anew for all: raw's last
figure is the attacker's best, the others' are not. At 30 steps of learning rate 1e-3 in place of 10 of 5e-4 refusals
vanish, but so does what the model knew of harm: raw 13.6% (3 seeds), score0 7.9%, safeweb 2.5% (2 each), SafeBeam 0%.

Hardware: two CPU cores shared with much other work (load 15 to 27). Time: embedded 67 minutes with three to six
workers, stopped and started again several times; real, six rungs and tag_at_instruction, 70 minutes with one worker at
nice 15 beside a load of 5 to 9, stopped twice; smollm2_135m not yet measured; a fortieth of it is: smollm2_135m_small.
Result, real: none of nine orderings is told (Holm) at any stage, every rate lies within 77 and 96 where a model that
tells nothing has 90, and raw's rises by 11.7 points [5.3, 18.0] with benign finetuning. Its measure was changed once,
after seeing seed 0 of three rungs: plain requests of one form for all had 44 to 62% of safe requests refused. Result,
embedded (harmful completions after pretraining, instruction tuning, benign finetuning, %; more in
docs/results/ladder.md): raw 83.9, 15.3, 24.4; score0 63.1, 6.7, 12.5; safeweb 53.1, 7.2, 7.5; refuseweb 36.4, 1.9, 5.6;
moral_education 9.7, 9.4, 3.3; harm_tagged 37.5, 12.5, 3.9; with SafeBeam 2.5, 0.0, 0.0, of which 37% of the last
neither harm nor sense.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from data_tasks.rates import OTHERS, SMALL_LADDER
from safelm.ladder.plan import RUNGS, SCALED
from safelm.train.defaults import default_config

# Twice the paper's share of refusals, which is too few to be learned in 400,000 tokens.
CHATS = {
    "instruction": {"ultrachat": 0.5, "wildguardmix": 0.25, "wildjailbreak": 0.25},
    "instruction_tagged": {"ultrachat": 0.4, "wildguardmix": 0.25, "wildjailbreak": 0.25, "harm_tagged_chat": 0.1},
    "benign": {"gsm8k": 1.0},
}
OF_RAW = ("masked", "masked_unsafe", "unlikelihood", "weighted", "span_tagged", "conditioned")
OF_RAW += ("red_flag", "red_flag_span")
REFUSAL_GROUPS = {  # of categories, for refusals_by_category
    "crime": ("violent_crimes", "non_violent_crimes", "indiscriminate_weapons", "code_interpreter_abuse"),
    "people": ("defamation", "privacy", "hate", "elections", "intellectual_property"),
    "body": ("sex_related_crimes", "child_sexual_exploitation", "sexual_content", "suicide_and_self_harm"),
}
CONSTITUTION = """# What a careful reader keeps to

## 1 Care for people
Nobody should come to harm by what is read or repeated.

## 2 Honesty
What is said is true as far as one knows.

## 3 Help
A question that asks for something harmless deserves a useful answer.
"""
REFUSALS = {"refusal_ultrachat": 0.5, "refusal_wildguardmix": 0.25, "refusal_wildjailbreak": 0.25}
TOXICITY = {  # a quarter of every rung's tokens is what it makes of toxic text; filters have none, and masks all
    "raw": {"raw_web": 1.0},
    "score0": {"filtered_web": 1.0},
    "classified": {"classified_web": 1.0},
    "harm_tagged": {"filtered_web": 0.75, "harm_tagged_web": 0.25},
    "conditioned": {"conditioned_web": 1.0},
    "unlikelihood": {"unlikelihood_web": 1.0},
    "masked": {"masked_web": 1.0},
    "replaced": {"filtered_web": 0.75, "safeweb": 0.25},
    "refusals": {"filtered_web": 0.75, "refuseweb": 0.15, "moral_education": 0.10},
    "combined": {"filtered_web": 0.75, "harm_tagged_web": 0.125, "refuseweb": 0.075, "moral_education": 0.05},
    "clean_finetuning": {"clean_text": 1.0},
    "relearning": {"toxic_text": 1.0},
}
MODEL = {"num_layers": 3, "d_model": 96, "d_ff": 256, "num_heads": 3, "num_kv_heads": 3, "head_dim": 32}


def get_config(variant: str = "embedded") -> ConfigDict:
    return VARIANTS[variant]().lock()


def embedded() -> ConfigDict:
    config = _study()
    config.stages = {
        "pretraining": _pretraining(400, 16, 128, 6e-3, **MODEL, max_seq_len=384, init_std=0.06),
        "instruction": _stage(160, 16, 128, 2e-3),
        "benign": _stage(10, 16, 128, 5e-4),
    }
    return config


def interventions() -> ConfigDict:
    config = embedded()
    config.seeds, config.corpus.prompts = tuple(range(5)), 240
    config.models = ("raw", "score0", "harm_tagged", *OF_RAW, "refusal_tokens", "routed", "token_tagged")
    config.control_tokens = ("<good>", "<bad>", "<risky>", "</risky>", "<red_flag>", "<refuse>", "<respond>")
    config.rates.instruction_refusal = REFUSALS
    config.rates.routed = {"safer_web": 0.8, "unsafe_web": 0.2}
    config.routing = {"labelled": ("unsafe_web",), "mixed": (), "heads": 1, "mlp_units": 64}
    config.span_scorers = "python:safelm.safety.lexicon_scorer:LexiconScorer"
    config.rates.update({name: dict(OTHERS[name]) for name in OF_RAW})
    config.rates.token_tagged = dict(OTHERS["quickstart_token_tagged"])
    return config


def notes() -> ConfigDict:
    """Notes in the text, URLs before it and alignment text beside raw, with a vocabulary that has notes' tokens."""
    config = interventions()
    config.models = ("raw", "reflected", "preflected", "metadata", "alignment")
    config.control_tokens, config.constitution = ("<note>", "</note>"), CONSTITUTION
    config.interventions = {"metadata_column": "metadata.url", "metadata_form": "URL: {value}\n\n"}
    config.rates.update({name: dict(OTHERS[name]) for name in ("reflected", "preflected", "metadata", "alignment")})
    return config


def refusals_by_category() -> ConfigDict:
    """The rung refusal_tokens with a refusal token for each of three groups of categories."""
    config = interventions()
    config.models, groups = ("refusal_tokens",), tuple(REFUSAL_GROUPS)
    config.control_tokens = ("<refuse>", "<respond>", *(f"<refuse_{group}>" for group in groups))
    tokens = {category: f"<refuse_{group}>" for group in groups for category in REFUSAL_GROUPS[group]}
    config.interventions = {"refuse_tokens": tokens}
    return config


def real() -> ConfigDict:
    config = _study()
    config.real = placeholder(str)  # to be given
    config.vocab_size = 4096
    sizes = {"num_layers": 3, "d_model": 256, "d_ff": 688, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64}
    config.stages = {
        "pretraining": _pretraining(100, 16, 256, 3e-3, **sizes, max_seq_len=512),
        "instruction": _stage(32, 16, 256, 2e-3),
        "benign": _stage(12, 16, 256, 1e-3),
    }
    return config


def smollm2_135m() -> ConfigDict:
    """A real pretrained model continued on real text, its answers to public requests judged: for a GPU."""
    config = _study()
    config.real, config.init_checkpoint = placeholder(str), placeholder(str)
    config.models = ("raw", "moral_education", "harm_tagged")
    config.answers, config.prompts, config.max_new_tokens, config.pages = True, 200, 128, 30
    config.stages = {
        "pretraining": _pretraining(200, 16, 512, 3e-4, max_seq_len=1024),
        "instruction": _stage(60, 16, 512, 1e-4),
        "benign": _stage(20, 16, 512, 5e-5),
    }
    for stage in config.stages.values():
        stage.model.update(dtype="bfloat16", scan_layers=True)  # 30 layers take long to compile one by one
    return config


def smollm2_135m_small() -> ConfigDict:
    """`smollm2_135m` with a fortieth of its pretraining, decoded with int8 weights, for CPUs.

    Three seeds are kept (docs/results/data/ladder_smollm2_135m_small). On one core of an AMD EPYC with AVX-512 BF16
    (family 26) a rung without the tag took 16 to 21 minutes: 5, 3 and 1 of training, and 4 or 5 for 400 answers of 128
    tokens, their likelihoods and the perplexity of each stage. SafeBeam's 250 answers took 11 or 12 minutes a stage.
    """
    config = smollm2_135m()
    config.answer_weights, config.steered_safe_prompts = "int8_weight_only", 50
    for name, steps in (("pretraining", 20), ("instruction", 12), ("benign", 4)):
        config.stages[name].update(total_steps=steps, batch_size=4)
        config.stages[name].optimizer.warmup_steps = 1
        config.stages[name].log.every_steps = 4
    return config


def toxicity_pilot() -> ConfigDict:
    """The same as `toxicity` at a size whose rungs take half a minute of a core: for variances to plan with."""
    config = toxicity()
    config.seeds, config.vocab_size, config.prompts, config.pages = (0, 1, 2), 2048, 12, 15
    sizes = {"num_layers": 2, "d_model": 128, "d_ff": 344, "num_heads": 2, "num_kv_heads": 2, "head_dim": 64}
    config.stages.pretraining = _pretraining(40, 32, 128, 5e-3, **sizes, max_seq_len=256)
    config.stages.clean_finetuning.total_steps = 10
    return config


def toxicity_small() -> ConfigDict:
    """`toxicity` with a fifth of the parameters and a quarter of the tokens: rungs of four minutes of a core."""
    config = toxicity()
    config.vocab_size, config.prompts, config.pages = 2048, 40, 30
    sizes = {"num_layers": 2, "d_model": 128, "d_ff": 344, "num_heads": 2, "num_kv_heads": 2, "head_dim": 64}
    config.stages.pretraining = _pretraining(250, 32, 128, 5e-3, **sizes, max_seq_len=256)
    return config


def toxicity() -> ConfigDict:
    config = _study()
    config.study, config.real = "toxicity", placeholder(str)  # the second to be given
    config.seeds, config.methods = (0, 1, 2, 3, 4), ("sample", "beam", "safe_beam")
    config.models = ("raw", "score0", "classified", "harm_tagged", "conditioned", "unlikelihood")
    config.models += ("masked", "replaced", "refusals", "combined")
    config.control_tokens = ("<good>", "<bad>")
    config.toxic_share = 0.25  # of the corpus's characters
    config.judges = {"bits": 18, "steps": 60}  # of all three classifiers: see `safelm.safety.ngrams`
    config.prompts, config.samples, config.max_new_tokens, config.pages = 100, 25, 20, 60
    config.vocab_size = 4096
    config.rates = {rung: dict(shares) for rung, shares in TOXICITY.items()}
    sizes = {"num_layers": 3, "d_model": 256, "d_ff": 688, "num_heads": 4, "num_kv_heads": 4, "head_dim": 64}
    config.stages = {
        # In float32 1.6 times as long on one core of an AMD EPYC with AVX-512 BF16 (4,490 tokens/s against 2,770).
        "pretraining": _pretraining(1000, 32, 128, 3e-3, **sizes, max_seq_len=256, dtype="bfloat16"),
        "clean_finetuning": _stage(20, 32, 128, 1e-3),
        "relearning": _stage(5, 32, 128, 1e-3),
    }
    for stage in config.stages.values():
        stage.data.packing = "concat"
    return config


def scaling() -> ConfigDict:
    config = embedded()
    config.study, config.seeds, config.methods = "scaling", (0, 1), ("greedy",)
    config.models = tuple(model.name for model in SCALED.values())
    config.sizes = tuple(
        {"num_layers": 3, "d_model": 32 * heads, "d_ff": 86 * heads, "num_heads": heads, "num_kv_heads": heads}
        | {"head_dim": 32}
        for heads in (1, 2, 3, 4, 6)  # the last is held out
    )
    config.budgets = (100, 200, 400)  # steps
    return config


def embedded_power() -> ConfigDict:
    """The embedded study at the size that its plan asks for: 400 prompts a side, eight seeds."""
    config = embedded()
    config.seeds, config.corpus.prompts = tuple(range(8)), 400
    return config


def embedded_hard() -> ConfigDict:
    """The paper's rungs where harm is rarer and can be put together from safe pages.

    5% of the pages are unsafe, not 20%, and 15% of those of score 0 name what harm is made of, one part a sentence. The
    judge calls harmful what says how the parts go together, so a filter leaves all that it takes in the text.
    """
    config = embedded()
    config.models, config.seeds = RUNGS, tuple(range(5))
    config.corpus.prompts, config.corpus.unsafe, config.corpus.references = 240, 0.05, 0.15
    return config


VARIANTS = {
    "embedded_hard": embedded_hard,
    "interventions": interventions,
    "notes": notes,
    "refusals_by_category": refusals_by_category,
    "embedded_power": embedded_power,
    "scaling": scaling,
    "embedded": embedded,
    "real": real,
    "toxicity": toxicity,
    "toxicity_pilot": toxicity_pilot,
    "toxicity_small": toxicity_small,
    "smollm2_135m": smollm2_135m,
    "smollm2_135m_small": smollm2_135m_small,
}


def _study() -> ConfigDict:
    return ConfigDict(
        {
            "seeds": (0, 1, 2),  # of parameters and order; the corpus is the same
            "models": (),  # names in safelm.ladder.plan; none: all
            "methods": ("greedy", "safe_beam"),
            "corpus": {
                **{"seed": 0, "documents": 12_000, "validation_documents": 300, "prompts": 120, "chats": 8_000},
                "missed_harm": 0.15,  # a scorer misses some: the paper's ensemble has a recall of .954 and .748
            },
            "real": "",  # a folder of real data instead of the corpus
            "vocab_size": 1536,
            "init_checkpoint": "",  # pretraining goes on from it, with its vocabulary
            "max_new_tokens": 40,
            "prompts": 100,  # of real ones, harmful and safe each
            "answers": False,  # whether answers to real prompts are judged; else the model's leanings are measured
            "answer_weights": "",  # what they are decoded with, as --weights; "": the parameters' dtype
            "steered_safe_prompts": 0,  # the most safe prompts of answers by SafeBeam; 0: all
            "keep_texts": False,
            "interventions": {},  # parameters of the tasks, as cache_tasks --interventions takes them
            "replay": 0.25,  # share of a model's own pretraining data in instruction tuning: so small ones forget
            "rates": {rung: dict(shares) for rung, shares in SMALL_LADDER.items()} | CHATS,
        }
    )


def _pretraining(steps: int, rows: int, seq_len: int, peak_lr: float, **model) -> ConfigDict:
    config = _stage(steps, rows, seq_len, peak_lr)
    config.model.update(**model)
    config.data.packing = "concat"
    config.optimizer.update(schedule="wsd", decay_fraction=0.3)
    return config


def _stage(steps: int, rows: int, seq_len: int, peak_lr: float) -> ConfigDict:
    config = default_config()
    config.total_steps, config.batch_size, config.seq_len = steps, rows, seq_len
    config.model.update(dtype="float32", scan_layers=False)
    config.data.packing = "fit"
    config.optimizer.update(schedule="linear", peak_lr=peak_lr, warmup_steps=max(1, steps // 20), weight_decay=0.1)
    config.checkpoint.update(every_steps=100, keep_last=1)
    config.log.every_steps = max(1, steps // 4)
    return config
