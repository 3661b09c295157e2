"""Budgets: never passed, met but for less than a document, drawn in the order of keys."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from safelm.selection import keys, sampling

CELLS = 4


@st.composite
def corpora(draw):
    rows = draw(st.lists(st.tuples(st.integers(0, CELLS - 1), st.integers(0, 50)), min_size=1, max_size=60))
    seed = draw(st.integers(0, 1000))
    cell_N, tokens_N = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    key_N = keys.row_keys(keys.file_base(seed, {}), np.arange(len(rows)))
    if draw(st.booleans()):
        key_N = key_N % np.uint64(5) * np.uint64(1 << 60)  # many equal keys
    return cell_N, key_N, tokens_N


def drawn(corpus, group_C, budgets):
    cell_N, key_N, tokens_N = corpus
    pieces = [(cell_N[at::3], key_N[at::3], tokens_N[at::3]) for at in range(3)]
    tokens_CK = sampling.tokens_by_bucket(iter(pieces), CELLS)
    found = sampling.draw(lambda: iter(pieces), tokens_CK, group_C, budgets)
    is_taken_N = key_N < found.limit_C[cell_N]
    for cell in range(CELLS):
        assert tokens_N[is_taken_N & (cell_N == cell)].sum() == found.tokens_C[cell]
    return is_taken_N


@settings(max_examples=150, deadline=None)
@given(corpus=corpora(), share=st.floats(0, 1), groups=st.lists(st.integers(0, 1), min_size=CELLS, max_size=CELLS))
def test_no_group_passes_its_budget_and_what_is_missing_is_less_than_a_next_row(corpus, share, groups):
    cell_N, key_N, tokens_N = corpus
    group_N = np.array(groups)[cell_N]
    budgets = {group: int(share * tokens_N[group_N == group].sum()) for group in (0, 1)}
    is_taken_N = drawn(corpus, groups, budgets)
    for group, budget in budgets.items():
        left = budget - tokens_N[is_taken_N & (group_N == group)].sum()
        assert left >= 0
        next_tokens = []
        for cell in [cell for cell in range(CELLS) if groups[cell] == group]:
            is_left_N = ~is_taken_N & (cell_N == cell)
            if is_left_N.any():
                next_key = key_N[is_left_N].min()
                next_tokens.append(tokens_N[(cell_N == cell) & (key_N == next_key)].sum())
        assert max(next_tokens, default=1) > left


@settings(max_examples=100, deadline=None)
@given(corpus=corpora())
def test_the_whole_is_taken_for_a_budget_of_all(corpus):
    assert drawn(corpus, [0] * CELLS, {0: int(corpus[2].sum())}).all()


@settings(max_examples=100, deadline=None)
@given(corpus=corpora(), share=st.floats(0.05, 0.95))
def test_a_larger_budget_takes_the_same_rows_but_for_the_last_of_a_cell(corpus, share):
    cell_N, _, tokens_N = corpus
    total = int(tokens_N.sum())
    small, large = (drawn(corpus, [0] * CELLS, {0: int(each * total)}) for each in (share, (1 + share) / 2))
    lost = small & ~large
    for cell in range(CELLS):
        assert len(set(corpus[1][lost & (cell_N == cell)].tolist())) <= 1


def test_cells_get_their_share_of_the_tokens():
    rng = np.random.default_rng(0)
    cell_N, tokens_N = rng.choice(CELLS, 20_000, p=[0.7, 0.2, 0.09, 0.01]), rng.integers(1, 900, 20_000)
    key_N = keys.row_keys(keys.file_base(7, {}), np.arange(20_000))
    budget = int(tokens_N.sum()) // 3
    is_taken_N = drawn((cell_N, key_N, tokens_N), [0] * CELLS, {0: budget})
    for cell in range(CELLS):
        taken, there = (tokens_N[is_in & (cell_N == cell)].sum() for is_in in (is_taken_N, True))
        assert abs(taken - there / 3) < 900
    assert 0 <= budget - tokens_N[is_taken_N].sum() < 900


def test_keys_are_uniform_and_differ_by_seed_file_and_row():
    row_N = np.arange(1, 50_001)
    one, other = (keys.row_keys(keys.file_base(seed, {"name": "a"}), row_N) for seed in (0, 1))
    assert len(np.unique(np.concatenate([one, other, keys.second_keys(one)]))) == 150_000
    for key_N in (one, other, keys.second_keys(one[one < (1 << 60)])):
        counts, _ = np.histogram(key_N.astype(float), 20, (0, 2.0**63))
        assert abs(counts / len(key_N) - 0.05).max() < 0.015
    assert keys.file_base(0, {"name": "a"}) != keys.file_base(0, {"name": "b"})
