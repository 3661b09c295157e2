"""The networks among the candidates of `bundled_candidates.py`, in PyTorch: hashed vectors of words, pooled, a layer.

Shapes: B windows, T words, D size of a vector.
"""

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from safelm.safety.embedding import Embedder, load_backbone
from safelm.safety.ngrams import features

_BITS = 17
_MOST_WINDOWS = 4
_LEARNING_RATE = 2e-3


class Network(nn.Module):
    """Words as sums of their features' vectors; a convolution where asked; attention and mean; a hidden layer."""

    def __init__(self, size: int, start: tuple[np.ndarray, np.ndarray] | None):
        super().__init__()
        self.vectors = nn.EmbeddingBag(1 << _BITS, size, mode="sum")
        nn.init.normal_(self.vectors.weight, 0, 0.1 if start is None else 0.03)
        if start is not None:
            self.vectors.weight.data[torch.tensor(start[0])] = torch.tensor(start[1], dtype=torch.float32)
        self.convolution = None if start is None else nn.Conv1d(size, size, 3, padding=1)
        self.attention = nn.Linear(size, 1)
        layers = [nn.Dropout(0.2), nn.Linear(2 * size, 32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 1)]
        self.out = nn.Sequential(*layers)

    def forward(self, bucket_F: Any, offset_U: Any, word_BT: Any, is_word_BT: Any) -> torch.Tensor:
        """The logit of each window."""
        vector_UD = functional.dropout(self.vectors(bucket_F, offset_U), 0.2, self.training)
        x_BTD = vector_UD[word_BT] * is_word_BT[..., None]
        if self.training:
            x_BTD = x_BTD * (torch.rand(x_BTD.shape[:2]) > 0.1)[..., None]
        if self.convolution is not None:
            x_BTD = x_BTD + functional.relu(self.convolution(x_BTD.transpose(1, 2))).transpose(1, 2)
        share_BT = self.attention(x_BTD)[..., 0].masked_fill(is_word_BT == 0, -1e9).softmax(1)
        mean_BD = (x_BTD * is_word_BT[..., None]).sum(1) / is_word_BT.sum(1, keepdim=True).clamp(min=1)
        return self.out(torch.cat([(x_BTD * share_BT[..., None]).sum(1), mean_BD], 1))[:, 0]


class Windows:
    """The windows' words as rows of one list of words, each with its buckets."""

    def __init__(self, found: features.Words):
        self.all_U, first, self._word_M = np.unique(found.hash_M, return_index=True, return_inverse=True)
        bucket_F, count_U = features.word_features(found, first, _BITS)
        self.buckets = np.split(bucket_F, np.cumsum(count_U)[:-1])
        self.first, self.found = first, found
        self.begin_W = np.searchsorted(found.window_M, np.arange(len(found.text_W) + 1))

    def batch(self, chosen: np.ndarray) -> tuple[torch.Tensor, ...]:
        """Some windows as `Network` takes them."""
        words = [self._word_M[self.begin_W[w] : self.begin_W[w + 1]] for w in chosen]
        length = max(1, *map(len, words))
        word_BT, is_word_BT = np.zeros((len(words), length), np.int64), np.zeros((len(words), length), np.float32)
        for row, own in enumerate(words):
            word_BT[row, : len(own)], is_word_BT[row, : len(own)] = own, 1
        needed, again = np.unique(word_BT, return_inverse=True)
        lists = [self.buckets[i] for i in needed]
        offsets = np.cumsum([0, *map(len, lists[:-1])])
        arrays = (np.concatenate(lists), offsets, again.reshape(word_BT.shape), is_word_BT)
        return tuple(map(torch.tensor, arrays))


def scores(data: Any, *, epochs: int, size: int, batch: int, minilm: bool) -> Any:
    """See `bundled_candidates.Scores`."""
    torch.set_num_threads(1)
    windows = Windows(data.found)
    start = _minilm_start(windows, size) if minilm else None
    text_W = data.found.text_W
    place_W = np.arange(len(text_W)) - np.searchsorted(text_W, text_W)

    def values(is_used_N: np.ndarray, is_tested_N: np.ndarray) -> np.ndarray:
        torch.manual_seed(0)
        most_W = np.where(data.is_safe_N[text_W], _MOST_WINDOWS, 1)
        used = np.flatnonzero(is_used_N[text_W] & (place_W < most_W))
        network = _trained(Network(size, start), windows, used, data, epochs, batch)
        tested = np.flatnonzero(is_tested_N[text_W])
        tested = tested[np.argsort(np.diff(windows.begin_W)[tested], kind="stable")]
        highest_N = np.full(len(is_tested_N), -np.inf)
        with torch.no_grad():
            for at in range(0, len(tested), batch):
                own = tested[at : at + batch]
                np.maximum.at(highest_N, text_W[own], network(*windows.batch(own)).numpy())
        return highest_N[is_tested_N]

    return values


def _trained(network: Network, windows: Windows, used: np.ndarray, data: Any, epochs: int, batch: int) -> Network:
    text_W = data.found.text_W
    weight_W = data.weight_N[text_W] / np.bincount(text_W[used], minlength=len(data.weight_N)).clip(1)[text_W]
    weight_W = weight_W / weight_W[used].mean()
    rng, length_W = np.random.default_rng(0), np.diff(windows.begin_W)
    optimizer = torch.optim.Adam(network.parameters(), _LEARNING_RATE)
    steps = epochs * -(-len(used) // batch)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(epochs):
        order = used[np.argsort(length_W[used] + 4 * rng.random(len(used)), kind="stable")]
        batches = [order[at : at + batch] for at in range(0, len(order), batch)]
        for number in rng.permutation(len(batches)):
            own = batches[number]
            target_B, weight_B = (torch.tensor(v[own], dtype=torch.float32) for v in (data.target_N[text_W], weight_W))
            logit_B = network(*windows.batch(own))
            loss = (functional.binary_cross_entropy_with_logits(logit_B, target_B, reduction="none") * weight_B).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def _minilm_start(windows: Windows, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Buckets of the words themselves, and MiniLM's vectors of them on their first principal directions."""
    found = windows.found
    data = found.bytes_Y.tobytes()
    words = [data[found.start_M[i] : found.stop_M[i]].decode("utf-8", "replace") for i in windows.first]
    x_UD, text_U = Embedder(load_backbone("minilm")).embed(words)
    x_UD = x_UD[np.searchsorted(text_U, np.arange(len(words)))] - x_UD.mean(0)
    _, _, directions = np.linalg.svd(x_UD[:: max(1, len(x_UD) // 20_000)], full_matrices=False)
    x_UD = x_UD @ directions[:size].T
    return np.asarray([buckets[0] for buckets in windows.buckets]), 0.3 * x_UD / x_UD.std()
