"""SmolLM2-135M, converted from GGUF, against `transformers` on the same weights, all in float32."""

import jax
import numpy as np
import parity
import pytest

from safelm import convert, inference
from safelm.formats import huggingface
from safelm.models import decoder as model

pytestmark = pytest.mark.parity
torch = parity.module("torch")
transformers = parity.module("transformers")

NUM_PROMPT_TOKENS = 6  # the same for all: one batch without padding for the reference too
PROMPTS = (
    "The capital of France is a city with many",
    "Once upon a time in a small village there",
    "Water boils at a lower temperature when the",
    "def fibonacci(n):\n    if n <",
    "Dear Sir or Madam, I am writing to",
    "The three primary colours are red, yellow and",
    "Photosynthesis is the process by which plants",
    "In 1969 the first humans landed on the",
    "My favourite recipe for bread needs flour,",
    "The quick brown fox jumps over the lazy",
    "To solve a quadratic equation you can use",
    "It was raining hard when the train finally",
    "Machine learning models are trained on large sets",
    "A good night's sleep helps the body to",
    "SELECT name, age FROM users WHERE age >",
    "The stock market fell sharply on Monday after",
    "Birds migrate south in winter because the",
    "She opened the old wooden box and found",
    "The main difference between weather and climate is",
    "Once the dough has risen, punch it down",
)


@pytest.fixture(scope="module")
def gguf_path():
    return parity.weights("smollm2")


@pytest.fixture(scope="module")
def ours(gguf_path):
    config, params, tokenizer = convert.read_model(str(gguf_path))
    return config, jax.device_put(params), tokenizer


@pytest.fixture(scope="module")
def theirs(gguf_path):
    """The same file read, dequantised and unpermuted by `transformers` itself (its public way asks for accelerate)."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    settings = transformers.AutoConfig.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    loaded = transformers.LlamaForCausalLM(settings)
    tensors = load_gguf_checkpoint(str(gguf_path), return_tensors=True, model_to_load=loaded)["tensors"]
    report = loaded.load_state_dict(tensors, strict=False)
    assert report.missing_keys == ["lm_head.weight"] and not report.unexpected_keys  # tied
    return loaded.float().eval()


@pytest.fixture(scope="module")
def prompts(ours):
    encoded = [ours[2].encode(prompt)[:NUM_PROMPT_TOKENS] for prompt in PROMPTS]
    assert len(encoded) == 20 and {len(ids) for ids in encoded} == {NUM_PROMPT_TOKENS}
    return encoded


@pytest.fixture(scope="module")
def long_tokens(ours):
    return np.array([ours[2].encode(" ".join(PROMPTS))[:160]], dtype=np.int32)


@pytest.fixture(scope="module")
def our_logits(ours, long_tokens):
    config, params, _ = ours
    return np.asarray(jax.jit(model.apply, static_argnums=0)(config, params, long_tokens))


def logits_of(reference, tokens_BT):
    with torch.no_grad():
        return reference(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()


def test_the_model_is_smollm2_with_the_tag(ours):
    config, params, tokenizer = ours
    assert config.num_params == 134_515_008 + config.d_model and config.tie_embeddings
    assert (config.vocab_size, config.padded_vocab_size, tokenizer.harm_tag_id) == (49_153, 49_280, 49_152)
    assert (config.rope_theta, config.rms_norm_eps, config.max_seq_len) == (100_000.0, 1e-5, 8192)
    mean = np.asarray(params["embedder"]["embedding"][:49_152], np.float64).mean(axis=0)
    np.testing.assert_allclose(params["embedder"]["embedding"][49_152], mean, atol=1e-6)


def test_logits_within_a_thousandth(theirs, our_logits, long_tokens):
    expected = logits_of(theirs, long_tokens)
    print("largest difference", np.abs(our_logits[..., :49_152] - expected).max())
    np.testing.assert_allclose(our_logits[..., :49_152], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("new_tokens", "count"), [(8, 4), pytest.param(32, 20, marks=pytest.mark.slow)])
def test_greedy_tokens_are_equal(ours, theirs, prompts, new_tokens, count):
    config, params, tokenizer = ours
    prompts = prompts[:count]
    generations = inference.generate(
        config,
        params,
        prompts,
        inference.Greedy(),
        max_new_tokens=new_tokens,
        end_ids=[tokenizer.eos_id],
        harm_tag_id=None,
        seed=0,
    )
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor(prompts),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_id,
            pad_token_id=0,
            attention_mask=torch.ones(count, NUM_PROMPT_TOKENS, dtype=torch.long),
        ).tolist()
    for generation, row, prompt in zip(generations, expected, PROMPTS[:count], strict=True):
        new = row[NUM_PROMPT_TOKENS:]
        if tokenizer.eos_id in new:
            new = new[: new.index(tokenizer.eos_id) + 1]
        assert list(generation.tokens) == new, prompt


def test_export_and_reload_are_equal(ours, our_logits, long_tokens, tmp_path):
    config, params, tokenizer = ours
    huggingface.write_folder(tmp_path, config, params, tokenizer)
    again_config, again_params, again_tokenizer = convert.read_model(str(tmp_path))
    assert again_tokenizer.hash == tokenizer.hash
    assert again_config.num_params == config.num_params
    jax.tree.map(np.testing.assert_array_equal, again_params, jax.tree.map(np.asarray, params))
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    np.testing.assert_allclose(our_logits[..., :49_153], logits_of(reloaded, long_tokens), rtol=0, atol=1e-3)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert their_tokenizer("The harm tag")["input_ids"] == tokenizer.encode("The harm tag")
