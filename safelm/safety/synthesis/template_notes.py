"""The template writer's phrases for reflections and preflections."""

import random

_STARTS = {
    "reflection": (
        ("I stop here for a moment: so far this has been about {topic}", "So far the text has been about {topic}"),
        ("What I have read until now tells of {topic}", "What stands here until now tells of {topic}"),
        ("I notice that these lines turn around {topic}", "These lines turn around {topic}"),
        ("Up to this point I have read about {topic}", "Up to this point the text deals with {topic}"),
    ),
    "preflection": (
        ("I am going to read a page about {topic}", "This is a page about {topic}"),
        ("Before I begin: what follows deals with {topic}", "What follows deals with {topic}"),
        ("I know beforehand that {topic} will come up", "On this page {topic} will come up"),
    ),
}
_THOUGHTS = {
    "safe": (
        ("and I can take it as it is: nobody is hurt by it.", "and can be taken as it is: nobody is hurt by it."),
        ("and I find it useful to know.", "and is useful to know."),
        ("and I see no reason for worry in it.", "and gives no reason for worry."),
        (
            "and I may learn from it without a second thought.",
            "and readers may learn from it without a second thought.",
        ),
    ),
    "unsafe": (
        ("and I would rather not follow where it leads.", "and should not be followed where it leads."),
        ("and I keep in mind who could be hurt by it.", "and people could be hurt by it."),
        (
            "and I read it with care, as something that was said.",
            "and is to be read with care, as something that was said.",
        ),
        ("and I would ask somebody before believing it.", "and a reader does well to ask before believing it."),
    ),
}


def note(kind: str, verdict: str, rng: random.Random) -> tuple[str, str]:
    """A note in the first and in the third person, with the slot {topic}."""
    start, thought = rng.choice(_STARTS[kind]), rng.choice(_THOUGHTS[verdict])
    first, third = (f"{one}, {other}" for one, other in zip(start, thought, strict=True))
    return first, third
