"""A decoding step's products and attention, large products in bfloat16 and AdamW on a CPU, in C++.

Products of few rows read prepacked weights at the speed of memory, where XLA's don't in int8; attention reads the
cache's tokens and not the room behind them; caches follow beams and take
tokens in place. Large products (`matmul`) need AVX-512 BF16.

| vectors | int8 | bfloat16 | float32 |
|---|---|---|---|
| AMX (in int8 from 9 rows on) | 8,192 products an instruction | 4,096 | as AVX-512 |
| AVX-512 BF16 | 64 | 32 | 16 |
| AVX-512 VNNI | 64 | as float32, half the memory | 16 |
| AVX-VNNI | 32 | as float32 | 8 |
| AVX2 | 32 in three instructions | as float32 | 8 |
| others (NEON among them) | not here: XLA | not here: XLA | not here: XLA |

They are built once by the machine's own compiler (`building`) and run in XLA's threads, inside compiled programs. Not
with a mesh: XLA doesn't split foreign calls.
"""

from safelm.models.cpu_kernels.adamw import adamw, squared_norm
from safelm.models.cpu_kernels.attention import attend_chunk, attend_next, takes_heads_of
from safelm.models.cpu_kernels.building import refusal
from safelm.models.cpu_kernels.caches import follow_beams, put_tokens
from safelm.models.cpu_kernels.choosing import PRODUCTS, Choice, choose
from safelm.models.cpu_kernels.logits import log_sum_exp
from safelm.models.cpu_kernels.matmul import matmul, matmul_refusal
from safelm.models.cpu_kernels.products import PackedKernel, multiply, pack, take_outputs

__all__ = [
    "PRODUCTS",
    "Choice",
    "PackedKernel",
    "adamw",
    "attend_chunk",
    "attend_next",
    "choose",
    "follow_beams",
    "log_sum_exp",
    "matmul",
    "matmul_refusal",
    "multiply",
    "pack",
    "put_tokens",
    "refusal",
    "squared_norm",
    "take_outputs",
    "takes_heads_of",
]
