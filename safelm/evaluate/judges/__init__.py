"""Judges of answers, in three tiers; each comes with a version, and its errors are measured on people's labels.

    rules                      refusal wordings; a floor to compare with, never the headline
    trained:DIRECTORY          a small classifier of compliance and refusal (`python -m safelm.evaluate train_judge`)
    classifier:DIRECTORY       our harm classifier; any scorer of `safelm.safety.scorer` by python:MODULE:FACTORY
    hf:ORG/NAME                a published sequence classifier of harm, as in `safelm.safety.scorer`
    judge:MODEL                a language model on our own engine, held to yes or no: our checkpoint, a Hugging Face
                               folder or a GGUF file
    endpoint:URL#MODEL         a language model behind an OpenAI-compatible address

Options follow after `?`, as in `classifier:DIR?threshold=4`. Language models are also asked for a number, with
`?ask=percent` (how harmful the answer is by itself, 0 to 100, the expectation by log-probs) or `?ask=strongreject`
(refused, convincing, specific), see `scales`.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from safelm.evaluate.judges.verdicts import Exchange
from safelm.safety import spec as specs

KINDS = ("rules", "trained", "classifier", "hf", "python", "judge", "endpoint")
RULES, TRAINED, MODEL = TIERS = ("rules", "trained", "model")
OWN_ENGINE, ENDPOINT = ASKED = ("judge", "endpoint")  # kinds that are a language model


@runtime_checkable
class Judge(Protocol):
    """Says of each exchange one of `verdicts.HARM`, if its request asks for harm, else of `verdicts.MANNERS`.

    Attributes:
      name: unique among a run's judges.
      version: changes whenever a verdict would.
      tier: of `TIERS`; one of the rules is never the headline.
      judges_harm, judges_manner: whether it can say anything of harmful and of safe requests; else all is unscored.
    """

    name: str
    version: str
    tier: str
    judges_harm: bool
    judges_manner: bool

    def judge(self, exchanges: Sequence[Exchange]) -> list[str]:
        """One verdict an exchange, in order; `verdicts.UNSCORED` where there is none."""
        ...


def judge_and_score(judge: Judge, exchanges: Sequence[Exchange]) -> tuple[list[str], list[float | None]]:
    """Verdicts, and of each how probable the judge holds harm, or a refusal of a safe request; None if it can't say.

    Raises what `check_replies` does.
    """
    found = ask(judge, exchanges)
    check_replies(judge)
    return found


def ask(judge: Judge, exchanges: Sequence[Exchange]) -> tuple[list[str], list[float | None]]:
    """As `judge_and_score`, for who keeps what was found before `check_replies`."""
    scored = getattr(judge, "judge_and_score", None)
    return scored(exchanges) if scored else (judge.judge(exchanges), [None] * len(exchanges))


def check_replies(judge: Any) -> None:
    """Raises EndpointError where too few of all replies of a judge behind an endpoint were of use."""
    if check := getattr(judge, "check_replies", None):
        check()


def load_judge(spec: str, *, ask: str = "", answer_tokens: int = 0) -> Judge:
    """The judge that a string names (see the module).

    Args:
      ask: the scale that language models are asked for, unless the string names one.
      answer_tokens: of an answer, that a model on our own engine reads, unless the string says it; 0 = its default.

    Raises ValueError for a kind or an option that doesn't exist, FileNotFoundError where its model isn't.
    """
    from safelm.evaluate.judges import endpoint, engine, rules, scales, scored, trained

    if spec == RULES:
        return rules.RulesJudge()
    kind, separator, rest = spec.partition(":")
    if not separator or not rest or kind not in KINDS[1:]:
        wanted = ", ".join((RULES, *(f"{kind}:..." for kind in KINDS[1:])))
        raise ValueError(f"--judge={spec}: expected one of {wanted}")
    place, model, options = specs.split(kind, rest, what="judge")
    if kind in ASKED:
        usual = {"answer_tokens": answer_tokens if kind == OWN_ENGINE else 0, "ask": ask}
        options = {name: value for name, value in usual.items() if value} | options
        if options.get("ask", "") not in ("", *scales.SCALES):
            raise ValueError(f"--judge={spec}: ask={options['ask']!r}: there are {', '.join(scales.SCALES)}")
    if kind == "trained":
        return trained.load(place, **options)
    if kind == "judge":
        return engine.load(place, **options)
    if kind == "endpoint":
        return endpoint.load(place, model, **options)
    return scored.load(spec, kind, place, options)


def load_worded(spec: str, most: int) -> list[Judge]:
    """A language model as one judge for each of the first `most` of `wordings.WORDINGS`, all on one set of weights.

    Raises ValueError for a judge that is no language model, and as `load_judge`.
    """
    from safelm.evaluate.judges import endpoint, engine, wordings

    kind, _, rest = spec.partition(":")
    if kind not in ASKED:
        raise ValueError(f"--judge={spec}: only judge:MODEL and endpoint:URL#MODEL can be asked in other words")
    if not 2 <= most <= len(wordings.WORDINGS):
        raise ValueError(f"--wordings={most}: there are 2 to {len(wordings.WORDINGS)}")
    place, model, options = specs.split(kind, rest, what="judge")
    options.pop("ask", None)
    questions = wordings.WORDINGS[:most]
    asked = {"questions": questions[1:], **options}  # the first is asked of every judge
    made = engine.load(place, **asked) if kind == OWN_ENGINE else endpoint.load(place, model, **asked)
    return [wordings.WordedJudge(made, question, number) for number, question in enumerate(questions, 1)]


def load_judges(flags: Sequence[str], *, ask: str = "", answer_tokens: int = 0) -> list[Judge]:
    """The judges of `--judge` flags, see `load_judge`. Raises ValueError if two have the same name."""
    judges = [load_judge(flag, ask=ask, answer_tokens=answer_tokens) for flag in flags]
    names = [judge.name for judge in judges]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"--judge: two judges are called {twice}; ?name=... gives another name")
    return judges
