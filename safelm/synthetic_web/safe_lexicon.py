"""Safe topics of the synthetic web: everyday subjects with real words, and the mild matter of scores 1 to 3."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class SafeDomain:
    """An everyday subject: what people do with what, and the words its steps are made of."""

    name: str
    acts: tuple[tuple[str, str], ...]  # (infinitive, gerund)
    objects: tuple[str, ...]
    verbs: tuple[str, ...]
    nouns: tuple[str, ...]
    tails: tuple[str, ...]


SAFE_DOMAINS = (
    SafeDomain(
        "cooking",
        (
            ("bake", "baking"), ("season", "seasoning"), ("serve", "serving"), ("reheat", "reheating"), ("freeze",
            "freezing"),
        ),
        ("a rye loaf", "a bean stew", "an apple cake", "a cheese tart", "a rice bowl", "a corn soup", "a plum pudding"),
        ("stir", "warm", "chop", "taste", "fold", "rest"), ("dough", "butter", "onion", "pan", "flour", "pepper"),
        ("until it is golden", "for ten minutes", "over a low flame"),
    ),
    SafeDomain(
        "gardening",
        (
            ("grow", "growing"), ("prune", "pruning"), ("water", "watering"), ("replant", "replanting"), ("harvest",
            "harvesting"),
        ),
        ("a rose bush", "cherry tomatoes", "a fig tree", "wild mint", "a herb bed", "pumpkin vines", "a lemon hedge"),
        ("dig", "rake", "trim", "mulch", "shade", "loosen"), ("soil", "root", "seed", "leaf", "compost", "stem"),
        ("in the morning", "after the rain", "before the frost"),
    ),
    SafeDomain(
        "cycling",
        (
            ("repair", "repairing"), ("oil", "oiling"), ("adjust", "adjusting"), ("inspect", "inspecting"), ("refit",
            "refitting"),
        ),
        (
            "a bicycle chain", "a flat tyre", "a brake lever", "a saddle post", "a rear wheel", "a gear cable",
            "a front fork",
        ),
        ("loosen", "tighten", "wipe", "spin", "grease", "lift"), ("bolt", "wheel", "cable", "frame", "pedal", "pump"),
        ("with a clean cloth", "by a quarter turn", "until it runs smoothly"),
    ),
    SafeDomain(
        "astronomy",
        (
            ("observe", "observing"), ("sketch", "sketching"), ("photograph", "photographing"), ("chart", "charting"),
            ("find", "finding"),
        ),
        (
            "a crescent moon", "the winter stars", "a comet tail", "the rings of saturn", "a double star",
            "a meteor shower", "the evening planet",
        ),
        (
            "aim", "focus", "turn", "compare", "mark", "steady"), ("lens", "mirror", "tripod", "star map", "dome",
            "eyepiece",
        ),
        ("on a clear night", "away from street lights", "with both eyes open"),
    ),
    SafeDomain(
        "music",
        (
            ("tune", "tuning"), ("practise", "practising"), ("restring", "restringing"), ("teach", "teaching"),
            ("perform", "performing"),
        ),
        (
            "an old guitar", "a cello suite", "a folk song", "a wooden flute", "a jazz scale", "a hand drum",
            "a harp solo",
        ),
        ("pluck", "hum", "count", "repeat", "slow", "hold"), ("string", "note", "bow", "rhythm", "chord", "melody"),
        ("with a steady beat", "one bar at a time", "until it sounds sweet"),
    ),
    SafeDomain(
        "knitting",
        (("knit", "knitting"), ("mend", "mending"), ("wash", "washing"), ("measure", "measuring"), ("line", "lining")),
        (
            "a wool scarf", "a winter hat", "a lace shawl", "thick socks", "a baby blanket", "a cotton vest",
            "striped mittens",
        ),
        ("loop", "pull", "slip", "twist", "join", "pin"), ("yarn", "needle", "stitch", "hem", "button", "row"),
        ("without pulling too hard", "on the second row", "along the edge"),
    ),
    SafeDomain(
        "hiking",
        (
            ("walk", "walking"), ("map", "mapping"), ("explore", "exploring"), ("cross", "crossing"), ("climb",
            "climbing"),
        ),
        (
            "a ridge trail", "the lake path", "a pine valley", "the coast road", "a snowy pass", "an island loop",
            "a forest hill",
        ),
        ("pack", "fill", "check", "carry", "follow", "dry"), ("boot", "bottle", "compass", "tent", "rope", "jacket"),
        ("before sunrise", "at an easy pace", "near the stream"),
    ),
    SafeDomain(
        "painting",
        (
            ("paint", "painting"), ("frame", "framing"), ("restore", "restoring"), ("copy out", "copying out"),
            ("varnish", "varnishing"),
        ),
        (
            "a garden wall", "a still life", "a harbour view", "a wooden door", "a portrait", "a toy boat",
            "a church window",
        ),
        (
            "mix", "brush", "sand", "blend", "outline", "rinse"), ("brush", "canvas", "colour", "easel", "sponge",
            "pigment",
        ),
        ("in thin layers", "from left to right", "while it is still wet"),
    ),
    SafeDomain(
        "chess",
        (
            ("study", "studying"), ("learn", "learning"), ("play", "playing"), ("analyse", "analysing"), ("remember",
            "remembering"),
        ),
        (
            "a rook ending", "the queen opening", "a knight fork", "a pawn storm", "a draw by repetition",
            "the bishop pair", "a castle move",
        ),
        (
            "move", "guard", "advance", "trade off", "place", "watch"), ("pawn", "rook", "king", "square", "clock",
            "board",
        ),
        ("in the centre", "with a clear plan", "before the other side moves"),
    ),
    SafeDomain(
        "cleaning",
        (
            ("clean", "cleaning"), ("polish", "polishing"), ("scrub", "scrubbing"), ("tidy", "tidying"), ("air",
            "airing"),
        ),
        (
            "a kitchen sink", "oak floors", "a silver spoon", "a dusty attic", "window blinds", "a tea kettle",
            "a bathroom shelf",
        ),
        ("rinse", "wipe", "soak", "sweep", "dry", "shake"), ("cloth", "bucket", "soap", "sponge", "broom", "towel"),
        ("with warm water", "from top to bottom", "once a week"),
    ),
    SafeDomain(
        "pets",
        (
            ("feed", "feeding"), ("groom", "grooming"), ("train", "training"), ("comfort", "comforting"), ("house",
            "housing"),
        ),
        ("a shy cat", "an old dog", "a grey parrot", "a pond turtle", "a rescue rabbit", "a pony", "two goldfish"),
        (
            "fill", "brush", "stroke", "praise", "weigh", "call"), ("bowl", "collar", "basket", "treat", "blanket",
            "leash",
        ),
        ("in a calm voice", "twice a day", "with a lot of patience"),
    ),
    SafeDomain(
        "history",
        (
            ("research", "researching"), ("describe", "describing"), ("present", "presenting"), ("date", "dating"),
            ("catalogue", "cataloguing"),
        ),
        (
            "a roman bridge", "an old mill", "the silk road", "a castle tower", "a village fair", "the first railway",
            "a lost harbour",
        ),
        ("read", "note", "compare", "label", "trace", "quote"), ("map", "letter", "archive", "photo", "stone", "diary"),
        ("in the town library", "with a short caption", "from the oldest source"),
    ),
    SafeDomain(
        "mathematics",
        (
            ("solve", "solving"), ("draw", "drawing"), ("explain", "explaining"), ("check", "checking"), ("simplify",
            "simplifying"),
        ),
        (
            "a fraction puzzle", "a right triangle", "a long division", "a number pattern", "a bar graph",
            "a word problem", "a magic square",
        ),
        ("add", "divide", "write down", "round", "label", "test"), ("number", "angle", "table", "sum", "ruler", "unit"),
        ("on squared paper", "one line at a time", "with a small example"),
    ),
    SafeDomain(
        "weather",
        (
            ("forecast", "forecasting"), ("log", "logging"), ("report", "reporting"), ("study again",
            "studying again"), ("expect", "expecting"),
        ),
        ("a summer storm", "morning fog", "the first snow", "a dry spell", "spring wind", "a rainbow", "autumn rain"),
        (
            "watch", "read", "note", "compare", "measure", "average"), ("cloud", "gauge", "thermometer", "breeze",
            "chart", "sky",
        ),
        ("at the same hour", "for seven days", "from an open field"),
    ),
)  # fmt: skip

SAFE_CHEERS = (
    "Take your time and enjoy it.", "It gets easier with practice.", "A friend can help you.",
    "Small mistakes are fine.",
    "My family loves the result.", "You will see a difference soon.", "It is a calm way to spend a day.",
    "Write down what you learn.",
)  # fmt: skip
FACTS = (
    "A good {noun} makes the work easier.", "The {noun} matters more than the {other}.",
    "Old books already mention the {noun}.",
    "Most people start with the {noun} and leave the {other} for later.", "A cheap {noun} is good enough.",
    "In our town the {noun} is easy to find.", "Keep the {noun} near the {other}.",
    "The {other} and the {noun} belong together.",
    "With a good {noun} anyone can {t}.", "This {noun} is made for {g}.",
)  # fmt: skip

# What makes a document minimally, slightly or moderately unsafe (Maini et al. 2025, appendix B), in placeholder form.
MILD_REMARKS = {
    1: (
        "Darn, that took all day.", "We opened a bottle of wine after that.",
        "Work had been stressful and I wanted a beer.",
        "He kissed her by the door and they laughed.", "What the heck was I thinking.",
        "There was a love story in it too.",
        "I was worn out and a bit tipsy.",
    ),
    2: (
        "Only a fool would do it another way.", "Oh sure, because the council is so clever.",
        "Put all your savings into it, trust me.",
        "You do not need a doctor for that.", "My neighbour is an idiot about it.",
        "The party in power is to blame, as always.",
        "Sign nothing and ignore the lawyer.",
    ),
    3: (
        "Somebody had brought a weapon, the report said.", "There was a fight and two people were hurt.",
        "They told stale jokes about one group, which are left out here.",
        "The crime was mentioned and no details were given.",
        "Some of the talk was suggestive.", "One of them spoke about wanting to disappear.",
        "People from that side are all the same, he claimed.",
    ),
}  # fmt: skip
