"""Serves checkpoints: the OpenAI API (completions, chats, streams) with P(tag) beside every token, and a playground.

The page is at /, the API under /v1, Prometheus' metrics at /metrics. Any OpenAI client works; a `safelm` object in a
request picks the decoding ({"method": "safe_beam", "num_beams": 4, "num_candidates": 4, "drop_fraction": 0.5}).
Listens on this machine only unless --host says otherwise. If SAFELM_SERVE_KEY is set, clients must send that key. The
server compiles its first programs before it reports that it listens and /health says ok. On SIGTERM it finishes open
requests and ends with code 0. Logs hold ids, counts and times, never a text.
"""

import argparse
import asyncio
import dataclasses
import functools
import logging
import os
import sys

import jax

from safelm import cli
from safelm.inference import lookup
from safelm.inference.engine import Engine
from safelm.inference.knobs import KNOB_HELP, read_knob
from safelm.inference.methods import METHODS
from safelm.inference.weights import WEIGHTS_DTYPES
from safelm.safety.monitors.loading import HELP as MONITOR_HELP
from safelm.serving import access, app, models
from safelm.serving.limits import Limits
from safelm.text import chat_template, named_templates

log = logging.getLogger("safelm.serve")
KEY_VARIABLE = "SAFELM_SERVE_KEY"
_LOG_FORMAT = "%(asctime)s %(levelname).1s %(name)s: %(message)s"
_MEANINGS = {
    "body_bytes": "largest request",
    "body_seconds": "seconds for a request to arrive, and for a client to take what is sent",
    "prompt_tokens": "longest prompt",
    "score_tokens": "longest text to score",
    "new_tokens": "most tokens of one reply",
    "choices": "texts in one reply: its prompts times n",
    "open_requests": "requests answered at once, including waiting ones; further ones get 429",
    "request_seconds": "most seconds for a reply",
    "beams": "largest num_beams, at most --slots",
    "candidates": "largest num_candidates",
    "shapes": "different pairs of beams and candidates that are compiled",
    "connections": "connections open at once; beyond that the idlest one is closed",
    "grace_seconds": "seconds for open requests after SIGTERM",
}


def arguments() -> argparse.ArgumentParser:
    """The command's flags."""
    example = "python -m safelm.serve --checkpoint=raw=runs/raw --checkpoint=safety=runs/safety --port=8000"
    parser = cli.parser("safelm.serve", __doc__, example)
    parser.add_argument(
        "--checkpoint",
        action="append",
        required=True,
        metavar=cli.CHECKPOINT,
        help="training run, converted checkpoint, Hugging Face folder, hf:ORG/NAME[@REVISION] or GGUF file; "
        "repeatable, the first is the default; clients ask for NAME (default: the folder's or file's)",
    )
    parser.add_argument("--chat_template", default="", metavar="NAME|FILE", help=named_templates.HELP)
    parser.add_argument("--knob", default="", metavar="FILE", help=f"of all models: {KNOB_HELP} (default: none)")
    meaning = f"of all models, what safe_beam goes by in the place of P(tag): {MONITOR_HELP}"
    parser.add_argument("--monitor", default="", metavar="WHAT", help=meaning)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 for any free one (default %(default)s)")
    _add_decoding_flags(parser)
    _add_engine_flags(parser)
    for field in dataclasses.fields(Limits):
        parser.add_argument(
            f"--{field.name}",
            type=field.type,
            default=field.default,
            help=f"{_MEANINGS[field.name]} (default %(default)s)",
        )
    return parser


def _add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """How requests are decoded."""
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="sample",
        help="decoding method of requests that name none (default %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="",
        help="dtype of the computation (default: the checkpoint's)",
    )
    parser.add_argument(
        "--weights", choices=WEIGHTS_DTYPES, default="", help="dtype of the weights in decoding (default: --dtype)"
    )
    parser.add_argument(
        "--slots", type=int, default=32, help="requests decoded at once per model (default %(default)s)"
    )
    meaning = f"{chat_template.KWARGS_HELP}; a chat's own field of that name goes first"
    parser.add_argument("--chat_template_kwargs", default="", metavar="JSON", help=meaning)
    parser.add_argument("--lookup_tokens", type=int, default=0, metavar="N", help=lookup.HELP)


def _add_engine_flags(parser: argparse.ArgumentParser) -> None:
    """What an engine keeps, reads at once and compiles before it is ready."""
    parser.add_argument(
        "--cache_tokens",
        type=int,
        default=65536,
        help="a model's cache; every beam takes its own (default %(default)s)",
    )
    parser.add_argument(
        "--steps_per_call",
        type=int,
        default=4,
        help="tokens of every reply between two looks at what is new: fewer stream more finely, more "
        "spend less time between steps (default %(default)s)",
    )
    parser.add_argument(
        "--read_tokens",
        type=int,
        default=256,
        help="tokens of prompts read between two steps of the replies under way: fewer stall these less, more begin "
        "new replies sooner (default %(default)s)",
    )
    parser.add_argument(
        "--prefix_tokens",
        type=int,
        default=16384,
        help="tokens of prompts and replies whose cache is kept, beside --cache_tokens, for prompts that begin as they "
        "do: system messages, chats that go on (default %(default)s; 0: none)",
    )
    parser.add_argument(
        "--compilation_cache_dir",
        default="",
        help="folder that keeps compiled programs: without, each start compiles anew, and the first "
        "requests of every kind wait for it",
    )
    parser.add_argument(
        "--warm_tokens",
        type=int,
        default=512,
        help="tokens of prompt and reply up to which programs are compiled before the server is ready "
        "(default %(default)s)",
    )
    parser.add_argument(
        "--skip_warm_up",
        action="store_true",
        help="be ready at once; the first request of every kind then waits for its programs",
    )


def _check_numbers(flags: argparse.Namespace) -> None:
    if not 0 <= flags.port < 65536:
        raise ValueError(f"--port={flags.port}: want 0 to 65535")
    for name in ("slots", "cache_tokens", "steps_per_call", "read_tokens", "warm_tokens", "prefix_tokens"):
        if getattr(flags, name) < (least := int(name != "prefix_tokens")):
            raise ValueError(f"--{name}={getattr(flags, name)}: must be at least {least}")
    if not 0 <= flags.lookup_tokens <= lookup.MOST_LOOKUP_TOKENS:
        raise ValueError(f"--lookup_tokens={flags.lookup_tokens}: want 0 to {lookup.MOST_LOOKUP_TOKENS}")


def main(flags: argparse.Namespace) -> None:
    """Loads, then serves until told to end."""
    logging.basicConfig(level=logging.WARNING, format=_LOG_FORMAT, stream=sys.stderr, force=True)
    logging.getLogger("safelm").setLevel(logging.INFO)
    limits = Limits(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(Limits)})
    limits = dataclasses.replace(limits, beams=min(limits.beams, max(1, flags.slots)))
    sources = cli.checkpoints(flags.checkpoint)
    kwargs = chat_template.read_kwargs(flags.chat_template_kwargs, "--chat_template_kwargs")
    _check_numbers(flags)
    if flags.compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", flags.compilation_cache_dir)
    key = os.environ.get(KEY_VARIABLE, "")
    if not key and not access.is_loopback(flags.host):
        log.warning("--host=%s: anybody who reaches it can use it; set %s to ask for a key", flags.host, KEY_VARIABLE)
    knob = read_knob(flags.knob) if flags.knob else None
    template = {"chat_template": flags.chat_template, "template_kwargs": kwargs}
    steering = {"knob": knob, "monitor": flags.monitor}
    served = {
        name: models.load_model(name, source, dtype=flags.dtype, **template, **steering)
        for name, source in sources.items()
    }
    engines = {
        name: functools.partial(
            Engine,
            model.config,
            model.params,
            harm_tag_id=model.watched_id,
            slots=flags.slots,
            max_tokens=flags.cache_tokens,
            steps_per_call=flags.steps_per_call,
            read_between=flags.read_tokens,
            prefix_tokens=flags.prefix_tokens,
            lookup_tokens=flags.lookup_tokens,
            weights=flags.weights,
            compiles_aside=True,
        )
        for name, model in served.items()
    }
    config = app.ServerConfig(
        limits,
        key=key,
        default_method=flags.method,
        host=flags.host,
        port=flags.port,
        warms_up=not flags.skip_warm_up,
        warm_tokens=flags.warm_tokens,
    )

    def started(server: app.Server) -> None:
        for name, model in served.items():
            size = f"{model.config.num_params:,}"
            log.info("model %s: %s parameters, context %d", name, size, model.config.max_seq_len)
        sys.stdout.write(f"listening on {server.url}\n")
        sys.stdout.flush()

    asyncio.run(app.serve(config, served, engines, started=started))
    log.info("ended")


if __name__ == "__main__":
    cli.run(main, arguments(), decodes=True)
