"""Cells in memory to evaluate on, and classifiers whose answers are known."""

import numpy as np
from coded_cells import N_TYPES, block_of, coded_split, label_of

from hce_jax.errors import StoreError
from hce_jax.evaluation.cells import Cells
from hce_jax.hierarchy import reachability_from_edges

#: Of each column as many texts as its place in this list, and one.
COLUMNS = ("dataset_id", "donor_id", "assay", "development_stage", "disease", "tissue", "tissue_general")
#: Type 1 and 2 below 0, 3 below 1.
REACHABILITY = reachability_from_edges(N_TYPES, [(0, 1), (0, 2), (1, 3)])


class CodedCells(Cells):
    """Cells 0, 1, 2, ... of tests/coded_cells.py; a column's code is the cell's number modulo how many texts it has."""

    def __init__(self, block_sizes, damaged=None):
        self.title = "coded cells"
        side = coded_split([1]).side
        self.side = type(side)(**{**vars(side), "reachability": REACHABILITY})
        self.block_sizes = np.array(block_sizes, np.int64)
        self.lookups = {name: tuple(f"{name} {code}" for code in range(k + 2)) for k, name in enumerate(COLUMNS)}
        self.damaged, self.reads = damaged, []

    def read_block(self, index):
        self.reads.append(index)
        if index == self.damaged:
            raise StoreError(f"block {index} is damaged")
        end = int(self.block_sizes[: index + 1].sum())
        cells = np.arange(end - self.block_sizes[index], end)
        codes = {name: cells % len(texts) for name, texts in self.lookups.items()}
        return block_of(cells).with_columns({"cell_type": label_of(cells), "soma_joinid": cells + 10**10, **codes})


def probabilities_of(cells, shift=0):
    """Of a cell the type (cell + shift) % 7 has 0.4, the next one 0.3; the others share the rest."""
    cells = np.asarray(cells)
    p = np.full((len(cells), N_TYPES), 0.3 / (N_TYPES - 2), np.float32)
    p[np.arange(len(cells)), (cells + shift) % N_TYPES] = 0.4
    p[np.arange(len(cells)), (cells + shift + 1) % N_TYPES] = 0.3
    return p


class CodedClassifier:
    """Says :func:`probabilities_of` of each cell, whose number it takes from soma_joinid."""

    reads_sparse = True

    def __init__(self, shift=0, model_type="coded"):
        self.shift, self.model_type, self.title = shift, model_type, f"coded {shift}"
        self.side = CodedCells([1]).side
        self.batches = []

    def predict_block(self, cells):
        self.batches.append(len(cells))
        return probabilities_of(cells.block.column("soma_joinid") - 10**10, self.shift)
