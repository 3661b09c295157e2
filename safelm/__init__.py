"""SafeLM: safety pretraining of language models in JAX."""

from safelm import xla_flags

xla_flags.guard_cpu_reductions()  # here, because every command and library use imports this before XLA starts
