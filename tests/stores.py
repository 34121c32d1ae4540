"""A tiny store whose values betray a misplaced cell or gene."""

from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from hce_jax.hierarchy import reachability_from_edges
from hce_jax.store.merlin_write import write_side_files, write_split
from hce_jax.store.schema import CATEGORICAL_COLUMNS

LABELS = ("leukocyte", "T cell", "CD4-positive T cell", "CD8-positive T cell", "B cell")
EDGES = ((0, 1), (1, 2), (1, 3), (0, 4))
N_TYPES, N_GENES = len(LABELS), 12
FIRST_CELL = {"train": 0, "val": 1000, "test": 2000}
SIZES = {"train": 90, "val": 23, "test": 17}


def label_of(cell):
    return (cell * 7) % N_TYPES


def expression(cells):
    """Gene 0 numbers the cell; gene 1 + t is high in type t; the others mix cell and gene; about half are zero."""
    cells, genes = np.asarray(cells)[:, None], np.arange(N_GENES)[None]
    x = np.where((cells + genes) % 2, (cells % 13 + 1) * (genes + 1) / 100, 0)
    x[:, 1 : 1 + N_TYPES] = np.where(genes[:, 1 : 1 + N_TYPES] - 1 == label_of(cells), 2.0, 0)
    x[:, 0] = (cells[:, 0] + 1) / 4096
    return x.astype(np.float32)


def cells_of(x):
    """Read the cells' numbers back from their expression."""
    return np.rint(np.asarray(x)[:, 0] * 4096).astype(int) - 1


def write_tiny_store(folder: Path, sizes=SIZES, rows_per_part=32, rows_per_group=8) -> Path:
    reach = reachability_from_edges(N_TYPES, EDGES)
    genes = pd.DataFrame({"feature_id": [f"ENSG{g:011d}" for g in range(N_GENES)],
                          "feature_name": [f"G{g}" for g in range(N_GENES)]})  # fmt: skip
    lookups = {column: LABELS if column == "cell_type" else ["a", "b"] for column in CATEGORICAL_COLUMNS}
    weights = np.linspace(0.5, 1.5, N_TYPES)
    write_side_files(folder, genes, lookups, class_weights=weights, child_matrix=reach)
    for split, size in sizes.items():
        cells = FIRST_CELL[split] + np.arange(size)
        obs = pd.DataFrame({column: np.zeros(size, int) for column in CATEGORICAL_COLUMNS})
        obs = obs.assign(cell_type=label_of(cells), soma_joinid=cells, is_primary_data=True)
        write_split(folder / split, sp.csr_array(expression(cells)), obs, rows_per_part, rows_per_group)
    return folder
