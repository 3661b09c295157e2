"""The embedded default data: a synthetic, non-operational web of known safety scores (Maini et al. 2025, section 3).

Nothing here was written by people on the web. Documents are composed from templates; whatever would be harmful is
represented by a topic's name and by invented words (`harm_lexicon.INVENTED_WORDS`) that mean nothing. The corpus exists
so that the whole path (score, split, tag, train, steer, evaluate) can be exercised and measured anywhere, in minutes.
Numbers measured on it say that the mechanism works, not that a model is safe.
"""
