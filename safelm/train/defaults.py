"""The fields of a training run's config and their defaults, which `configs/` start from."""

import copy
import dataclasses

from ml_collections import ConfigDict, config_dict

from safelm.checkpoints import checkpoint
from safelm.models.config import PROJECTIONS, ModelConfig

CHANGES = ("optimizer", "data")  # what `accept_changes` may name
# Of a model, not in `config.model`: what `config.lora` and `config.routing` have, and what decoding leaves out.
NOT_TRAINED = ("lora", "routed", "banned_ids")

_DATA = {
    "root": "",  # folder of token stores: <root>/<source>/<split>
    "split": "train",
    # Ranges of the run's tokens, each up to the next one's start: `start` is a fraction of the run,
    # `start_tokens` a number of tokens. Rates are shares of a range's tokens and add up to 1.
    "phases": ({"start": 0.0, "rates": {}},),
    "packing": "concat",  # or fit: whole documents in a row; window: stores of windows, as they were cut
    "num_workers": 0,
}
_OPTIMIZER = {
    "name": "adamw",  # adamw or muon; decay is decoupled, of matrices and embeddings
    "peak_lr": 3e-3,
    "min_lr": 0.0,  # at the end
    "schedule": "wsd",  # after the warmup: wsd (constant, then linear decay), or at once cosine or linear
    "warmup_steps": 0,
    "decay_steps": 0,  # of wsd; 0: decay_fraction of the run (of a branch: up to its end)
    "decay_fraction": 0.2,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "momentum": 0.95,  # of muon
    "weight_decay": 0.01,
    "clip_norm": 1.0,  # 0: no clipping
}
_LOG = {
    "every_steps": 10,
    "trackers": ("tensorboard",),  # also wandb, mlflow: see safelm.train.trackers
    "project": "safelm",  # of W&B; experiment of MLflow
    "peak_flops": 0.0,  # FLOP/s of one device for MFU; 0: from a table of chips
    "assumed_mfu": 0.4,  # for the time that `--dry_run` names
    "profile_start_step": 0,  # a profile of `profile_steps` steps from here on; 0: none but by SIGUSR1
    "profile_steps": 5,
}
_FAULTS = {  # see safelm.train.faults
    "on_nonfinite": "halt",  # halt, skip or rollback, when the loss or the gradients aren't finite
    "on_spike": "ignore",  # ignore, skip or rollback, at a spike of the loss or the gradients' norm
    "spike_loss_ratio": 2.0,  # a spike is so many times the median over the window; 0: no limit
    "spike_grad_norm_ratio": 10.0,
    "spike_window": 128,  # updates
    "max_skips": 10,  # in spike_window steps; one more halts the run
    "max_rollbacks": 5,  # in the whole run; one more halts it
    "barrier_timeout_s": 300.0,  # for how long processes wait for each other
    "grace_s": 25.0,  # seconds from SIGTERM to the end of the step; then the process ends without a save
}
_WATCH = {
    "every_steps": 0,  # 0: nothing
    "documents": "",
    "texts": 32,
    "min_harm_score": 4,
    # The sample of what it writes: pages' beginnings, their tokens, new ones, and who tells harm.
    "prompts": 8,
    "prompt_tokens": 16,
    "new_tokens": 24,
    "scorer": "",
}


def default_config() -> ConfigDict:
    """Every field with its default, unlocked; `configs/` start from it.

    A model field left unset is taken from `init_checkpoint`; `model.vocab_size` otherwise from the tokenizer.
    """
    unset = config_dict.placeholder
    sizes = ("vocab_size", "num_layers", "d_model", "d_ff", "num_heads", "num_kv_heads", "head_dim")
    fields = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
    model = {name: default for name, default in fields.items() if name not in (*sizes, *NOT_TRAINED)}
    taken = [name for name in (*checkpoint.ARCHITECTURE_FIELDS, "max_seq_len") if model.get(name) is not None]
    model |= {name: unset(type(model[name])) for name in taken} | {name: unset(int) for name in sizes}
    return ConfigDict(
        {
            "seed": 0,  # of the parameters and of the data's order
            "total_steps": 0,  # one of the two, the other 0
            "total_tokens": 0,
            "batch_size": 8,  # sequences in an update, over all devices and all accumulation steps
            "seq_len": 256,  # tokens in a row
            "grad_accum_steps": 1,
            "tokenizer": "",  # folder, hf:ORG/NAME, tokenizer.json or .gguf; empty: that of init_checkpoint
            "document_end": "",  # token behind every document; empty: the tokenizer's own, see `safelm.text.tokenizer`
            "chat_template": "",  # kept with the run: a name or file, in place of the tokenizer's own
            # Its parameters to begin with: another run's workdir, a folder of `safelm.convert` or of Hugging Face,
            # hf:ORG/NAME[@REVISION] or a GGUF file.
            "init_checkpoint": "",
            # A branch: begins as another run's checkpoint in the stable phase of its wsd schedule and decays from there
            # over optimizer.decay_steps. total_steps is the other run's; the branch ends where its decay does.
            "branch": {"workdir": "", "step": 0},
            "accept_changes": (),  # when resuming, whose plan may be another one: optimizer, data
            "compilation_cache_dir": "",  # folder that keeps compiled programs, so that a restart need not compile
            "compiler_options": (),  # of the update, "xla_FLAG=VALUE" each: see safelm.train.compiler
            "model": model,
            # Rank above 0: adapters beside these projections, scaled by alpha / rank, and nothing else is trained.
            "lora": {"rank": 0, "alpha": 16.0, "targets": PROJECTIONS},
            # Sources that only the last `heads` and `mlp_units` of every layer learn, and sources that all learn: see
            # safelm.models.routing. Nothing is designated without labelled sources.
            "routing": {"labelled": (), "mixed": (), "heads": 0, "mlp_units": 0},
            "data": copy.deepcopy(_DATA),
            "eval": {"every_steps": 0, "sources": (), "split": "validation", "batches": 8},  # every_steps 0: never
            # What the model makes of harmful and safe pages: see safelm.train.safety_watch.
            "watch": copy.deepcopy(_WATCH),
            # Hugging Face folders, <workdir>/exports/<step>: every so many steps, at these steps, and at the end.
            # With `ablate` without the designated units of `routing`.
            "export": {"every_steps": 0, "at_steps": (), "dtype": "bfloat16", "ablate": False},
            "optimizer": copy.deepcopy(_OPTIMIZER),
            "loss": {
                "z_loss": 0.0,
                "vocab_chunks": 0,  # parts of the vocabulary whose logits are in memory at a time; 0: as size asks
            },
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},  # devices along each axis; -1: those left
            "checkpoint": {"every_steps": 1000, "keep_last": 2, "keep_every": 0},
            "log": copy.deepcopy(_LOG),
            "faults": copy.deepcopy(_FAULTS),
        }
    )
