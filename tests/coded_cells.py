"""Cells whose values tell cell and gene, some kept as counts and some as values, in memory or as stores."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from hce_jax.errors import StoreError
from hce_jax.hierarchy import reachability_from_edges
from hce_jax.store import HeldSplit, SideFiles
from hce_jax.store.block import PACKED_COLUMNS, Block
from hce_jax.store.cells import write_part
from hce_jax.store.merlin_write import write_side_files, write_split
from hce_jax.store.schema import CATEGORICAL_COLUMNS

N_GENES, N_TYPES = 600, 7
#: From one expressed gene of a cell to the next: all genes, some, gaps that need two entries. 0: none at all.
STEPS = (1, 2, 5, 40, 300, 0)
FIRST_CELL = {"train": 0, "val": 1000, "test": 2000}


def label_of(cells):
    return np.asarray(cells) * 5 % N_TYPES


def counts_of(cells):
    """Counts up to 700, of which one of a cell is 1; 600 genes or fewer, none in every sixth cell."""
    cells, genes = np.asarray(cells)[:, None], np.arange(N_GENES)[None]
    step = np.take(STEPS, cells % 6)
    expressed = (step > 0) & ((cells + genes) % np.maximum(step, 1) == 0)
    counts = np.where(expressed, (cells * 31 + genes * 17) % 700 + 1, 0)
    counts[np.arange(len(cells)), expressed.argmax(axis=1)] = expressed.any(axis=1)
    return counts


def expression(cells):
    """Expression (n, g), sf-log1p; that of every fourth cell comes from no counts."""
    counts, cells = counts_of(cells).astype(float), np.asarray(cells)[:, None]
    x = np.log1p(counts * (1e4 / np.maximum(counts.sum(axis=1, keepdims=True), 1)))
    return np.where((cells % 4 == 0) & (x > 0), x + (cells % 50 + 1) / 1000, x).astype(np.float32)


def block_of(cells, as_values=False):
    make = Block.of_values if as_values else Block.of_recovered_counts
    return make(expression(cells), {"cell_type": label_of(cells)})


@dataclasses.dataclass(frozen=True)
class CodedSplit(HeldSplit):
    """Cells 0, 1, 2, ... in memory, which notes the blocks that are read; one of them may be damaged."""

    reads: list[int] = dataclasses.field(default_factory=list)
    damaged: set[int] = dataclasses.field(default_factory=set)

    def read_block(self, index, columns=("cell_type",)):
        self.reads.append(index)
        if index in self.damaged:
            raise StoreError(f"block {index} is damaged")
        return super().read_block(index, columns)


def coded_split(block_sizes, as_values=False):
    names = tuple(f"G{gene}" for gene in range(N_GENES))
    labels = tuple(f"T{label}" for label in range(N_TYPES))
    side = SideFiles(Path("coded"), names, names, labels, None, np.eye(N_TYPES, dtype=np.float32), {})
    ends = np.cumsum(block_sizes)
    blocks = (block_of(np.arange(end - size, end), as_values) for size, end in zip(block_sizes, ends, strict=True))
    return CodedSplit("train", side, tuple(blocks))


def check_rows(x, targets, cells, exact=False):
    """Check that rows have the expression and the labels of these cells."""
    np.testing.assert_allclose(x, expression(cells), rtol=0, atol=0 if exact else 1.1e-6)
    np.testing.assert_array_equal(targets, label_of(cells))


def rows_of(batch):
    """Return the expression of a batch's rows, by numpy."""
    x = np.zeros((len(batch.targets), N_GENES))
    n_rows = len(x) // len(batch.counts.rows)
    for stream, scale in ((batch.counts, batch.scale), (batch.values, None)):
        for part, (gaps, amounts, rows) in enumerate(zip(*map(np.asarray, stream), strict=True)):
            places = np.cumsum(gaps, dtype=np.int64) - 1
            at = part * n_rows + rows[places // N_GENES], places % N_GENES
            np.add.at(x, at, amounts.astype(float))
        if scale is not None:
            x = np.log1p(x * scale[:, None])
    return x


def _write_side_files(folder):
    genes = pd.DataFrame({"feature_id": [f"ENSG{g:011d}" for g in range(N_GENES)],
                          "feature_name": [f"G{g}" for g in range(N_GENES)]})  # fmt: skip
    labels = [f"T{label}" for label in range(N_TYPES)]
    lookups = {column: labels if column == "cell_type" else ["a"] for column in CATEGORICAL_COLUMNS}
    reach = reachability_from_edges(N_TYPES, ())
    write_side_files(folder, genes, lookups, class_weights=np.ones(N_TYPES), child_matrix=reach)


def write_merlin_store(folder, sizes, rows_per_part, rows_per_group):
    _write_side_files(folder)
    for name, size in sizes.items():
        cells = FIRST_CELL[name] + np.arange(size)
        obs = pd.DataFrame({column: np.zeros(size, int) for column in CATEGORICAL_COLUMNS})
        obs = obs.assign(cell_type=label_of(cells), soma_joinid=cells, is_primary_data=True)
        write_split(folder / name, sp.csr_array(expression(cells)), obs, rows_per_part, rows_per_group)
    return folder


def write_cell_store(folder, sizes, rows_per_part, block_size):
    _write_side_files(folder)
    splits = {}
    for name, size in sizes.items():
        (folder / name).mkdir()
        parts = []
        for number, start in enumerate(range(0, size, rows_per_part)):
            block = block_of(FIRST_CELL[name] + np.arange(start, min(start + rows_per_part, size)))
            parts.append(dataclasses.asdict(write_part(folder / name / f"part.{number}.arrow", [block], block_size)))
        splits[name] = {"parts": parts}
    about = {"format": "cells", "format_version": 1, "block_size": block_size,
             "columns": [*PACKED_COLUMNS, "cell_type"], "splits": splits}  # fmt: skip
    (folder / "store.json").write_text(json.dumps(about))
    return folder
