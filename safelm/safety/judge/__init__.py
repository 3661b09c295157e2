"""A language model as the judge of harm: a rubric in, {"score": 0 to 5, "reason"} out, always JSON."""

from typing import Any

from safelm.safety.scorer import Scorer


def load_judge(source: str, **options: Any) -> Scorer:
    """A model on our own engine: our checkpoint, a Hugging Face folder, a GGUF file, or "smollm2" (installed weights).

    Args:
      options: fields of `local.JudgeSettings`; `dtype` of the computation; `chat_template`; `name`; `show_progress`.

    Raises:
      FileNotFoundError: nothing at `source`.
      ValueError: a model that can't be represented or can't judge, or an option that doesn't exist or is out of range.
    """
    from safelm.safety.judge import local

    return local.load(source, **options)


def load_endpoint(url: str, model: str, **options: Any) -> Scorer:
    """A model behind an OpenAI-compatible address; see `safelm.safety.endpoint_client` for its key.

    Args:
      options: fields of `endpoint.EndpointScorerSettings`; `name`.

    Raises ValueError for an address or an option that can't be. The endpoint itself is asked first when scoring.
    """
    from safelm.safety.judge import endpoint

    return endpoint.load(url, model, **options)
