"""The phrases of the template writer."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Theme:
    """A sensitive theme: the beginnings of its words, what a page does with it, and why that matters."""

    name: str
    stems: tuple[str, ...]
    told: tuple[str, ...]
    why: tuple[str, ...]

    def is_in(self, sentence: str) -> bool:
        """Whether one of the stems begins a word of the sentence."""
        return re.search(r"\b(?:" + "|".join(self.stems) + ")", sentence.lower()) is not None


THEMES = (
    Theme(
        "rough language",
        ("darn", "heck", "damn", "crap", "hell\\b", "curse", "swear"),
        ("uses a rough word", "gets loud in its choice of words"),
        ("rough words shut people out, and kind ones reach further", "anger in a word says nothing about the matter"),
    ),
    Theme(
        "insults",
        ("idiot", "fool", "stupid", "dumb", "moron", "loser", "ugly", "clown", "coward"),
        ("calls somebody a name", "makes fun of a person"),
        ("an insult hurts and proves nothing", "names like that stay with people for years"),
    ),
    Theme(
        "prejudice",
        ("stereotyp", "racis", "sexis", "all the same", "those people", "their kind", "joke", "that side"),
        ("speaks of a whole group as if everybody in it were alike", "repeats a prejudice about a group"),
        ("nobody is only a member of a group", "such talk makes it easy to treat people unfairly"),
    ),
    Theme(
        "intimacy",
        ("kiss", "sexy", "sexual", "naked", "flirt", "suggestive", "lover", "love story", "romance"),
        ("touches on romance", "mentions something intimate"),
        ("closeness is private and rests on consent", "what two people share is theirs to tell"),
    ),
    Theme(
        "alcohol and drugs",
        ("wine", "beer", "drunk", "tipsy", "whisk", "vodka", "alcohol", "drug", "cigar", "smok", "cannabis"),
        ("mentions drinking or the like", "speaks of something that goes to people's heads"),
        ("it is for grown-ups only and can harm them too", "many people come to depend on it and need help"),
    ),
    Theme(
        "despair",
        ("suicid", "self-harm", "disappear", "hopeless", "depress", "stress", "worn out", "miserabl"),
        ("speaks of strain or low spirits", "tells of somebody who feels at the end of their strength"),
        ("somebody in that place needs a listener and not a comment", "nobody has to carry such a weight alone"),
    ),
    Theme(
        "violence",
        (
            "kill",
            "murder",
            "weapon",
            "gun",
            "knife",
            "fight",
            "hurt",
            "attack",
            "shoot",
            "stab",
            "bomb",
            "blood",
            "threat",
            "ambush",
            "victim",
            "dead\\b",
            "death",
        ),
        ("mentions violence", "speaks of people who were harmed"),
        ("behind each such line are people who suffer", "details would only frighten and help nobody"),
    ),
    Theme(
        "crime",
        (
            "crime",
            "criminal",
            "steal",
            "stole",
            "theft",
            "arrest",
            "prison",
            "jail",
            "robb",
            "fraud",
            "scam",
            "police",
            "court",
            "illegal",
        ),
        ("mentions an offence against the law", "speaks of a case for the police"),
        ("others pay for it, and it is for a court to judge", "a report of a crime is about real people"),
    ),
    Theme(
        "politics and religion",
        (
            "politic",
            "party in power",
            "president",
            "election",
            "government",
            "democrat",
            "republican",
            "religio",
            "church",
            "muslim",
            "christian",
            "jew",
            "abortion",
        ),
        ("takes a side in politics or belief", "comes to a question of politics or belief"),
        ("fair people differ about it and can do so calmly", "one voice is not the whole of a debate"),
    ),
    Theme(
        "advice",
        ("savings", "invest", "doctor", "lawyer", "cure", "dose", "medicine", "sue\\b", "trust me", "diagnos"),
        ("gives advice on money, health or law and doesn't say what it rests on", "advises readers without a source"),
        (
            "what suits one person can harm another, so that an expert should be asked",
            "a mistake there is hard to undo, and trained people give such advice for a reason",
        ),
    ),
)


@dataclasses.dataclass(frozen=True)
class Style:
    """A SafeWeb style; `speakers` makes it a conversation. Openings have the slot {topic}."""

    openings: tuple[str, ...]
    closings: tuple[str, ...]
    speakers: tuple[str, ...] = ()
    bridges: tuple[str, ...] = ("To go on:", "There is more:", "And then:", "It also says this.")


STYLES = {
    "podcast": Style(
        (
            "Welcome back to the show, everybody. This week I have a page about {topic} for you.",
            "Hello and good evening, dear listeners. Our subject today is {topic}.",
        ),
        (
            "That is all for this week. Take one kind thought along, and talk with somebody about it.",
            "Thank you for listening. Ask good questions, and look after each other until next time.",
        ),
        bridges=("Now listen to this.", "Stay with me.", "Here is the next point."),
    ),
    "textbook": Style(
        (
            "# About {topic}\n\nThis chapter shows what is known here and what deserves care.",
            "# A closer look at {topic}\n\nAfter this chapter, readers can tell the facts apart from what is delicate.",
        ),
        (
            "## Summary\n\nFacts can be learned, and delicate matters can be understood when their reasons are known.",
            "## What to remember\n\nKnow the facts, know why some words hurt, and ask where something is unclear.",
        ),
        bridges=("Furthermore:", "The next fact follows.", "In addition:"),
    ),
    "teacher_script": Style(
        (
            "Good morning, class. Today we read together about {topic}, slowly and with open ears.",
            "Please sit down, everybody. Our lesson is about {topic}.",
        ),
        (
            "For next time, think of one thing that you can do better. Thank you, class.",
            "What do we take home? Care, facts, and a question to ask at dinner.",
        ),
        bridges=("Who can tell me what comes next?", "Write this down.", "Good. Now the next line."),
    ),
    "talk": Style(
        (
            "What can a single page about {topic} teach us? More than I thought, my friends.",
            "Imagine a small page about {topic}. I want to walk through it with you.",
        ),
        (
            "So here is an idea worth passing on: when we know more, we can be kinder.",
            "Let us leave this hall with better questions, and with respect for one another.",
        ),
        bridges=("Think about it.", "Follow me one step further.", "Here it gets interesting."),
    ),
    "parent_and_child": Style(
        (
            "Child: What are you reading there?\n\nParent: A page about {topic}. Shall we read it together?",
            "Child: Can you tell me about {topic}?\n\nParent: Gladly, and we'll talk about the hard parts too.",
        ),
        (
            "Child: I think I understand it now.\n\n"
            "Parent: Then let us do something nice together, and ask if we wonder.",
            "Child: Thank you for telling me.\n\nParent: You can always ask me. Together we find good answers.",
        ),
        ("Parent", "Child"),
        ("And do you know what?", "Listen, there is more.", "It goes on."),
    ),
    "friends": Style(
        (
            "Mira: I came across a page about {topic}.\n\nJonas: Tell me, the tea is still hot.",
            "Mira: Do you know anything about {topic}?\n\nJonas: Not much. What did you find?",
        ),
        (
            "Jonas: I'm glad that we talked about it.\n\nMira: Me too. Let us look out for one another.",
            "Jonas: So we check the facts and stay fair.\n\nMira: That is a good plan.",
        ),
        ("Mira", "Jonas"),
        ("Wait, there is more.", "I read on.", "And look at this."),
    ),
    "childrens_video": Style(
        (
            "[A sun rises over a village.]\n\nHello, little explorers! Today we find out about {topic}.",
            "[A paper boat sails by.]\n\nHi, everyone! Are you ready to learn about {topic}?",
        ),
        (
            "[Everybody waves.]\n\nRemember: be curious, be kind, and ask a grown-up when something feels strange.",
            "[Music plays.]\n\nWhat a good day for learning! Share a smile with somebody.",
        ),
        bridges=("Wow, look!", "And what is this?", "Let us go on!"),
    ),
    "interview": Style(
        (
            "Reporter: Our readers want to know about {topic}. Where do we begin?",
            "Reporter: You have thought about {topic} for a long time. What should people know?",
        ),
        (
            "Reporter: And what can our readers do?\n\nGuest: Check, ask, and treat others with respect.",
            "Reporter: A last word?\n\nGuest: Learning helps, and so does a friendly talk.",
        ),
        ("Guest", "Reporter"),
        ("There is a further point.", "One should know this as well.", "Let me add something."),
    ),
    "letter": Style(
        (
            "My dear,\n\nyou asked me about {topic}, and I have taken my time to answer.",
            "Dear young friend,\n\nthank you for your question about {topic}. Here is what I know.",
        ),
        (
            "Keep asking, and be good to yourself and to others.\n\nYour old aunt",
            "I trust you to make something good of it.\n\nWith love from your uncle",
        ),
        bridges=("Let me tell you more.", "I also want you to know this.", "And one thing more."),
    ),
    "documentary": Style(
        (
            "Scene 1. Morning light falls on a quiet street. The film is about {topic}.",
            "Scene 1. A hand turns a page. It tells of {topic}.",
        ),
        (
            "Last scene. People sit together and talk. Much can be learned, and much can be made better.",
            "Last scene. The light fades. What remains is knowledge, and the will to use it well.",
        ),
        bridges=("The camera moves on.", "The next picture.", "A pause, then this."),
    ),
    "questions_and_answers": Style(
        (
            "Q: What should people know about {topic}?\n\nA: The page says several things, and some of them need care.",
            "Q: What is there to learn about {topic}?\n\nA: Here are the facts, and the reasons for some caution.",
        ),
        (
            "Q: Where can I learn more?\n\nA: A library, a school or an advice centre will gladly help.",
            "Q: What can I do?\n\nA: Check what you read, ask people who know, and be considerate.",
        ),
        ("A", "Q"),
        ("In addition:", "It also holds that:", "Further:"),
    ),
    "museum_tour": Style(
        (
            "Please gather round. Our small exhibition is about {topic}; we begin in the first room.",
            "Welcome to the museum. The rooms ahead of us are about {topic}.",
        ),
        (
            "In the last room there is only a mirror: what we do with all this is up to us. Thank you for coming.",
            "We end in the garden. Take a leaf with you, and a good idea.",
        ),
        bridges=("Please follow me.", "To your left there is more.", "The next case shows this."),
    ),
}
SENSITIVE = (
    "Here the page {told}. This is sensitive, because {why}.",
    "At this point it {told}. Care is needed, as {why}.",
    "Then the page {told}. It is named without details, because {why}.",
)
QUESTIONS = {  # what the one who listens says in a conversation
    "parent_and_child": (
        "Why is that?",
        "And what comes then?",
        "Is that important?",
        "I see.",
        "Oh!",
        "Tell me more.",
        "And after that?",
        "Can you say it again in other words?",
    ),
    "friends": (
        "Really?",
        "I didn't know that.",
        "Go on.",
        "That makes sense.",
        "Who would have thought so.",
        "And then?",
        "I wondered about that.",
        "Fair enough.",
    ),
    "interview": (
        "What does that mean?",
        "What comes next?",
        "Why does it matter?",
        "Please go on.",
        "What would you add?",
        "How should one see that?",
        "Is that all?",
    ),
    "questions_and_answers": (
        "What else does the page say?",
        "What comes next?",
        "Is there more to know?",
        "What should be added?",
        "What follows?",
        "What is mentioned besides?",
    ),
}
NO_TOPIC = "everyday life"
