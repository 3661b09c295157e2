"""A PyTorch side of `scripts/bench/train.py`, not started by hand: LitGPT's, transformers' or a plain model, AdamW.

Needs no SafeLM, so that it can run in another environment. Reads the folder that the parent wrote (settings.json,
model.safetensors, batch.npz), then obeys lines on stdin: a number of steps to do. Answers each with one JSON line.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import plain_torch
import torch
from safetensors.torch import load_file

LAYER_NAMES = {  # transformers -> LitGPT; query, key and value become one matrix
    "input_layernorm.weight": "norm_1.weight",
    "post_attention_layernorm.weight": "norm_2.weight",
    "self_attn.o_proj.weight": "attn.proj.weight",
    "mlp.gate_proj.weight": "mlp.fc_1.weight",
    "mlp.up_proj.weight": "mlp.fc_2.weight",
    "mlp.down_proj.weight": "mlp.proj.weight",
}


def litgpt_model(sizes: dict[str, Any], tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """LitGPT's GPT as its Llama configurations set it up, embeddings tied as its `train.tie_embeddings` does."""
    from litgpt.model import GPT, Config

    heads = sizes["num_attention_heads"]
    config = Config(
        block_size=sizes["max_position_embeddings"],
        padded_vocab_size=sizes["vocab_size"],
        vocab_size=sizes["vocab_size"],
        n_layer=sizes["num_hidden_layers"],
        n_embd=sizes["hidden_size"],
        n_head=heads,
        n_query_groups=sizes["num_key_value_heads"],
        head_size=sizes["head_dim"],
        intermediate_size=sizes["intermediate_size"],
        rotary_percentage=1.0,
        rope_base=int(sizes["rope_theta"]),
        norm_eps=sizes["rms_norm_eps"],
        norm_class_name="RMSNorm",
        mlp_class_name="LLaMAMLP",
        parallel_residual=False,
        bias=False,
    )
    gpt = GPT(config)
    gpt.transformer.wte.weight = gpt.lm_head.weight
    renamed = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "transformer.wte.weight": tensors["model.embed_tokens.weight"],
        "transformer.ln_f.weight": tensors["model.norm.weight"],
    }
    for i in range(sizes["num_hidden_layers"]):
        ours, theirs = f"model.layers.{i}.", f"transformer.h.{i}."
        renamed |= {theirs + new: tensors[ours + old] for old, new in LAYER_NAMES.items()}
        parts = [tensors[f"{ours}self_attn.{name}_proj.weight"] for name in "qkv"]
        renamed[f"{theirs}attn.qkv.weight"] = torch.cat(parts)
    gpt.load_state_dict(renamed)
    return gpt


def transformers_model(sizes: dict[str, Any], tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """transformers' LlamaForCausalLM with scaled_dot_product_attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**sizes, use_cache=False, attn_implementation="sdpa")
    llama = LlamaForCausalLM(config)
    missing, unexpected = llama.load_state_dict(tensors, strict=False)
    if missing not in ([], ["lm_head.weight"]) or unexpected:
        raise ValueError(f"weights do not fit: missing {missing}, unexpected {unexpected}")
    llama.tie_weights()
    return llama


def loss_function(kind: str, compile_model: bool) -> Callable[..., torch.Tensor]:
    """(model, inputs, targets) -> mean cross-entropy, as the stack's own training loop computes it."""
    if kind == "litgpt":
        from litgpt.utils import chunked_cross_entropy

        return lambda model, inputs, targets: chunked_cross_entropy(model(inputs), targets)
    if kind == "pytorch":
        return lambda model, inputs, targets: model.loss(inputs, targets)
    from transformers.loss.loss_utils import ForCausalLMLoss

    def causal_lm(model: torch.nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=inputs).logits
        return ForCausalLMLoss(logits, None, logits.shape[-1], shift_labels=targets)

    return torch.compile(causal_lm) if compile_model else causal_lm


def make_step(args: argparse.Namespace, folder: Path) -> Callable[[], torch.Tensor]:
    """One update: forward, loss, backward, clip, AdamW; its loss before the update."""
    settings = json.loads((folder / "settings.json").read_text())
    make = {"litgpt": litgpt_model, "transformers": transformers_model, "pytorch": plain_torch.model}[args.kind]
    model = make(settings["hugging_face"], load_file(folder / "model.safetensors")).to(args.device).train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    adamw = settings["adamw"]
    groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups,
        lr=adamw["learning_rate"],
        betas=(adamw["b1"], adamw["b2"]),
        eps=adamw["eps"],
        weight_decay=adamw["weight_decay"],
        fused=args.optimizer == "fused",
        foreach=args.optimizer == "foreach",
    )
    batch = np.load(folder / "batch.npz")
    inputs = torch.from_numpy(batch["inputs_BT"].astype(np.int64)).to(args.device)
    targets = torch.from_numpy(batch["targets_BT"].astype(np.int64)).to(args.device)
    compute_loss = loss_function(args.kind, args.compile)
    if args.compile and args.kind == "litgpt":
        model = torch.compile(model)  # as litgpt/pretrain.py does
    if args.compile and args.kind == "pytorch":
        model.compile_parts()
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=settings["dtype"] == "bfloat16")

    def step() -> torch.Tensor:
        with autocast:
            loss = compute_loss(model, inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), adamw["clip_norm"])
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def main() -> None:
    """Warms up by two steps (the second compiles nothing more), then times steps as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kind", choices=("litgpt", "transformers", "pytorch"), required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--optimizer", choices=("fused", "foreach"), default="fused")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    step = make_step(args, args.folder)
    answer({"losses": [float(step()) for _ in range(3)]})
    for line in sys.stdin:
        seconds = []
        for _ in range(int(line)):
            began = time.perf_counter()
            loss = step()
            if args.device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        answer({"seconds": seconds, "loss": float(loss)})


def answer(value: dict[str, Any]) -> None:
    print("BENCH " + json.dumps(value), flush=True)


if __name__ == "__main__":
    main()
