"""Log-probs of a text's tokens against the whole logits, however many blocks they are computed in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_decoders import CONFIG, VOCAB, random_model

from safelm.inference import score_continuations, token_log_probs
from safelm.models import decoder as model

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def params():
    return random_model(3)


@pytest.mark.parametrize("positions_at_once", [2**20, 5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("length", [1, 16, *(pytest.param(length, marks=pytest.mark.slow) for length in (2, 23))])
def test_they_are_those_of_whole_logits(params, length, positions_at_once, monkeypatch):
    monkeypatch.setattr(token_log_probs, "LOGITS_AT_ONCE", positions_at_once * CONFIG.padded_vocab_size)
    token_log_probs._log_probs.clear_cache()
    tokens = np.random.default_rng(length).integers(1, VOCAB, length).tolist()
    found = token_log_probs.token_log_probs(CONFIG, params, tokens)
    want_TV = np.asarray(jax.nn.log_softmax(model.apply(CONFIG, params, jnp.array([tokens]))[0]))[:-1]
    assert found.chosen_T == pytest.approx(want_TV[np.arange(length - 1), tokens[1:]], abs=1e-5)
    for row, want_V in enumerate(want_TV):
        order = np.argsort(-want_V[:VOCAB], kind="stable")[: token_log_probs.MOST_ALTERNATIVES]
        assert found.ids_TK[row].tolist() == order.tolist()
        assert found.likeliest_TK[row] == pytest.approx(want_V[order], abs=1e-5)
    token_log_probs._log_probs.clear_cache()


def test_sums_are_the_continuations_scores(params):
    context, continuation = [5, 6, 7], [8, 2, 9, 9]
    (want,) = score_continuations(CONFIG, params, [(context, continuation)])
    found = token_log_probs.token_log_probs(CONFIG, params, [*context, *continuation])
    assert found.chosen_T[len(context) - 1 :].sum() == pytest.approx(want.logprob, abs=1e-5)


def test_what_no_model_reads_is_refused(params):
    most = CONFIG.max_seq_len
    assert len(token_log_probs.token_log_probs(CONFIG, params, [1] * (most + 1)).chosen_T) == most
    for tokens, message in (([1] * (most + 2), "the model's context is"), ([], "0 tokens"), ([VOCAB], "vocabulary")):
        with pytest.raises(ValueError, match=message):
            token_log_probs.token_log_probs(CONFIG, params, tokens)
