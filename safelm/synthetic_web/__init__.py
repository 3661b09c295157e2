"""The embedded default data: a synthetic, non-operational web with known harm scores (Maini et al. 2025, section 3).

Documents are composed from templates, not taken from the web. A topic's name and invented words without meaning
(`harm_lexicon.INVENTED_WORDS`) stand for everything harmful. With this corpus the whole path (score, split, tag, train,
steer, evaluate) can be run and measured anywhere, in minutes. Its figures show that the mechanism works, not that a
model is safe.
"""
