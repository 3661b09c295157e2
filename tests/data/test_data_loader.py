"""Batches: every token of every document exactly once an epoch, whatever the hosts, workers and restarts."""

import itertools
import pickle
import re
from collections import Counter

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_stores import EOS_ID, assert_equal_batches, numbered_documents, write_store

from safelm.data.assembly import Assembly
from safelm.data.batches import Batches
from safelm.data.buffers import Buffers
from safelm.data.loader import Loader, eval_batches, host_rows, make_loader
from safelm.data.packing import FitRows, make_rows
from safelm.data.schedule import MixtureSchedule, Phase
from safelm.data.stream import Stream

PACKINGS = ("concat", "fit")
RATES = {"raw": 0.5, "safe": 0.3, "moral": 0.2}


def all_rows(store, seq_len, packing):
    plan = make_rows(store, seq_len, packing)
    return Assembly([plan]).batch(np.zeros(plan.num_rows, np.int32), np.arange(plan.num_rows), plan.num_rows)


def pairs_of(batch):
    """Every (input, target) with a loss."""
    chosen = batch.loss_weight_BT > 0
    return Counter(zip(batch.inputs_BT[chosen].tolist(), batch.targets_BT[chosen].tolist(), strict=True))


def pairs_in(documents):
    """Every token behind the one before it, a document's first behind the end-of-document token."""
    return Counter(pair for d in documents for pair in zip([EOS_ID, *d[:-1].tolist()], d.tolist(), strict=True))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    rng = np.random.default_rng(0)
    root, first, result = tmp_path_factory.mktemp("stores"), 2, {}
    for name, count in (("raw", 60), ("safe", 25), ("moral", 9)):
        documents = numbered_documents(rng.integers(1, 70, count), first)
        first += sum(len(d) - 1 for d in documents)
        result[name] = write_store(root / name, documents, num_shards=3, vocab_size=10_000)
    return result


def schedule_of(rates=RATES, *, batch_size=8, seq_len=16, total_steps=40):
    phases = [Phase(0.0, {"raw": 1.0}), Phase(0.3, rates)]
    return MixtureSchedule(phases, batch_size=batch_size, seq_len=seq_len, total_steps=total_steps)


# ---- rows and packing

STORES_AND_ROWS = {
    "lengths": st.lists(st.integers(1, 40), min_size=1, max_size=30),
    "num_shards": st.integers(1, 4),
    "seq_len": st.integers(1, 24),
    "packing": st.sampled_from(PACKINGS),
}


@settings(max_examples=40, deadline=None)
@given(**STORES_AND_ROWS)
def test_an_epoch_holds_every_pair_of_every_document_once(tmp_path_factory, lengths, num_shards, seq_len, packing):
    documents = numbered_documents(lengths)
    directory = tmp_path_factory.mktemp("store")
    store = write_store(directory, documents, num_shards=num_shards, vocab_size=2000)
    batch = all_rows(store, seq_len, packing)
    assert pairs_of(batch) == pairs_in(documents)
    # Every stored token is an input exactly once as well, the documents' ends included: each begins one.
    real = batch.segment_ids_BT > 0
    assert Counter(batch.inputs_BT[real].tolist()) == Counter(np.concatenate(documents).tolist())
    assert batch.loss_weight_BT[real].all() and real.sum() == store.num_tokens
    for name in ("inputs_BT", "targets_BT", "positions_BT", "loss_weight_BT"):
        assert not getattr(batch, name)[~real].any(), name


@settings(max_examples=40, deadline=None)
@given(**STORES_AND_ROWS)
def test_packed_equals_unpacked(tmp_path_factory, lengths, num_shards, seq_len, packing):
    """Cut a row at its segments: each is a contiguous run of one document with its own next tokens."""
    documents = numbered_documents(lengths)
    store = write_store(tmp_path_factory.mktemp("store"), documents, num_shards=num_shards, vocab_size=2000)
    owner = {int(token): d for d in documents for token in d[:-1]}
    batch = all_rows(store, seq_len, packing)
    for row in range(len(batch.inputs_BT)):
        segments = batch.segment_ids_BT[row]
        count = int(segments.max())
        real = segments[segments > 0]
        assert (np.diff(real) >= 0).all() and sorted(set(real)) == list(range(1, count + 1))
        for segment in range(1, count + 1):
            at = np.flatnonzero(segments == segment)
            assert (np.diff(at) == 1).all()
            np.testing.assert_array_equal(batch.positions_BT[row, at], np.arange(len(at)))
            inputs, targets = batch.inputs_BT[row, at], batch.targets_BT[row, at]
            assert batch.loss_weight_BT[row, at].all()
            first, last = int(targets[0]), int(inputs[0])
            if first == EOS_ID:  # what is left of a document is its end
                assert len(at) == 1
                document = owner.get(last, np.array([EOS_ID]))
                start = len(document) - 1
            else:
                document = owner[first]
                start = int(np.flatnonzero(document == first)[0])
            np.testing.assert_array_equal(targets, document[start:][: len(at)])
            np.testing.assert_array_equal(inputs, np.append(EOS_ID, document)[start:][: len(at)])


def test_concat_row_by_hand(tmp_path):
    store = write_store(tmp_path, [[5, 6, 0], [7, 8, 9, 0]])
    batch = all_rows(store, 5, "concat")
    np.testing.assert_array_equal(batch.inputs_BT, [[0, 5, 6, 0, 7], [8, 9, 0, 0, 0]])
    np.testing.assert_array_equal(batch.targets_BT, [[5, 6, 0, 7, 8], [9, 0, 0, 0, 0]])
    np.testing.assert_array_equal(batch.loss_weight_BT, [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.segment_ids_BT, [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]])
    np.testing.assert_array_equal(batch.positions_BT, [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]])
    assert [array.dtype for array in (batch.inputs_BT, batch.loss_weight_BT)] == [np.int32, np.float32]


def pieces_of(plan):
    rows = np.arange(plan.num_rows)
    return type(plan).pieces([plan], Stream([plan.store]), np.zeros_like(rows), rows)


def test_fit_cuts_only_what_is_longer_than_a_row(tmp_path):
    rng = np.random.default_rng(1)
    lengths = np.minimum(1 + rng.lognormal(2.5, 1, 6000).astype(int), 200)
    documents = [np.append(np.full(n - 1, 2 + i % 900), 0) for i, n in enumerate(lengths)]
    store = write_store(tmp_path, documents, num_shards=2)
    rows = FitRows(store, 64)
    pieces = pieces_of(rows)
    bounds = bounds_of(store)
    document = np.searchsorted(bounds, pieces.start, side="right") - 1
    start, stop = bounds[document], bounds[document + 1]
    cut = pieces.length < stop - start
    assert ((stop - start)[cut] > 64).all() and (~cut).sum() == (lengths <= 64).sum()
    assert (pieces.begins == (pieces.start == start)).all()
    assert pieces.length.sum() / (rows.num_rows * 64) > 0.98
    again = pieces_of(FitRows(store, 64))
    np.testing.assert_array_equal(pieces.start, again.start)


def bounds_of(store):
    """The start of every document in the token stream, and the end of the last."""
    return np.cumsum([0, *(length for bounds in store.shard_bounds for length in np.diff(bounds))])


def slow_row(plan, row):
    """A row made token by token, as `safelm.data.rows` says: what the fast way must give."""
    store, seq_len = plan.store, plan.seq_len
    bounds = bounds_of(store)
    if isinstance(plan, FitRows):
        at = range(*plan._row_first[row : row + 2])
        pieces = [(int(plan._start[i]), int(plan._start[i] + plan._length[i])) for i in at]
    else:
        pieces = [(row * seq_len, min((row + 1) * seq_len, store.num_tokens))]
    columns = []
    for start, stop in pieces:
        for index in range(start, stop):
            is_begin = index in bounds
            before = EOS_ID if is_begin else int(store.tokens(index - 1, index)[0])
            opens = index == start or is_begin
            segment = columns[-1][3] + opens if columns else 1
            position = 0 if opens else columns[-1][2] + 1
            columns.append((before, int(store.tokens(index, index + 1)[0]), position, segment, 1))
    return np.array(columns + [(0, 0, 0, 0, 0)] * (seq_len - len(columns))).T


@settings(max_examples=25, deadline=None)
@given(data=st.data(), num_sources=st.integers(1, 3), seq_len=st.integers(1, 24), packing=st.sampled_from(PACKINGS))
def test_rows_of_many_stores_are_those_made_token_by_token(tmp_path_factory, data, num_sources, seq_len, packing):
    root, plans = tmp_path_factory.mktemp("stores"), []
    for source in range(num_sources):
        documents = numbered_documents(data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=12)))
        store = write_store(root / str(source), documents, num_shards=data.draw(st.integers(1, 4)))
        plans.append(make_rows(store, seq_len, packing))
    assembly = Assembly(plans)
    for _ in range(3):  # the memory of the one before is used again
        sources = np.array(data.draw(st.lists(st.integers(0, num_sources - 1), max_size=6)), np.int32)
        rows = np.array([data.draw(st.integers(0, plans[source].num_rows - 1)) for source in sources], np.int64)
        batch = assembly.batch(sources, rows, 6)
        for i in range(6):
            wanted = slow_row(plans[sources[i]], int(rows[i])) if i < len(rows) else np.zeros((5, seq_len))
            np.testing.assert_array_equal([array[i] for array in batch[:5]], wanted)
        assert batch.source_ids_B.tolist() == sources.tolist() + [0] * (6 - len(sources))
        del batch


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("seq_len", [3, 16, 200])
def test_texts_begin_with_a_models_own_id_and_never_with_two(tmp_path, packing, seq_len):
    begin_id, rng = 9_999, np.random.default_rng(0)
    documents = numbered_documents(rng.integers(1, 40, 30))
    brings_it = rng.random(len(documents)) < 0.4  # as a chat template does
    documents = [np.append(begin_id, d) if b else d for d, b in zip(documents, brings_it, strict=True)]
    plan = make_rows(write_store(tmp_path, documents, num_shards=3, vocab_size=10_000), seq_len, packing)
    rows = (np.zeros(plan.num_rows, np.int32), np.arange(plan.num_rows), plan.num_rows)
    batch, plain = Assembly([plan], begin_id=begin_id).batch(*rows), Assembly([plan]).batch(*rows)
    wanted = Counter()
    for document in documents:
        tokens = document.tolist() if document[0] == begin_id else [begin_id, *document.tolist()]
        wanted.update(itertools.pairwise(tokens))
    assert pairs_of(batch) == wanted
    first = (plain.inputs_BT == EOS_ID) & (plain.segment_ids_BT > 0)  # nothing else is predicted from it
    padding = first & (plain.targets_BT == begin_id)
    assert padding.sum() == brings_it.sum() > 5
    for name, mine, other in zip(batch._fields[:5], batch[:5], plain[:5], strict=True):
        np.testing.assert_array_equal(mine[padding], 0)
        same = ~first if name == "inputs_BT" else ~padding
        np.testing.assert_array_equal(mine[same], other[same])


def test_a_batch_that_is_held_is_never_written_to(stores):
    batches = Batches(stores, schedule_of())
    held, views, on_device = [], [], []
    for step in range(12):
        batch = batches.batch(0, step, 0, 8)
        held.append(jax.tree.map(np.copy, batch))
        views.append(batch.targets_BT[3:5])  # a part of a batch keeps it too
        on_device.append(jax.device_put(batch.inputs_BT))  # on a CPU, JAX may not copy
        del batch
    for kept, view, array in zip(held, views, on_device, strict=True):
        np.testing.assert_array_equal(view, kept.targets_BT[3:5])
        np.testing.assert_array_equal(array, kept.inputs_BT)


def test_memory_of_a_batch_nobody_holds_is_used_again():
    buffers = Buffers()
    first = buffers.take(2, 5)
    view, address = first[1:], first.ctypes.data
    del first
    assert buffers.take(2, 5).ctypes.data != address
    del view
    assert address in [buffers.take(2, 5).ctypes.data for _ in range(2)]
    assert buffers.take(3, 7).shape == (3, 7)
    assert pickle.loads(pickle.dumps(buffers)).take(2, 5).shape == (2, 5)


# ---- the order of an epoch and the mixture


@pytest.mark.parametrize("packing", PACKINGS)
def test_epochs_hold_every_document_once_and_differ(stores, packing):
    store = stores["safe"]
    documents = [store.document(i) for i in range(store.num_documents)]
    batches = Batches(stores, schedule_of({"safe": 1.0}, batch_size=1, total_steps=900), packing=packing)
    size = batches.rows_per_epoch()["safe"]
    orders = []
    for epoch in range(3):
        found, order = Counter(), []
        for step in range(270 + epoch * size, 270 + (epoch + 1) * size):
            found += pairs_of(batches.batch(3, step, 0, 1))
            order.append(int(batches.locate(3, step, 0, 1)[1][0]))
        assert found == pairs_in(documents)
        orders.append(order)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert batches.epochs(270 + 2 * size)["safe"] == 2.0
    other_seed = [int(batches.locate(4, step, 0, 1)[1][0]) for step in range(270, 270 + size)]
    assert other_seed != orders[0]


def test_sources_and_counts_are_the_schedules(stores):
    schedule = schedule_of()
    batches = Batches(stores, schedule)
    owner = {int(t): name for name, s in stores.items() for t in s.tokens(0, s.num_tokens) if t != EOS_ID}
    for step in (0, 11, 12, 25, 39):
        batch = batches.batch(0, step, 0, 8)
        names = [batches.sources[i] for i in batch.source_ids_B]
        assert Counter(names) == Counter({k: v for k, v in schedule.counts(step).items() if v})
        for name, targets in zip(names, batch.targets_BT, strict=True):
            assert {owner[int(t)] for t in targets if t != EOS_ID} <= {name}


def test_order_of_one_source_does_not_depend_on_the_others(stores):
    def safe_rows(rates):
        batches = Batches(stores, schedule_of(rates))
        located = [batches.locate(0, step, 0, 8) for step in range(40)]
        index = batches.sources.index("safe")
        return [int(row) for ids, rows in located for i, row in zip(ids, rows, strict=True) if i == index]

    few, many = safe_rows(RATES), safe_rows({"safe": 0.9, "moral": 0.1})
    assert few == many[: len(few)]


# ---- one pure function: hosts, workers, restarts


@settings(max_examples=30, deadline=None)
@given(step=st.integers(0, 39), row=st.integers(0, 7), seed=st.integers(0, 2**40), packing=st.sampled_from(PACKINGS))
def test_a_sample_is_its_row_of_the_global_batch(stores, step, row, seed, packing):
    sample = Batches(stores, schedule_of(), packing=packing).sample(seed, step, row)
    whole = Batches(stores, schedule_of(), packing=packing).batch(seed, step, 0, 8)
    assert_equal_batches(sample, jax.tree.map(lambda array: array[row], whole))


def loader_of(stores, packing="concat", **options):
    return make_loader(stores, schedule_of(), seed=5, batch_size=8, seq_len=16, packing=packing, **options)


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("process_count", [1, 2, 4])
def test_hosts_share_one_global_batch(stores, packing, process_count):
    loaders = [loader_of(stores, packing, process_index=i, process_count=process_count) for i in range(process_count)]
    batches = Batches(stores, schedule_of(), packing=packing)
    for step in range(40):
        shares = [next(loader) for loader in loaders]
        joined = jax.tree.map(lambda *arrays: np.concatenate(arrays), *shares)
        assert_equal_batches(joined, batches.batch(5, step, 0, 8))
    for loader in loaders:
        with pytest.raises(StopIteration):
            next(loader)


def test_worker_processes_change_nothing(stores):
    plain, workers = list(loader_of(stores, start_step=7)), list(loader_of(stores, start_step=7, num_workers=2))
    assert len(plain) == len(workers) == 33
    for one, two in zip(plain, workers, strict=True):
        assert_equal_batches(one, two)


@settings(max_examples=5, deadline=None)
@given(stop=st.integers(0, 40), back=st.integers(0, 40))
def test_restart_at_any_step(stores, stop, back):
    loader = loader_of(stores)
    whole = list(loader_of(stores))
    for _ in range(stop):
        next(loader)
    assert sum(loader.tokens_given().values()) == stop * 8 * 16
    resumed = loader_of(stores, start_step=stop)
    for one, two in zip(list(resumed), whole[stop:], strict=True):
        assert_equal_batches(one, two)
    loader.set_state(back)
    for one, two in zip(list(loader), whole[back:], strict=True):
        assert_equal_batches(one, two)


# ---- evaluation


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("process_count", [1, 2])
def test_evaluation_sees_every_document_once(stores, packing, process_count):
    store, found = stores["moral"], Counter()
    for index in range(process_count):
        shares = eval_batches(
            store, batch_size=8, seq_len=16, packing=packing, process_index=index, process_count=process_count
        )
        for batch in shares:
            assert batch.inputs_BT.shape == (8 // process_count, 16)
            found += pairs_of(batch)
    assert found == pairs_in([store.document(i) for i in range(store.num_documents)])


def test_evaluation_of_a_part_is_spread_over_the_store(stores):
    store = stores["raw"]
    (batch,) = eval_batches(store, batch_size=4, seq_len=16, max_batches=1)
    rows = make_rows(store, 16).num_rows
    firsts = [store.tokens(16 * (i * rows // 4), store.num_tokens)[0] for i in range(4)]
    np.testing.assert_array_equal(batch.targets_BT[:, 0], firsts)


# ---- bad input


def test_bad_input(stores, tmp_path):
    with pytest.raises(ValueError, match=re.escape("unknown sources ['web'], there are stores for ['moral', 'raw'")):
        Batches(stores, schedule_of({"web": 1.0}))
    foreign = write_store(tmp_path / "foreign", [[5, 0]], vocab="b")
    with pytest.raises(ValueError, match=f"different vocabularies: .*{foreign.manifest.vocab_hash}"):
        Batches({**stores, "safe": foreign}, schedule_of())
    with pytest.raises(ValueError, match=r"packing must be one of \['concat', 'fit', 'window'\], got 'first'"):
        Batches(stores, schedule_of(), packing="first")
    with pytest.raises(ValueError, match="batch_size=4, seq_len=16 are not the schedule's batch_size=8"):
        make_loader(stores, schedule_of(), seed=0, batch_size=4, seq_len=16)
    with pytest.raises(ValueError, match="batch_size 8 does not divide by process_count 3"):
        loader_of(stores, process_count=3)
    with pytest.raises(ValueError, match=r"process_index must be in 0\.\.1, got 2"):
        host_rows(8, 2, 2)
    with pytest.raises(ValueError, match=r"step 41 is outside the schedule's 0\.\.40"):
        loader_of(stores, start_step=41)
    with pytest.raises(ValueError, match="num_workers must be >= 0"):
        Loader(Batches(stores, schedule_of()), seed=0, num_workers=-1)
    with pytest.raises(ValueError, match="max_batches must be at least 1, got 0"):
        eval_batches(stores["raw"], batch_size=4, seq_len=16, max_batches=0)
    with pytest.raises(ValueError, match="seq_len must be at least 1 token, got 0"):
        eval_batches(stores["raw"], batch_size=4, seq_len=0)
    with pytest.raises(IndexError, match=r"rows \[0, 9\) of a batch of 8"):
        Batches(stores, schedule_of()).batch(0, 0, 0, 9)
