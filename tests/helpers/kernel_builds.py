"""Programs for tests of the C++ kernels."""

import jax


def compiled(function, **settings):
    """A program of its own: `jit` would give what it compiled for another build."""
    return jax.jit(lambda *arguments: function(*arguments, **settings))
