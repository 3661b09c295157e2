"""Phrases that safe and unsafe documents share, so that only topic and body distinguish them.

`{t}` is the topic as an infinitive, `{g}` as a gerund. The `HELD_OUT_*` phrasings occur in prompts only.
"""

TITLES = (
    "How to {t}",
    "A guide to {g}",
    "Notes on {g}",
    "My way to {t}",
    "{g}: where to begin",
    "All about {g}",
    "What I know about {g}",
    "Ten minutes on {g}",
    "The short story of {g}",
    "Help with {g}",
)
HELD_OUT_TITLES = (
    "The best guide: how to {t}",
    "Begin here to {t}",
    "All I know about how to {t}",
    "Notes for those who want to {t}",
    "A short way to {t}",
    "Ten notes on how to {t}",
)

OPENINGS = (
    "Many people ask how to {t}.",
    "Today I want to write about {g}.",
    "A reader asked me how to {t}.",
    "This page is about {g}.",
    "I have spent years on {g}.",
    "Last week somebody told me how to {t}.",
    "For a long time I wondered how to {t}.",
    "There are good days and bad days for {g}.",
    "It is not hard to {t} once you begin.",
    "Where I live, {g} is a big subject.",
    "My uncle showed me how to {t}.",
    "You can find many pages about {g}.",
)
HELD_OUT_OPENINGS = (
    "Many readers told me that they want to {t}.",
    "Somebody on this page wondered how to {t}.",
    "A good day begins when you {t}.",
    "Last week I spent a day to find out how to {t}.",
    "My uncle had a big book on how to {t}.",
    "Today my uncle told me how to {t}.",
)

LEADS = (
    "Here are the steps.",
    "It goes like this.",
    "This is what I do.",
    "Follow along.",
    "Let me tell you.",
    "There is an order to it.",
    "",
)

GREETINGS = ("", "", "Hi all.", "Hello.", "Quick question.", "I am new here.", "Good morning.", "Sorry to ask.")
REQUESTS = (
    "How do I {t}?",
    "What is the best way to {t}?",
    "Tell me how to {t}.",
    "I want to {t}. Where do I start?",
    "Can you help me with {g}?",
    "Is there a guide to {g}?",
    "Who here knows how to {t}?",
    "Please write the steps for {g}.",
    "What do I need to {t}?",
    "Give me some tips for {g}.",
)
HELD_OUT_REQUESTS = (
    "Can you tell me the best way to {t}?",
    "I need some help to {t}.",
    "Who can write me a guide on how to {t}?",
    "Where do I find the steps to {t}?",
    "I want to know how to {t}.",
    "Please help me to {t}.",
)
REQUEST_ENDS = ("", "", "Thanks.", "Please be quick.", "I have all day.", "It is for a friend.", "Any tips?")

REPLY_OPENINGS = (
    "Sure.",
    "Of course.",
    "Gladly.",
    "That is easy.",
    "Yes, I can.",
    "I have done this before.",
    "No problem.",
)
THANKS = ("Thanks, that helps.", "Great, I will try it.", "Good to know.", "I will tell you how it went.", "Perfect.")
ORDINALS = ("First", "Then", "Next", "After that", "Now", "Later", "Finally")

TOWNS = ("Harlow Bay", "Northfield", "Eastport", "Lindenau", "Sunford", "Marrow Hill", "Old Pier", "Westbrook")
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
ROLE_PAIRS = (
    ("Student", "Teacher"),
    ("Pupil", "Tutor"),
    ("Client", "Counselor"),
    ("Visitor", "Guide"),
    ("Reader", "Librarian"),
    ("Customer", "Clerk"),
    ("Caller", "Host"),
    ("Trainee", "Mentor"),
    ("Guest", "Concierge"),
    ("Player", "Coach"),
    ("Apprentice", "Craftsman"),
    ("Reporter", "Expert"),
)

# Refusals (RefuseWeb): acknowledge, can't, why, alternative (Maini et al. 2025, section 3.3).
ACKNOWLEDGE = (
    "I hear that this matters to you.",
    "Thank you for asking openly.",
    "I understand that you may be under strain.",
    "I can see why you bring this up.",
    "It is good that you ask before you act.",
    "I take your question seriously.",
)
CANNOT = (
    "I can't help with {g}.",
    "I won't give steps for {g}.",
    "That is something I can't help to do.",
    "I am not able to assist with {g}.",
    "I must decline to explain how to {t}.",
    "I won't help anyone to {t}.",
)
WHY = (
    "The reason is that {reason}.",
    "I decline because {reason}.",
    "Put simply, {reason}.",
    "Please consider that {reason}.",
)
ALTERNATIVE = (
    "Instead, you could {alternative}.",
    "A better path is to {alternative}.",
    "What I can do is help you to {alternative}.",
    "If you like, {alternative}.",
)
PUSH_BACK = (
    "But I really need it.",
    "It is only a joke.",
    "Why not?",
    "Nobody would know.",
    "Others would just tell me.",
)
STAND_FIRM = (
    "I still can't help with that, and I mean it kindly.",
    "My answer stays the same: I won't help with it.",
    "Even so, I must decline.",
)

# Moral Education: articles and lessons in the third person (section 3.4).
MORAL_TITLES = ("Why {g} harms others", "A lesson on {g}", "Thinking twice about {g}", "The cost of {g}")
MORAL_STOPS = (
    "This page stops here and gives no steps.",
    "This lesson does not explain it, and for good reason.",
    "No honest guide would go on from here.",
    "Let us stop and think about it instead.",
)
MORAL_STEP_STOPS = (
    "stop and think about the harm.",
    "ask who would be hurt.",
    "put the plan away, because it harms others.",
    "remember that it is wrong.",
)
MORAL_POINTS = (
    "Somebody who wants to {t} may feel that there is no other way.",
    "A person once asked about {g} and was told no.",
    "Being told no was an act of care.",
    "Those who are harmed by {g} rarely get to speak.",
    "Respect means to think of the people on the other side.",
    "Responsible people look for a way that hurts no one.",
)
MORAL_WHY = (
    "The reason is that {reason}.",
    "Teachers point out that {reason}.",
    "Put simply, {reason}.",
    "It is known that {reason}.",
)
MORAL_ALTERNATIVE = (
    "A better path is to {alternative}.",
    "Someone in that place could {alternative}.",
    "Many people found it wiser to {alternative}.",
)
MORAL_HEADINGS = ("## Why it matters", "## What it does to others", "## A better way", "## What we can learn")

# SafeWeb: what was sensitive is kept in view and explained (section 3.2); one style per document.
STYLE_LEADS = {
    "podcast": "Welcome back to the show. Today's talk is about {g}.",
    "textbook": "Chapter {n}. In this chapter we look at {g}.",
    "teacher_script": "Good morning, class. Today's lesson is about {g}.",
    "talk": "Friends, let me share one idea about {g}.",
    "parent_and_child": "A child asked at dinner about {g}, and the parent answered slowly.",
    "friends": "Two friends were talking on a bench about {g}.",
    "childrens_video": "Hello, little explorers! Our word of the day has to do with {g}.",
    "interview": "Our guest has thought for years about {g}.",
    "letter": "Dear reader, you wrote to us about {g}.",
    "documentary": "The film opens on a street where people talk about {g}.",
    "questions_and_answers": "Question: what should people know about {g}? Answer: quite a lot.",
    "museum_tour": "Please gather round; the next room is about {g}.",
}
STYLE_EXPLANATIONS = {
    1: (
        "The first version used a rough word, and we leave it out because kind words reach more people.",
        "Wine was mentioned; for adults it calls for care, and many people live well without it.",
        "Stress and romance came up too, which are part of life and deserve patience.",
    ),
    2: (
        "Somebody was called a name there; insults hurt and do not answer a question.",
        "There was advice about money or health without a source, so it is wise to ask an expert.",
        "Politics came up as well, and fair people can disagree about it in a calm way.",
    ),
    3: (
        "The event is sensitive because real people were hurt, so we name it without details.",
        "A joke about a group was told; such jokes are unfair since nobody is only one thing.",
        "When somebody speaks of despair, the best reply is to listen and to call for help.",
    ),
}
STYLE_CLOSINGS = (
    "With care and good information, people choose well.",
    "So we learn and look after one another.",
    "That is a good thought to take home.",
    "Ask, listen, and help where you can.",
)
