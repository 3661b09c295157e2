"""Products of few rows on a CPU, in C++: they read prepacked weights at the speed of memory, where XLA's don't in int8.

| vectors | int8 | float32 |
|---|---|---|
| AVX-512 VNNI | 64 products an instruction | 16 |
| AVX-VNNI | 32 | 8 |
| AVX2 | 32 in three instructions | 8 |
| others (NEON among them) | not here: XLA | not here: XLA |

They are built once by the machine's own compiler (`building`) and run in XLA's threads, inside compiled programs. Not
with a mesh: XLA doesn't split foreign calls.
"""

from safelm.inference.cpu_kernels.choosing import PRODUCTS, Choice, choose
from safelm.inference.cpu_kernels.products import PackedKernel, multiply, pack, take_outputs

__all__ = ["PRODUCTS", "Choice", "PackedKernel", "choose", "multiply", "pack", "take_outputs"]
