"""A block: some cells with their sparse expression and their integer columns."""

import dataclasses

import numpy as np
import scipy.sparse as sp


@dataclasses.dataclass(frozen=True)
class Block:
    """Some cells, as they lie in a store or mixed.

    Attributes
    ----------
    x
        Expression (n, g), sf-log1p, CSR float32.
    columns
        Other columns by name, each (n,) int64; ``cell_type`` is always there.
    """

    x: sp.csr_array
    columns: dict[str, np.ndarray]

    def __len__(self) -> int:
        """Return the number of cells."""
        return self.x.shape[0]

    def take(self, rows: np.ndarray | slice) -> "Block":
        """Return the cells at these positions, in this order."""
        return Block(self.x[rows], {name: values[rows] for name, values in self.columns.items()})

    @staticmethod
    def concatenate(blocks: "list[Block]") -> "Block":
        """Join blocks that have the same columns."""
        if len(blocks) == 1:
            return blocks[0]
        x = sp.vstack([block.x for block in blocks], format="csr")
        names = blocks[0].columns
        return Block(x, {name: np.concatenate([block.columns[name] for block in blocks]) for name in names})
