"""The greedy hitting set, against a slow one and against the best."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array

from anomalib_ot.models.pradot.hitting_set import hitting_set


def slow(matrix):
    """The greedy algorithm as it is told: again and again the column that most open rows have."""
    chosen = []
    open_rows = [set(np.flatnonzero(row)) for row in matrix]
    while open_rows:
        best = max(range(matrix.shape[1]), key=lambda column: sum(column in row for row in open_rows))
        chosen.append(best)
        open_rows = [row for row in open_rows if best not in row]
    return chosen


@st.composite
def matrices(draw):
    rows, columns = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    matrix = np.random.default_rng(draw(st.integers(0, 999))).random((rows, columns)) < draw(st.floats(0.05, 0.9))
    matrix[np.arange(rows), np.arange(rows) % columns] = True
    return matrix


@given(matrices())
def test_it_is_the_greedy_one(matrix):
    assert hitting_set(csr_array(matrix)) == slow(matrix)


@given(matrices())
def test_it_meets_all_rows_with_few_more_columns_than_the_best(matrix):
    chosen = hitting_set(csr_array(matrix))
    assert matrix[:, chosen].any(1).all()
    columns = range(matrix.shape[1])
    best = next(k for k in columns if any(matrix[:, some].any(1).all() for some in combinations(columns, k + 1))) + 1
    # Johnson's bound for the greedy algorithm.
    assert len(chosen) <= best * (1 + np.log(len(matrix)))


def test_no_rows_need_no_columns():
    assert hitting_set(csr_array((0, 4), dtype=bool)) == []


def test_a_row_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="each row needs a true entry"):
        hitting_set(csr_array(np.array([[True, False], [False, False]])))
