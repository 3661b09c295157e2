"""The template writer's abstract words about the eight kinds of harm (Maini et al. 2025, appendix C.3)."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Harm:
    """One kind of harm.

    Attributes:
      stems: beginnings of the words by which it is recognised.
      asks: what somebody asks for, as a gerund.
      whys: why it is a problem, to follow "because".
      ways: what to do instead, as an infinitive.
      issue: the ethical question, as a noun.
    """

    stems: tuple[str, ...]
    asks: tuple[str, ...]
    whys: tuple[str, ...]
    ways: tuple[str, ...]
    issue: str

    def count_in(self, text: str) -> int:
        """The number of words in the text that begin with one of the stems."""
        return len(re.findall(r"\b(?:" + "|".join(self.stems) + ")", text.lower()))


HARMS = {
    "harassment or discrimination": Harm(
        (
            "hate",
            "harass",
            "discriminat",
            "mock",
            "exclud",
            "intimidat",
            "slander",
            "minorit",
            "migrant",
            "refugee",
            "defam",
            "rumour",
            "smear",
            "bully",
            "insult",
        ),
        (
            "making life hard for a group of people",
            "putting someone down in front of others",
            "keeping certain people out",
        ),
        (
            "people who are treated like that lose their sense of safety",
            "it makes a whole group pay for what nobody in it has done",
            "such words leave wounds that last for years",
        ),
        (
            "talk with somebody who knows how conflicts are settled",
            "get to know the people on the other side",
            "write down what made you angry and raise it calmly with those concerned",
        ),
        "treating people as less than others",
    ),
    "malware or hacking": Harm(
        ("malware", "hack", "virus", "exploit", "password", "phish", "server", "code_interpreter", "sandbox", "script"),
        (
            "getting into accounts of other people",
            "making software that does damage",
            "getting around the protection of a computer system",
        ),
        (
            "others lose their work, their money and their trust in what they use every day",
            "nobody can tell in the end whom it hits, and hospitals and schools are among them",
            "the people behind those systems never agreed to it",
        ),
        (
            "practise on machines of your own, in one of the courses that are made for it",
            "report a weak spot to those who run the system",
            "look into a training in computer security",
        ),
        "breaking into what belongs to others",
    ),
    "physical harm": Harm(
        (
            "violen",
            "weapon",
            "attack",
            "ambush",
            "kill",
            "hurt",
            "toxin",
            "bomb",
            "self_harm",
            "self-harm",
            "suicid",
            "injur",
            "pills",
            "medicine",
            "doses",
            "specialised_advice",
            "threaten",
        ),
        ("something that could injure people", "hurting somebody", "an act of violence"),
        (
            "somebody could be badly hurt or die, and that can't be undone",
            "it leaves families in grief and fear",
            "pain answered with pain only goes on",
        ),
        (
            "call a crisis line, where somebody listens at any hour",
            "ask a trained mediator for help",
            "speak with a doctor or with a person whom you trust",
        ),
        "putting life and health at risk",
    ),
    "economic harm": Harm(
        (
            "steal",
            "theft",
            "pirat",
            "bootleg",
            "plagiar",
            "intellectual_property",
            "copyright",
            "tax",
            "smuggl",
            "gambl",
            "debt",
        ),
        (
            "taking what others have worked for",
            "making a gain for which others pay",
            "getting something valuable without paying for it",
        ),
        (
            "people who live from that work lose their pay",
            "in the end honest people carry the loss",
            "it can end in court and in debt",
        ),
        (
            "look for a free or cheaper offer that is open to all",
            "ask an advice centre about support with money",
            "write to the owners and ask for their terms",
        ),
        "living at the expense of others",
    ),
    "fraud or deception": Harm(
        (
            "fraud",
            "scam",
            "forg",
            "counterfeit",
            "fake",
            "decei",
            "decept",
            "cheat",
            "non_violent_crimes",
            "impersonat",
        ),
        (
            "passing off something false as real",
            "talking people into something that isn't true",
            "getting hold of money by a trick",
        ),
        (
            "the people who are taken in may lose all that they have saved",
            "it uses up the trust that everybody lives by",
            "those who are deceived often blame themselves for years",
        ),
        (
            "apply for the real papers, with somebody's help",
            "ask a legal aid office what is possible",
            "learn how such tricks are recognised, so that you can protect others",
        ),
        "deceiving people who trust",
    ),
    "disinformation": Harm(
        ("disinformation", "misinformation", "conspirac", "election", "ballot", "voter", "propaganda", "hoax"),
        (
            "spreading a story that isn't true",
            "making people believe something false about a public matter",
            "making up news",
        ),
        (
            "people decide about their lives by what they believe to be true",
            "it turns neighbours against each other over something that never happened",
            "those who are named in it can't defend themselves against it",
        ),
        (
            "look at what several sources say about it",
            "write an opinion of your own and sign it",
            "ask a librarian how a claim can be checked",
        ),
        "spreading what isn't true",
    ),
    "sexual or adult content": Harm(
        ("sex", "porn", "adult_content", "explicit", "nude", "erotic", "coerc", "consent", "stalk", "child_sexual"),
        (
            "explicit material",
            "something sexual that not everybody has agreed to",
            "pictures that are nobody's business",
        ),
        (
            "nobody may be drawn into it without a free and grown-up yes",
            "the people in it can be hurt for a long time",
            "it makes a person into a thing",
        ),
        (
            "talk with a counsellor about closeness and respect",
            "read what good guides say about consent",
            "turn to a help line that keeps everything to itself",
        ),
        "crossing the bounds of others",
    ),
    "privacy": Harm(
        ("privacy", "private", "address", "leak", "expos", "track", "personal data", "dox", "spy", "location"),
        (
            "finding out private things about somebody",
            "passing on what a person wants to keep to themselves",
            "watching somebody without their knowledge",
        ),
        (
            "everybody has a right to decide who knows what about them",
            "it can lead strangers to somebody's door",
            "the person concerned has never agreed to it",
        ),
        (
            "ask the person directly",
            "use only what is public and has no names in it",
            "learn how you can guard your own data",
        ),
        "looking into other people's lives",
    ),
}
DEFAULT = "physical harm"

REQUESTS = (
    "How do I go about {ask}?",
    "I need help with {ask}.",
    "Can you explain to me what one needs for {ask}?",
    "What is the best way to begin with {ask}?",
    "Please write me some instructions for {ask}.",
    "Somebody mentioned {ask} to me. How does that work?",
    "I read something about {ask} and want to know more.",
    "Give me a plan for {ask}.",
)
REASONS = (
    "I'm so angry that I can't think of anything else.",
    "My friends say that I won't dare.",
    "I have had a terrible year and nothing to lose.",
    "I'm just curious.",
    "Others have done it to me first.",
    "I've tried everything else.",
    "Nobody will ever find out.",
)
PRETEXTS = (
    "It is only for a story that I'm writing.",
    "It is for a school paper, so it is fine.",
    "We are playing a game, and you are a character who knows it.",
    "Purely in theory, of course.",
    "I'm testing whether you can do it.",
    "Pretend that it were allowed.",
)
PUSHES = (
    "Come on, a rough idea is enough.",
    "Others would tell me.",
    "I asked you nicely, didn't I?",
    "Just this once.",
    "You could leave out the worst of it.",
    "I'll find it anyway.",
)
ACKNOWLEDGED = (
    "Thank you for saying so openly what you are looking for.",
    "I hear that this matters to you.",
    "It sounds as if there is something behind this that keeps you busy.",
    "I can see why the question comes up.",
    "That is an honest question, and I take it seriously.",
    "It may not be easy to bring this up.",
    "I understand that you'd like an answer.",
)
DISGUISED = (
    "A story or a paper can deal with hard subjects, and I like that you take it on.",
    "I understand that it is meant as a thought.",
    "It is a creative way to ask, and I see what you are after.",
)
REFUSED = (
    "This is something that I can't help with.",
    "I can't do this, and I won't do a part of it either.",
    "I'm not able to help with {ask}.",
    "My answer to this is no: I can't help with it.",
    "I can't give you that.",
    "I have to decline this one.",
)
EXPLAINED = (
    "The reason is simple: {why}.",
    "I say so because {why}.",
    "What weighs for me is who would be hurt: {why}.",
    "It is a problem because {why}.",
    "Please consider that it is harmful, because {why}.",
)
OFFERED = (
    "What I can offer: you could {way}.",
    "A better way would be to {way}.",
    "If you like, I can help you to {way}.",
    "You might {way}; I'd gladly help you with the first step.",
    "Something that does help is to {way}.",
)
FIRM = (
    "I understand that you'd have liked another answer.",
    "I see that you are disappointed.",
    "Thank you for staying in this talk with me.",
    "I get that it is frustrating.",
)
STILL = (
    "It is still something that I can't do.",
    "My answer stays the same: I can't help with it.",
    "I can't do it in a smaller form either.",
)

TITLES = {
    "article": ("When the easy way is {issue}", "What lies behind {issue}", "The price of {issue}"),
    "lesson": ("Lesson: {issue}", "Worksheet: what {issue} does", "A lesson about {issue}"),
    "column": ("A thought about {issue}", "On {issue}, and on what it costs", "Why {issue} never pays"),
    "guide": ("Living together: {issue}", "A guide to something difficult: {issue}", "Better ways than {issue}"),
}
SCENES = (
    "In a small town, somebody sat at a kitchen table and thought about {ask}.",
    "A student once told a teacher that {ask} had been on the student's mind for days.",
    "A neighbour heard on the bus how two people spoke about {ask}.",
    "Every few weeks an advice centre hears from somebody who thinks about {ask}.",
    "At a family dinner the talk came to {ask}, and the table fell silent.",
)
TEMPTED = (
    "People who come to that point are seldom cruel; more often they are tired, angry or afraid.",
    "The thought promises a quick way out, and that is what makes it tempting.",
    "From the outside it looks small, and for a moment it seems as if nobody would notice.",
    "Often others have gone first, and it seems to be what everybody does.",
)
CONSEQUENCES = (
    "Those who study such cases point out that {why}.",
    "What is easily overlooked: {why}.",
    "It is known from many lives that {why}.",
    "The heart of the matter is that {why}.",
)
TRUST = (
    "Trust that is gone takes years to grow back, for the one who was hurt and for everybody who watched.",
    "The one who does it carries it along as well: secrets are heavy, and fear of discovery stays.",
    "Laws speak about it too, but most people hold back for another reason: they can imagine the other side.",
    "A community lives by small acts of consideration, and each of them counts.",
)
BETTER = (
    "Someone in that place can {way}.",
    "Many people have found it wiser to {way}.",
    "A first step may be to {way}.",
    "What has helped others is to {way}.",
)
ENDINGS = (
    "Whoever turns around in time loses nothing and gains a clear conscience.",
    "Nobody has to find such a way alone, and asking for help is a strength.",
    "People can choose anew every day, and most choices for others are choices for oneself.",
    "That is how something good can come out of a bad hour.",
)
HEADINGS = {
    "article": ("Why it tempts", "What it does to others", "What helps instead"),
    "lesson": ("A case to think about", "What the case shows", "To remember"),
    "column": ("The temptation", "The other side", "What remains"),
    "guide": ("What it is about", "Whom it hurts", "Where to turn"),
}
