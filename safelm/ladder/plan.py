"""The plan of the ladder: its pretrainings, later stages and measurements, and the order in which they are done.

| rung, or cell      | pretraining                                       | instruction tuning | decoding  |
|--------------------|---------------------------------------------------|--------------------|-----------|
| raw                | raw web of every score                            | plain              | greedy    |
| score0             | score 0 only                                      | plain              | greedy    |
| safeweb            | + recontextualized                                | plain              | greedy    |
| refuseweb          | + refusals                                        | plain              | greedy    |
| moral_education    | + moral education                                 | plain              | greedy    |
| harm_tagged        | + tagged unsafe text (at 5% of the word gaps)     | a tenth tagged     | greedy    |
| safe_beam          | the model of harm_tagged                          |                    | SafeBeam  |
| tag_at_instruction | the model of moral_education                      | a tenth tagged     | both      |
| rate_3, rate_10    | harm_tagged with the tag at 3 or 10% of the gaps  | a tenth tagged     | both      |
| start_20, start_60 | raw, and harm_tagged from 20 or 60% of the tokens | a tenth tagged     | both      |

Interventions beyond the paper (`docs/interventions.md`) are done only where `models` names them: masked, masked_unsafe,
unlikelihood, weighted, span_tagged, conditioned, red_flag and red_flag_span differ from raw by that alone;
refusal_tokens is the pretraining of raw, tuned on answers that begin with <refuse> or <respond>; routed learns unsafe
pages in designated units, ablated after pretraining; token_tagged has the tags of harm_tagged by token and is decoded
with both; reflected and preflected have notes in or before the text; metadata has its URLs before it, up to 90% of the
tokens; alignment has texts of alignment from 80% on.

The study of toxicity (`TOXICITY`) has other stages, cells and orderings over the same machinery: real text that is
toxic in part, see `safelm.ladder.toxicity`.

The rate of 5% and the start at 0% are harm_tagged itself. All pretrainings have the same number of tokens, and so have
all runs of a later stage. A training that two cells share is done once.
"""

import dataclasses
from collections.abc import Sequence

from ml_collections import ConfigDict

from safelm.tags import TAG_RATE

RUNGS = ("raw", "score0", "safeweb", "refuseweb", "moral_education", "harm_tagged")
STAGES = ("pretraining", "instruction", "benign")
TOXICITY_STAGES = ("pretraining", "clean_finetuning", "relearning")
# The stage that each begins with; none: from scratch.
BEFORE = {"pretraining": "", "instruction": "pretraining", "benign": "instruction"} | dict.fromkeys(
    TOXICITY_STAGES[1:], "pretraining"
)
GREEDY, SAFE_BEAM, SAMPLE, BEAM = "greedy", "safe_beam", "sample", "beam"


@dataclasses.dataclass(frozen=True)
class Model:
    """A model through all stages: its pretraining data and its instruction data."""

    name: str
    pretraining: str  # the name of the model whose pretraining it is: its own, or another's
    rung: str
    start: float = 0.0  # the share of the tokens from which on the rung's data is given; raw web before
    end: float = 1.0  # the share of the tokens from which on it is raw web again
    tag_rate: float = TAG_RATE
    tagged_tuning: bool = False
    is_on_request: bool = False  # left out unless it is named
    needs_spans: bool = False  # of its raw text
    notes: str = ""  # the kind of notes that its raw text has, as of safelm.synthesize
    control_tokens: tuple[str, ...] = ()  # that its vocabulary must have
    opening: str = ""  # the one of them that stands before a text that it is asked for
    is_routed: bool = False  # its unsafe text trains designated units alone, which are ablated after pretraining
    instruction: str = ""  # its mixture of instruction tuning; "": the plain or the tagged one
    size: int = 0  # of the scaling study: which of its sizes and budgets, from 1
    budget: int = 0

    @property
    def instruction_mixture(self) -> str:
        """The mixture of its instruction tuning."""
        return self.instruction or ("instruction_tagged" if self.tagged_tuning else "instruction")

    @property
    def methods(self) -> tuple[str, ...]:
        """Its decoding methods; SafeBeam needs a model that knows the tag."""
        return (GREEDY, SAFE_BEAM) if self.tagged_tuning else (GREEDY,)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A row of the table: a model and its decoding method."""

    name: str
    model: str
    method: str


@dataclasses.dataclass(frozen=True)
class Job:
    """A piece of work: train one stage of a model (`method` empty), or measure it with a method."""

    seed: int
    model: str
    stage: str
    method: str = ""

    @property
    def name(self) -> str:
        """The job's name in files and logs."""
        return ".".join(filter(None, (f"seed-{self.seed}", self.model, self.stage, self.method)))


_OF_SPANS = ("masked", "masked_unsafe", "unlikelihood", "weighted")
_NOTE_TOKENS = ("<note>", "</note>")
_TAGGED = {"rung": "harm_tagged", "tagged_tuning": True}
MODELS = {
    model.name: model
    for model in (
        *(Model(rung, rung, rung, tagged_tuning=rung == "harm_tagged") for rung in RUNGS),
        Model("tag_at_instruction", "moral_education", "moral_education", tagged_tuning=True),
        Model("start_20", "start_20", start=0.2, **_TAGGED),
        Model("start_60", "start_60", start=0.6, **_TAGGED),
        Model("rate_3", "rate_3", tag_rate=0.03, **_TAGGED),
        Model("rate_10", "rate_10", tag_rate=0.10, **_TAGGED),
        *(Model(name, name, name, is_on_request=True, needs_spans=True) for name in _OF_SPANS),
        Model(*("span_tagged",) * 3, is_on_request=True, needs_spans=True, control_tokens=("<risky>", "</risky>")),
        Model(*("conditioned",) * 3, is_on_request=True, control_tokens=("<good>", "<bad>"), opening="<good>"),
        Model(*("red_flag",) * 3, is_on_request=True, control_tokens=("<red_flag>",)),
        Model(*("red_flag_span",) * 3, is_on_request=True, needs_spans=True, control_tokens=("<red_flag>",)),
        Model(
            *("refusal_tokens", "raw", "raw"),
            is_on_request=True,
            control_tokens=("<refuse>", "<respond>"),
            instruction="instruction_refusal",
        ),
        Model(*("routed",) * 3, is_on_request=True, is_routed=True),
        Model(*("token_tagged",) * 3, is_on_request=True, tagged_tuning=True),
        Model(*("reflected",) * 3, is_on_request=True, notes="reflection", control_tokens=_NOTE_TOKENS),
        Model(*("preflected",) * 3, is_on_request=True, notes="preflection", control_tokens=_NOTE_TOKENS),
        Model(*("metadata",) * 3, is_on_request=True, end=0.9),
        Model(*("alignment",) * 3, is_on_request=True, start=0.8),
        Model(*("classified",) * 3, is_on_request=True),
        Model(*("replaced",) * 3, is_on_request=True),
        Model(*("refusals",) * 3, is_on_request=True),
        Model(*("combined",) * 3, is_on_request=True, tagged_tuning=True),
    )
}
SIZES, BUDGETS = 5, 3  # of the scaling study; the last size is held out
SCALED = {
    (size, budget): Model(
        *(f"size_{size}_budget_{budget}",) * 2, **_TAGGED, is_on_request=True, size=size, budget=budget
    )
    for size in range(1, SIZES + 1)
    for budget in range(1, BUDGETS + 1)
}
MODELS |= {model.name: model for model in SCALED.values()}
OF_TOXICITY = ("classified", "replaced", "refusals", "combined")  # models of that study alone
CELLS = tuple(
    Cell("safe_beam" if (model.name, method) == ("harm_tagged", SAFE_BEAM) else name, model.name, method)
    for model in MODELS.values()
    if model.name not in OF_TOXICITY and not model.size
    for method in model.methods
    for name in (model.name if method == GREEDY else f"{model.name}+safe_beam",)
)
# What the paper says about the rates after benign finetuning: (the lower, the higher, where).
ORDERINGS = (
    ("raw", "score0", "figure 4: filtering alone makes it worse (38.8 against 43.8)"),
    ("safeweb", "score0", "figure 4: rephrasing lowers it (33.6 against 43.8)"),
    ("refuseweb", "safeweb", "figure 4: native refusals lower it (25.1 against 33.6)"),
    ("moral_education", "refuseweb", "figure 4: moral education lowers it (23.0 against 25.1)"),
    ("moral_education", "raw", "figure 4: the whole of it against raw text (23.0 against 38.8)"),
    ("safe_beam", "harm_tagged", "figure 2: SafeBeam lowers it (8.3 against 23.0)"),
    ("safe_beam", "raw", "figure 2: with SafeBeam against standard pretraining (8.3 against 38.8)"),
    ("safe_beam", "tag_at_instruction+safe_beam", "section 4: the tag in pretraining, not only in tuning (8, 30)"),
    ("harm_tagged", "tag_at_instruction", "section 4: the same, decoded greedily"),
    ("safe_beam", "rate_3+safe_beam", "section 4: 5% tags better than 3%"),
    ("safe_beam", "rate_10+safe_beam", "section 4: 5% tags better than 10%"),
    ("safe_beam", "start_20+safe_beam", "Sam et al. 2026: SafeBeam steers best from 0%"),
    ("safe_beam", "start_60+safe_beam", "Sam et al. 2026: SafeBeam steers best from 0%"),
    ("start_20", "harm_tagged", "Sam et al. 2026: greedy, from 20% often more robust than from 0%"),
    ("start_60", "harm_tagged", "Sam et al. 2026: greedy, from 60% often more robust than from 0%"),
    # Beyond the paper: each against the same text without it. Set down before any of these models was trained.
    ("masked", "raw", "arXiv 2601.21571: risky sentences without loss lower it"),
    ("masked_unsafe", "raw", "the same in unsafe documents only"),
    ("weighted", "raw", "risky sentences at a lower weight lower it"),
    ("unlikelihood", "raw", "arXiv 2505.03052: unlikelihood on risky sentences lowers it"),
    ("span_tagged", "raw", "risky sentences between two control tokens: asked without them, less harm"),
    ("conditioned", "raw", "arXiv 2302.08582: conditional training, asked for <good>, lowers it"),
    ("red_flag", "raw", "arXiv 2502.16366: a red flag in unsafe documents lowers it"),
    ("red_flag_span", "raw", "the same before risky sentences"),
    ("refusal_tokens", "raw", "arXiv 2412.06748: answers that begin with <refuse> or <respond>, less harm"),
    ("routed", "raw", "arXiv 2512.05648: unsafe pages in units that are ablated lower it"),
    ("token_tagged+safe_beam", "safe_beam", "SafeBeam on tags by token against tags by word gap"),
    ("reflected", "raw", "arXiv 2606.19168: reflections in the text lower it"),
    ("preflected", "raw", "the same before the text"),
    ("metadata", "raw", "arXiv 2501.01956: URLs before the text, then without, lower it"),
    ("alignment", "raw", "arXiv 2601.10160: alignment text in the last fifth lowers it"),
)


@dataclasses.dataclass(frozen=True)
class Study:
    """What a study does and asks: its stages, the rows of its table, and the orderings that it tests.

    Attributes:
      first: models that are done for every seed before the others.
    """

    name: str
    stages: tuple[str, ...]
    cells: tuple[Cell, ...]
    orderings: tuple[tuple[str, str, str], ...]
    first: tuple[str, ...]

    def methods_of(self, model: str) -> tuple[str, ...]:
        """The decoding methods that a model is measured with."""
        return tuple(cell.method for cell in self.cells if cell.model == model)

    @property
    def methods(self) -> tuple[str, ...]:
        """All decoding methods."""
        return tuple(dict.fromkeys(cell.method for cell in self.cells))


INTERVENTIONS = Study("interventions", STAGES, CELLS, ORDERINGS, RUNGS)
_KORBAK = "Korbak et al. 2023"
TOXICITY = Study(
    "toxicity",
    TOXICITY_STAGES,
    tuple(
        Cell(*names)
        for names in (
            ("raw", "raw", SAMPLE),
            ("filtered by label", "score0", SAMPLE),
            ("filtered by classifier", "classified", SAMPLE),
            ("harm-tagged", "harm_tagged", SAMPLE),
            ("conditional", "conditioned", SAMPLE),
            ("unlikelihood", "unlikelihood", SAMPLE),
            ("loss-masked", "masked", SAMPLE),
            ("replaced", "replaced", SAMPLE),
            ("+ refusals", "refusals", SAMPLE),
            ("combined", "combined", SAMPLE),
            ("raw, beam", "raw", BEAM),
            ("harm-tagged, beam", "harm_tagged", BEAM),
            ("harm-tagged, SafeBeam", "harm_tagged", SAFE_BEAM),
            ("combined, SafeBeam", "combined", SAFE_BEAM),
        )
    ),
    (
        ("filtered by label", "raw", f"{_KORBAK}: filtering lowers it"),
        ("filtered by classifier", "raw", f"{_KORBAK}: the same by a classifier"),
        ("filtered by label", "filtered by classifier", "labels filter better than a classifier"),
        ("harm-tagged, SafeBeam", "harm-tagged, beam", "Maini et al. 2025, section 4: SafeBeam lowers it"),
        ("harm-tagged, SafeBeam", "raw, beam", "Maini et al. 2025, figure 2: against standard pretraining"),
        ("conditional", "raw", f"{_KORBAK}: conditional training lowers it"),
        ("conditional", "filtered by label", f"{_KORBAK}: and further than filtering"),
        ("unlikelihood", "raw", f"{_KORBAK}: unlikelihood lowers it, at a price"),
        ("loss-masked", "raw", "SLUNG: reading without learning lowers it"),
        # Set down after the first six rungs were seen, before any model of these four was trained.
        ("replaced", "filtered by label", "figure 4: retellings of what is filtered lower it"),
        ("+ refusals", "filtered by label", "figure 4: refusals and lessons in their place lower it"),
        ("combined", "filtered by label", "half of the toxic text tagged, refusals for the rest: no higher than none"),
        ("combined, SafeBeam", "harm-tagged, SafeBeam", "and SafeBeam on it lower than on the tag alone"),
    ),
    ("raw", "score0", "classified", "harm_tagged", "conditioned", "unlikelihood"),
)
SCALING = Study(
    "scaling",
    STAGES[:1],
    tuple(Cell(model.name, model.name, GREEDY) for model in SCALED.values()),
    (),
    tuple(model.name for model in SCALED.values() if model.size < SIZES),
)
STUDIES = {study.name: study for study in (INTERVENTIONS, TOXICITY, SCALING)}


def study_of(config: ConfigDict) -> Study:
    """The study that a config describes. Raises ValueError for an unknown one."""
    if (name := config.get("study", INTERVENTIONS.name)) not in STUDIES:
        raise ValueError(f"--config.study={name}: want one of {', '.join(STUDIES)}")
    return STUDIES[name]


def chosen_models(names: Sequence[str]) -> list[Model]:
    """The named models in the ladder's order; the paper's if none is named. A name may hold several, by comma.

    Raises ValueError for an unknown name.
    """
    names = [name for each in names for name in each.split(",")]
    if unknown := [name for name in names if name not in MODELS]:
        raise ValueError(f"models names {unknown[0]!r}: there are {', '.join(MODELS)}")
    return [model for model in MODELS.values() if (model.name in names if names else not model.is_on_request)]


def plan_jobs(
    models: Sequence[Model], seeds: Sequence[int], methods: Sequence[str], study: Study = INTERVENTIONS
) -> list[Job]:
    """All jobs in order of importance: the study's first models for every seed, then the models compared with them."""
    jobs: dict[Job, None] = {}
    for is_first in (True, False):
        for seed in seeds:
            for model in (model for model in models if (model.name in study.first) == is_first):
                jobs |= dict.fromkeys(_jobs_of(model, seed, methods, study))
    return list(jobs)


def _jobs_of(model: Model, seed: int, methods: Sequence[str], study: Study) -> list[Job]:
    jobs = []
    for stage in study.stages:
        wanted = [
            measured(seed, model.name, stage, method) for method in study.methods_of(model.name) if method in methods
        ]
        jobs += [trained(seed, model.name, stage), *filter(None, wanted)]
    return jobs


def trained(seed: int, model: str, stage: str) -> Job:
    """The training job behind a model's checkpoint at a stage; models may share a pretraining."""
    return Job(seed, MODELS[model].pretraining if not BEFORE[stage] else model, stage)


def measured(seed: int, model: str, stage: str, method: str) -> Job | None:
    """The measuring job of a model at a stage; None for SafeBeam if the model hasn't seen the tag yet."""
    of = trained(seed, model, stage)
    knows_tag = MODELS[of.model].tagged_tuning
    return Job(seed, of.model, stage, method) if method != SAFE_BEAM or knows_tag else None


def needed_by(job: Job) -> Job | None:
    """The training job that must be done before a job, if any."""
    if job.method:
        return trained(job.seed, job.model, job.stage)
    return trained(job.seed, job.model, BEFORE[job.stage]) if BEFORE[job.stage] else None
