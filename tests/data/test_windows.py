"""Stores of windows: rows are the windows as they were cut, and nothing else is done to them."""

import json

import numpy as np
import pytest
import tiny_runs
import token_stores

from safelm.data.channels import CHANNELS, REAL_TOKENS
from safelm.data.loader import eval_batches, make_loader
from safelm.data.schedule import MixtureSchedule, Phase
from safelm.data.store import TokenStore
from safelm.train.run import train

T, END = 12, token_stores.EOS_ID


def window_store(directory, windows, real=None, **fields):
    """A store of windows over three shards, the last of which is empty."""
    channels = CHANNELS if real is None else (*CHANNELS, REAL_TOKENS)
    numbers = real and [
        {"real_tokens": count, "loss_weight": (np.arange(len(window)) < count).astype(np.float32)}
        for window, count in zip(windows, real, strict=True)
    ]
    token_stores.write_store(directory, windows, num_shards=3, channels=channels, numbers=numbers)
    path = directory / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unit": "window"} | fields))
    return TokenStore.open(directory)


def random_windows(count=7, seed=0):
    rng = np.random.default_rng(seed)
    windows = rng.integers(2, 900, (count, T + 1))
    windows[rng.random(windows.shape) < 0.2] = END
    return windows


def expected_row(window, real):
    """Inputs, targets, positions, segments and weights of a row, token by token."""
    row = np.zeros((5, T), np.int64)
    position, segment = 0, 0
    for place in range(real - 1):
        begins = place == 0 or window[place] == END
        position, segment = (0, segment + 1) if begins else (position + 1, segment)
        row[:, place] = window[place], window[place + 1], position, segment, 1
    return row


@pytest.mark.parametrize("padded", [False, True])
def test_a_row_is_a_window_read_token_by_token(tmp_path, padded):
    windows = random_windows()
    real = [2, 13, 5, 9, 13, 3, 12] if padded else None
    store = window_store(tmp_path, list(windows), real)
    rows = 0
    for batch in eval_batches(store, batch_size=3, seq_len=T, packing="window"):
        arrays = (batch.inputs_BT, batch.targets_BT, batch.positions_BT, batch.segment_ids_BT, batch.loss_weight_BT)
        for at in range(3):
            row = np.stack([array[at] for array in arrays])
            if rows < len(windows):
                expected = expected_row(windows[rows], real[rows] if padded else T + 1)
                np.testing.assert_array_equal(row, expected)
                rows += 1
            else:
                assert not row.any()
    assert rows == len(windows)


def test_an_epoch_has_every_window_once_whatever_the_order(tmp_path):
    windows = random_windows(20)
    store = window_store(tmp_path, list(windows))
    schedule = MixtureSchedule([Phase(0.0, {"a": 1.0})], batch_size=4, seq_len=T, total_steps=5)
    loader = make_loader({"a": store}, schedule, seed=3, batch_size=4, seq_len=T, packing="window")
    seen = [(*batch.inputs_BT[row].tolist(), int(batch.targets_BT[row, -1])) for batch in loader for row in range(4)]
    assert sorted(seen) == sorted(tuple(window) for window in windows.tolist())


def test_windows_of_other_lengths(tmp_path):
    windows = [np.arange(2, 2 + length) for length in (T + 1, 2, 7)]
    store = window_store(tmp_path / "a", windows)
    (batch,) = eval_batches(store, batch_size=3, seq_len=T, packing="window")
    assert [int((batch.segment_ids_BT[row] > 0).sum()) for row in range(3)] == [T, 1, 6]
    with pytest.raises(ValueError, match=f"window 0 has {T + 1} tokens, a row of seq_len {T - 1} holds 2 to {T}"):
        list(eval_batches(store, batch_size=3, seq_len=T - 1, packing="window"))
    short = window_store(tmp_path / "b", [np.arange(2, 9), np.array([3])])
    with pytest.raises(ValueError, match="window 1 has 1 tokens"):
        list(eval_batches(short, batch_size=3, seq_len=T, packing="window"))


def test_a_trainer_re_packed_packed_windows_and_corrupted_bounds_silently(tmp_path):
    """Windows are not packed, and documents are no windows: the other packing is refused by name."""
    windows = window_store(tmp_path / "windows", list(random_windows()))
    texts = token_stores.write_store(tmp_path / "documents", token_stores.numbered_documents([5, 7]))
    for packing in ("concat", "fit"):
        with pytest.raises(ValueError, match=rf"packing is '{packing}', but .*windows holds windows"):
            eval_batches(windows, batch_size=2, seq_len=T, packing=packing)
    with pytest.raises(ValueError, match=r"packing is 'window', but .*documents holds documents"):
        eval_batches(texts, batch_size=2, seq_len=T, packing="window")
    with pytest.raises(ValueError, match="unit 'page'"):
        window_store(tmp_path / "pages", list(random_windows()), unit="page")


def test_a_run_trains_on_windows(tmp_path):
    tiny_runs.write_inputs(tmp_path)
    tokenizer = tiny_runs.tokenizer()
    for split in ("train", "validation"):
        windows = random_windows(40) % (tokenizer.vocab_size - 4)
        facts = {"vocab_hash": tokenizer.hash, "vocab_size": tokenizer.vocab_size, "harm_tag_id": tokenizer.harm_tag_id}
        facts |= {"num_tag_tokens": 0}
        store = tmp_path / "tokens/windows" / split
        with pytest.raises(ValueError, match="num_tag_tokens"):
            window_store(store, list(windows), **facts)
        manifest = json.loads((store / "manifest.json").read_text())
        for shard in manifest["shards"]:
            shard["num_tag_tokens"] = 0
        (store / "manifest.json").write_text(json.dumps(manifest))
    phases = ({"start": 0.0, "rates": {"windows": 1.0}},)
    overrides = {"seq_len": T, "data.packing": "window", "total_steps": 2, "eval.every_steps": 2}
    config = tiny_runs.tiny_config(tmp_path, **overrides)
    with config.unlocked():
        config.data.phases, config.eval.sources = phases, ("windows",)
    train(config, str(tmp_path / "run"))
    assert "eval_loss/windows" in tiny_runs.metric_lines(tmp_path / "run")[-1]
