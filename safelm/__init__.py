"""SafeLM: safety pretraining of language models in JAX."""
