"""Characters of a text and the tokens that hold them, by one tokenizer library."""

import numpy as np
import pytest
import tiny_runs

from safelm.text.token_offsets import encode_with_offsets

TEXTS = ["the cat\n\nsat", "\n\n\nthe\n\n \n\ndog", "on the mat,\r\n\r\nthe dog", "née Zoë\n\n\U0001f600\n\nnot", ""]


@pytest.mark.parametrize("text", TEXTS)
def test_character_offsets_were_kept_token_indices_not_the_two_tokenizer_libraries_split_n_n_differently(text):
    """Offsets come with the very ids that are stored, so a position in characters is one in tokens, blank lines too."""
    tokenizer = tiny_runs.tokenizer()
    ((ids, offsets),) = encode_with_offsets(tokenizer, [text])
    np.testing.assert_array_equal(ids, tokenizer.encode_batch([text])[0])
    covered = np.zeros(len(text), bool)
    for start, stop in offsets:
        covered[start:stop] = True
    assert covered.all()
    for place in range(len(text)):
        holding = [at for at, (start, stop) in enumerate(offsets) if start <= place < stop]
        assert holding == list(range(holding[0], holding[-1] + 1))  # neighbours: bytes of one character
        before = tokenizer.decode(ids[: holding[0]].tolist())
        assert text.startswith(before) or "\ufffd" in before
