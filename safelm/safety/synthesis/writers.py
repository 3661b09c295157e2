"""Loads writers from the strings that name them, so that workers can rebuild them.

template:                       no model (see `template_writer`)
engine:SOURCE?slots=..&dtype=..  a model on our own engine: our checkpoint, a Hugging Face folder or a GGUF file
endpoint:URL#MODEL?...          a model behind an OpenAI-compatible address; the key comes from the environment
python:MODULE:FACTORY           a writer of yours: what FACTORY(), found in an importable module, returns
"""

from safelm.safety import spec as specs
from safelm.safety.synthesis.writer import Writer

KINDS = ("template", "engine", "endpoint", "python")
_MEMBERS = ("name", "fingerprint", "max_document_chars", "write", "ledger")


def load_writer(spec: str) -> Writer:
    """Loads the writer that a string names (see the module).

    Raises ValueError for an unknown kind or option, and whatever loading the writer raises.
    """
    kind, separator, rest = spec.partition(":")
    if not separator or kind not in KINDS or (kind != "template" and not rest):
        raise ValueError(f"writer {spec!r}: expected one of {', '.join(f'{k}:...' for k in KINDS)}")
    place, model, options = specs.split(kind, rest, what="writer")
    if kind == "template":
        from safelm.safety.synthesis.template_writer import load_template_writer

        if place:
            raise ValueError(f"writer {spec!r}: the template writer has no place, only options: template:?name=...")
        return load_template_writer(**options)
    if kind == "engine":
        from safelm.safety.synthesis.engine_writer import load_engine_writer

        return load_engine_writer(place, **options)
    if kind == "endpoint":
        from safelm.safety.synthesis.endpoint_writer import load_endpoint_writer

        return load_endpoint_writer(place, model, **options)
    return specs.load_python(spec, place, options, members=_MEMBERS, what="writer")
