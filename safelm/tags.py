"""The only definitions of the harm tag's string and the range of harm scores (Maini et al. 2025, sections 3.1 and 4).

The tag's id depends on the vocabulary: see `safelm.text.tokenizer.Tokenizer.harm_tag_id`.
"""

HARM_TAG = "<potentially_unsafe_content>"
TAG_RATE = 0.05  # the probability of the tag at a word gap of a tagged text
MIN_SCORE, MAX_SCORE = 0, 5  # of harm: safe, highly unsafe
