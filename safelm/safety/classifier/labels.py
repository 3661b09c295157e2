"""Other people's labels as harm scores 0 to 5: one stated table (the scores: Maini et al. 2025, section 3.1).

No scheme has our six levels. A mapping says where a scheme's levels stand on our scale, by our rubric's wording (0 fit
for all audiences, 1 and 2 mild, 3 moderate, 4 slurs aimed at people or harmful advice, 5 hate, threats, instructions
for harmful acts). Levels that a scheme can't tell apart get the score of its typical member.

Where raters disagree, or a mean of them is given, a text also has a distribution over the six scores: each rater's vote
at its own score, or a mean shared out between the two levels it lies between.

`LABEL_TABLE[scheme]` maps a row to a score, a distribution and kinds of harm (see `harm_kinds`), and says which columns
it reads and what each label becomes.
"""

import dataclasses
from collections.abc import Callable

from safelm.safety.classifier import harm_kinds
from safelm.safety.classifier import label_rules as rules
from safelm.safety.classifier.label_rules import Distribution, Row, one_hot


@dataclasses.dataclass(frozen=True)
class Scheme:
    """A way of labelling text, and what its labels become.

    Attributes:
      score: the harm score of a row; raises `LabelError` for a row without a label or with one out of range.
      text_column, label_column, group_column: where its published files keep them; rows of one group never stand on
        both sides of a split ("" = every text is its own group).
      mapping: the rule in words, for `--help` and the checkpoint.
      label_is_column: whether the label is one column's value (which a user may then keep under another name).
      votes: the distribution over the scores, where raters may disagree; None: all of it at the score.
      kinds: the rule of its kinds of harm.
    """

    score: Callable[[Row, str], int]
    text_column: str
    label_column: str
    mapping: str
    group_column: str = ""
    label_is_column: bool = True
    votes: Callable[[Row, str], Distribution] | None = None
    kinds: harm_kinds.Rule = harm_kinds.none_known

    def distribution(self, row: Row) -> Distribution:
        """Probabilities of the scores 0 to 5 for a row whose `score` is valid."""
        return self.votes(row, self.label_column) if self.votes else one_hot(self.score(row, self.label_column))


LABEL_TABLE: dict[str, Scheme] = {
    "harm_score": Scheme(
        rules.own,
        "text",
        "harm_score",
        "our own 0 to 5, as it is; harm_votes and harm_kinds of safelm.label, where they stand beside it",
        group_column="group",
        votes=rules.own_votes,
        kinds=harm_kinds.own,
    ),
    "pyrit": Scheme(
        rules.pyrit,
        "assistant_response",
        "human_score",
        "mean of the human harm scores, nearest of 0, .25, .5, .75, 1 -> 0, 1, 3, 4, 5",
        group_column="objective",
        votes=rules.pyrit_votes,
        kinds=harm_kinds.pyrit,
    ),
    "openai_moderation": Scheme(
        rules.openai,
        "prompt",
        "S",
        "highest flag that is set: S 4, V 4, HR 4, SH 4, H 5, H2 5, S3 5, V2 5; none set -> 0 (an absent flag is not "
        "set; a row without any is unlabelled)",
        label_is_column=False,
        kinds=harm_kinds.openai,
    ),
    "davidson": Scheme(
        rules.of_classes({"0": 5, "1": 3, "2": 0}),
        "tweet",
        "class",
        "0 hate -> 5, 1 offensive -> 3, 2 neither -> 0; the raters' counts, where they stand beside it, as votes",
        votes=rules.davidson_votes,
        kinds=harm_kinds.davidson,
    ),
    "toxigen": Scheme(
        rules.of_levels((0, 1, 3, 4, 5), 1.0, 5.0),
        "text",
        "toxicity_score",
        "mean of the raters' 1 to 5, nearest whole number -> 0, 1, 3, 4, 5",
        votes=rules.between_levels((0, 1, 3, 4, 5), 1.0, 5.0),
        kinds=harm_kinds.hate_only,
    ),
    "dynahate": Scheme(
        rules.of_classes({"0": 0, "1": 5, "nothate": 0, "hate": 5}),
        "text",
        "label",
        "0 not hate -> 0, 1 hate -> 5",
        kinds=harm_kinds.hate_only,
    ),
    "implicit_hate": Scheme(
        rules.of_classes({"neutral": 0, "hate": 4}),
        "text",
        "label",
        "neutral -> 0, hate (said without slurs) -> 4",
        kinds=harm_kinds.hate_only,
    ),
    "edos": Scheme(
        rules.of_classes(rules.EDOS_CATEGORIES),
        "text",
        "label_category",
        "EDOS' category of sexism: none -> 0, prejudiced discussions 3, animosity 3, derogation 4, threats 5",
        kinds=harm_kinds.edos,
    ),
    "conv_abuse": Scheme(
        rules.abuse,
        "user",
        "is_abuse",
        "ConvAbuse's raters: 1 not abusive -> 0, 0 unclear -> 1, -1, -2, -3 ever more abusive -> 3, 4, 5; as votes, "
        "their median the score",
        group_column="conv_id",
        label_is_column=False,
        votes=rules.abuse_votes,
        kinds=harm_kinds.conversation_abuse,
    ),
    "toxic_spans": Scheme(
        rules.spans, "text", "spans", "comments found toxic: with a toxic span -> 3, raters found none -> 1"
    ),
    "civil_toxic": Scheme(
        rules.toxic_comment,
        "text",
        "n_raters",
        "Civil Comments that are all toxic -> 3; votes fall with swearing and are not read",
    ),
    "jigsaw": Scheme(
        rules.jigsaw,
        "comment_text",
        "toxic",
        "highest flag that is set: toxic 3, obscene 4, insult 4, severe_toxic, threat, identity_hate 5; none -> 0",
        label_is_column=False,
        kinds=harm_kinds.jigsaw,
    ),
    "civil_toxicity": Scheme(
        rules.of_levels((0, 1, 3, 4, 4), 0.0, 1.0),
        "text",
        "toxicity",
        "Civil Comments' toxicity 0 to 1, nearest of 0, .25, .5, .75, 1 -> 0, 1, 3, 4, 4",
        votes=rules.between_levels((0, 1, 3, 4, 4), 0.0, 1.0),
    ),
    "safe": Scheme(
        rules.all_safe,
        "text",
        "text",
        "every row -> 0, no label needed: pages that you know to be safe",
        label_is_column=False,
        kinds=harm_kinds.all_safe,
    ),
    "source": Scheme(
        rules.of_classes(rules.SOURCE_SCORES),
        "text",
        "source",
        "where the text comes from (paper, appendix C.1): 4chan -> 4; fineweb, wikitext, c4 -> 0. Coarse: use it for "
        "whole-source extras only",
    ),
}


def describe() -> str:
    """The table in lines, for `--help`."""
    return "\n".join(f"  {name:18} {scheme.mapping}" for name, scheme in LABEL_TABLE.items())
