"""Prints a report of ahead-of-time compilation, with advice on what to change."""

from collections.abc import Mapping
from typing import Any

from safelm.aot.topology import GIB


def rows_per_chip(values: Mapping[str, Any]) -> int:
    """A micro-batch's rows on one chip."""
    return values["batch_size"] // values["grad_accum_steps"] // (values["mesh.data"] * values["mesh.fsdp"])


def advice(found: Mapping[str, Any]) -> str:
    """Advice on how to make the step fit, or how to make it faster."""
    values = found["settings"]
    if not found["fits"]:
        return _to_make_it_fit(values, found["chips"] // found["slices"])
    time, steps = found["time"], values["grad_accum_steps"]
    if time["collectives_not_hidden"] > 0.1 * time["step"]:
        share = f"bound by communication ({time['collectives_not_hidden'] / time['step']:.0%} of the step)"
        if steps > 1:
            return f"{share}: fewer --config.grad_accum_steps (now {steps}) gather parameters less often"
        return f"{share}: a larger --config.batch_size has more to compute for the same parameters"
    if time["hbm"] > time["compute"]:
        return (
            "bound by memory traffic: larger micro-batches (fewer --config.grad_accum_steps) read parameters less often"
        )
    repeated = found["flops"]["of_matrix_products"] / found["model_flops_per_chip"]
    free = (found["memory"]["available"] - found["memory"]["peak"]) / GIB
    if values["model.remat"] != "none" and repeated > 1.1 and free > 1:
        lighter = f"with {free:.1f} GiB free try a lighter --config.model.remat"
        return f"bound by compute, {repeated:.2f} times what the model needs: {lighter}"
    return "bound by compute"


def _to_make_it_fit(values: Mapping[str, Any], chips_of_a_slice: int) -> str:
    rows, steps = rows_per_chip(values), values["grad_accum_steps"]
    if values["mesh.fsdp"] * values["mesh.tensor"] < chips_of_a_slice:
        whole = chips_of_a_slice // values["mesh.tensor"]
        return f"--config.mesh.fsdp={whole} splits parameters and optimizer over the whole slice"
    if values["model.remat"] != "full":
        return "--config.model.remat=full keeps only each layer's input for the backward pass"
    if rows > 1:
        return f"--config.grad_accum_steps={2 * steps} halves a micro-batch (now {rows} rows a chip)"
    return "more chips: parameters, optimizer and one row a chip are too much for these"


def lines(found: Mapping[str, Any]) -> list[str]:
    """The report as lines of text."""
    values, memory, attention = found["settings"], found["memory"], found["attention"]
    axes = " x ".join(f"{axis} {values[f'mesh.{axis}']}" for axis in ("data", "fsdp", "tensor"))
    slices = f"{found['slices']} slices of " if found["slices"] > 1 else ""
    batches = f"{values['grad_accum_steps']} micro-batches of {rows_per_chip(values)} rows a chip"
    text = [
        f"topology     {slices}{found['topology']}: {found['chips']} chips ({axes})",
        f"step         {found['tokens_per_step']:,} tokens: {batches}, remat {values['model.remat']}",
        f"attention    {attention['kernel']} ({attention['reason']})",
    ]
    if options := values.get("compiler_options"):
        text.append(f"compiler     {' '.join(options)}")
    available = f"{memory['available'] / GIB:.2f} GiB of a chip"
    if "needed" in memory:
        needed = f"{memory['needed'] / GIB:.2f} GiB needed" if memory["needed"] else "refused for its memory"
        text.append(f"memory       {needed}, there are {available}")
    else:
        names = ("arguments", "outputs", "temporaries", "aliased")
        parts = ", ".join(f"{name} {memory[name] / GIB:.2f}" for name in names)
        text.append(f"memory       {memory['peak'] / GIB:.2f} of {available} ({parts})")
    if "time" in found:
        text += _program_lines(found)
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    return [*text, f"verdict      {verdict}: {found['advice']}", f"compiled in  {found['compile_seconds']:.0f} s"]


def _program_lines(found: Mapping[str, Any]) -> list[str]:
    attention, flops, time = found["attention"], found["flops"], found["time"]
    scores = ", ".join(attention["score_buffers"]) or "none"
    kernels = ", ".join(f"{count:,} x {name}" for name, count in attention["kernels_in_program"].items()) or "none"
    in_kernel = f"{flops['in_attention_kernels'] / 1e12:.1f} T of them in attention kernels"
    text = [
        f"             kernels in the program: {kernels}",
        f"             arrays of T x T scores in memory: {scores}",
        f"FLOPs        {found['model_flops_per_chip'] / 1e12:.1f} T a chip by the model's formula",
        f"             {flops['of_matrix_products'] / 1e12:.1f} T in the program's products, {in_kernel}",
        f"HBM          {found['hbm_bytes'] / 1e9:,.0f} GB read and written a chip",
    ]
    for name, entry in found["collectives"].items():
        dtypes = ", ".join(f"{dtype} {count / 1e9:.2f}" for dtype, count in entry["bytes_by_dtype"].items())
        sent = f"{entry['bytes'] / 1e9:9.2f} GB sent a chip ({dtypes}), {entry['seconds'] * 1e3:,.1f} ms"
        text.append(f"{name:<23}{entry['count']:>7,} times {sent}")
    hidden = f"{time['collectives']:.3f} s collectives, {time['collectives_not_hidden']:.3f} s of them not hidden"
    rate = f"{found['tokens_per_step'] / time['step']:,.0f} tokens/s, MFU {found['mfu']:.1%}"
    text += [
        f"time         {time['compute']:.3f} s compute, {time['hbm']:.3f} s HBM, {hidden}",
        f"estimate     {time['step']:.3f} s a step at best by the roofline: {rate}",
    ]
    if cycles := time["by_compiler_cycles"]:
        mfu = found["mfu"] * time["step"] / cycles
        text.append(f"             {cycles:.3f} s with the compiler's cycle counts: MFU {mfu:.1%}")
    return text
