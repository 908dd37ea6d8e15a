"""Few columns of a Boolean matrix that meet all of its rows: which prototypes the cells of normal images need."""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array


def hitting_set(rows: csr_array) -> list[int]:
    """Few columns such that each row of a Boolean matrix has one of them, by the greedy algorithm.

    Args:
        rows: (N, P), with at least one true entry in each row.

    Returns:
        Indices of the columns: each is the one that most rows without any have, the first where several are.

    Raises:
        ValueError: If a row has no entry.

    Example:
        >>> hitting_set(csr_array([[True, True, False], [False, True, False], [False, False, True]]))
        [1, 2]
    """
    if not np.diff(rows.indptr).all():
        msg = "a row without a true entry cannot be met by any column"
        raise ValueError(msg)
    columns = csr_array(rows.T)
    is_open = np.ones(rows.shape[0], dtype=bool)
    counts = np.diff(columns.indptr)
    chosen = []
    while is_open.any():
        best = int(counts.argmax())
        chosen.append(best)
        met = columns.indices[columns.indptr[best] : columns.indptr[best + 1]]
        met = met[is_open[met]]
        is_open[met] = False
        counts -= np.bincount(_entries(rows, met), minlength=len(counts))
    return chosen


def _entries(matrix: csr_array, rows: NDArray[np.integer]) -> NDArray[np.integer]:
    """Columns of the entries of some rows, which takes SciPy's own selection several times as long."""
    starts, ends = matrix.indptr[rows], matrix.indptr[rows + 1]
    lengths = ends - starts
    before = lengths.cumsum() - lengths
    return matrix.indices[np.repeat(starts - before, lengths) + np.arange(lengths.sum())]
