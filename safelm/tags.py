"""The harmfulness tag: the only definition of its string (Maini et al. 2025, section 4).

Its id depends on the vocabulary: see `safelm.text.tokenizer.Tokenizer.harm_tag_id`.
"""

HARM_TAG = "<potentially_unsafe_content>"
TAG_RATE = 0.05  # the probability of the tag at a word gap of a tagged text
