"""The expression of some cells, in the forms that models take it."""

from functools import cached_property, partial

import jax
import scipy.sparse as sp

from hce_jax.input.batch import LINE, Capacity, densify, make_batch, row_width
from hce_jax.store import Block
from hce_jax.store.block import COUNTS, VALUES
from hce_jax.typing import Array, Float

#: Lengths of streams come in so many steps between a power of two and the next.
_STEPS = 4


class Expression:
    """The expression of the cells of a block; each form is made once, when it is first asked for.

    Parameters
    ----------
    block
        The cells.

    Examples
    --------
    >>> import numpy as np
    >>> cells = Expression(Block.of_values(np.eye(3, dtype=np.float32), {"cell_type": np.arange(3)}))
    >>> cells.x.nnz, cells.dense.shape
    (3, (4, 3))
    """

    def __init__(self, block: Block):
        self.block = block

    def __len__(self) -> int:
        """Return the number of cells n."""
        return len(self.block)

    @cached_property
    def x(self) -> sp.csr_array:
        """CSR (n, g) on the host, float32."""
        return self.block.x

    @cached_property
    def dense(self) -> Float[Array, "b w"]:
        """Dense on the device, as wide as :func:`hce_jax.input.row_width` says.

        Rows of zeros follow the n cells, so that there are few shapes to compile for.
        """
        counts, values = (_room(len(self.block.stream(names).gaps)) for names in (COUNTS, VALUES))
        batch = make_batch([self.block], rows_in_steps(len(self)), [Capacity(counts, values)])
        return _densify(batch, width=row_width(batch.n_genes))


_densify = partial(jax.jit, static_argnames="width")(densify)


def rows_in_steps(n_cells: int) -> int:
    """Return the next power of two: rows of a batch come in few numbers.

    Examples
    --------
    >>> rows_in_steps(448), rows_in_steps(2048)
    (512, 2048)
    """
    return 1 << max(n_cells - 1, 0).bit_length()


def _room(n_entries: int) -> int:
    """Round up, by a quarter at most, to one of few lengths."""
    step = max(1 << max(n_entries.bit_length() - 1, 0), _STEPS * LINE) // _STEPS
    return -(-n_entries // step) * step
