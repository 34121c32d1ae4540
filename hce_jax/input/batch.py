"""A batch of cells, as it is given to the devices."""

from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from hce_jax.typing import AnyArray, Bool, Float, Int


class CellBatch(NamedTuple):
    """One batch; numpy arrays on the host, JAX arrays on the devices.

    Attributes
    ----------
    x
        Expression (b, g), sf-log1p, float32.
    targets
        Label of each cell (b,), int32.
    real
        False for the rows that only fill the last batch up (b,).

    Examples
    --------
    >>> batch = CellBatch(np.zeros((2, 3), np.float32), np.zeros(2, np.int32), np.array([True, False]))
    >>> int(batch.real.sum())
    1
    """

    x: Float[AnyArray, "b g"]
    targets: Int[AnyArray, "b"]
    real: Bool[AnyArray, "b"]


def make_batch(x: sp.csr_array, targets: np.ndarray, batch_size: int) -> CellBatch:
    """Make at most ``batch_size`` cells dense and fill the batch up with empty rows that are marked as not real.

    Parameters
    ----------
    x
        Expression (n, g), n <= batch_size.
    targets
        Labels (n,).
    batch_size
        Rows b of the result.

    Examples
    --------
    >>> make_batch(sp.csr_array(np.eye(2, dtype=np.float32)), np.array([1, 0]), 3).real.tolist()
    [True, True, False]
    """
    n_cells, n_genes = x.shape
    dense = np.zeros((batch_size, n_genes), np.float32)
    x.toarray(out=dense[:n_cells])
    padded = np.zeros(batch_size, np.int32)
    padded[:n_cells] = targets
    return CellBatch(dense, padded, np.arange(batch_size) < n_cells)
