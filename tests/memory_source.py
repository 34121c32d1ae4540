"""Cells with raw counts in memory, as a source of them: studies, donors and real types; counts tell cell and gene."""

import dataclasses
import itertools
import threading

import numpy as np
import pandas as pd
from scipy import sparse

from hce_jax.errors import SourceError
from hce_jax.preprocess.genes import align_genes
from hce_jax.store.cell_source import TERM_COLUMN, TEXT_COLUMNS, CellSource

N_GENES = 60
#: Label and id of each type.
TYPES = {
    "T cell": "CL:0000084",
    "CD4-positive, alpha-beta T cell": "CL:0000624",
    "CD8-positive, alpha-beta T cell": "CL:0000625",
    "B cell": "CL:0000236",
    "natural killer cell": "CL:0000623",
    "classical monocyte": "CL:0000860",
    "neuron": "CL:0000540",
    "hepatocyte": "CL:0000182",
}
#: Study: assay, tissue, tissue_general, donors.
STUDIES = {
    "late": ("10x 3' v3", "blood", "blood", 7),
    "blood 1": ("10x 3' v2", "venous blood", "blood", 4),
    "plates": ("Smart-seq2", "blood", "blood", 3),
    "liver": ("10x 5' v1", "caudate lobe of liver", "liver", 5),
    "Brain": ("10x 3' v3", "cortex", "brain", 6),
}


def many_cells(n_cells=600, seed=0):
    """Make obs, one study after the other; ``cell`` says which cell a row is, for its counts.

    Donors of different studies share names. A tenth of the cells is no primary data, some have no known type.
    """
    rng = np.random.default_rng(seed)
    study = np.sort(rng.integers(0, len(STUDIES), n_cells))
    about = [list(STUDIES.values())[number] for number in study]
    kind = rng.choice(len(TYPES) + 1, n_cells, p=[0.3, 0.2, 0.13, 0.12, 0.09, 0.06, 0.04, 0.04, 0.02])
    return pd.DataFrame(
        {
            "cell": 10_000 * seed + np.arange(n_cells),
            "soma_joinid": 1_000_000 + 3 * np.arange(n_cells),
            "is_primary_data": rng.random(n_cells) < 0.9,
            "dataset_id": [list(STUDIES)[number] for number in study],
            "donor_id": [f"D{rng.integers(donors)}" for *_, donors in about],
            "assay": [assay for assay, *_ in about],
            "cell_type": np.array([*TYPES, "unknown"])[kind],
            "development_stage": rng.choice(["adult stage", "80-year-old stage"], n_cells),
            "disease": rng.choice(["normal", "COVID-19"], n_cells),
            "tissue": [tissue for _, tissue, _, _ in about],
            "tissue_general": [general for _, _, general, _ in about],
            TERM_COLUMN: np.array([*TYPES.values(), "unknown"])[kind],
        }
    )


def genes_of(n_genes=N_GENES):
    """Make the genes of a source; every fifth codes for no protein."""
    return pd.DataFrame(
        {
            "feature_id": [f"ENSG{gene:011d}" for gene in range(n_genes)],
            "feature_name": [f"GENE{gene}" for gene in range(n_genes)],
            "feature_type": np.where(np.arange(n_genes) % 5 == 4, "lncRNA", "protein_coding"),
        }
    )


def counts_of(cells, n_genes=N_GENES):
    """Counts (n, g): genes 0 to 2 number the cell, of the others about two thirds are expressed, by cell and gene."""
    cells, genes = np.asarray(cells)[:, None], np.arange(n_genes)[None]
    expressed = (13 * cells + 7 * genes + cells // 11 * genes) % 3 > 0
    counts = np.where(expressed, 1 + (131 * cells + 37 * genes) % 89, 0)
    counts[:, :3] = 1 + cells // [1, 100, 10_000] % 100
    return counts


def cells_of(counts):
    """Read the cells' numbers back from their counts."""
    dense = counts.toarray() if sparse.issparse(counts) else np.asarray(counts)
    return (dense[:, :3].astype(int) - 1) @ [1, 100, 10_000]


@dataclasses.dataclass(eq=False)
class MemorySource(CellSource):
    """Cells in memory, which notes the rows that are read; one of the readings may fail.

    Attributes
    ----------
    obs
        As of :func:`many_cells`; the row of a cell is its place. Without TERM_COLUMN the source has none.
    genes_
        As of :func:`genes_of`; a gene's number is that of its id. The order is that of the columns of the counts.
    batch_sizes
        Cells of each batch of obs, again and again; 0 is an empty batch. Each batch has the categories of its cells.
    fails_at, error
        The reading of counts, from 0, that fails, and with what.
    """

    obs: pd.DataFrame
    genes_: pd.DataFrame = dataclasses.field(default_factory=genes_of)
    batch_sizes: tuple[int, ...] = (400, 0, 150)
    fails_at: int | None = None
    error: BaseException = dataclasses.field(default_factory=lambda: SourceError("cannot read memory: it forgot"))
    reads: list[list[int]] = dataclasses.field(default_factory=list)
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @property
    def title(self):
        return "memory"

    def about(self):
        return {"memory": len(self.obs), "last": int(self.obs["soma_joinid"].max())}

    def genes(self):
        return self.genes_.copy()

    def obs_batches(self):
        columns = [column for column in (*TEXT_COLUMNS, TERM_COLUMN) if column in self.obs]
        rows = self.obs.assign(row=np.arange(len(self.obs)))[["row", "soma_joinid", "is_primary_data", *columns]]
        sizes = itertools.cycle(self.batch_sizes)
        start = 0
        while start < len(rows):
            stop = start + next(sizes)
            yield rows.iloc[start:stop].astype(dict.fromkeys(columns, "category"))
            start = stop

    def align(self, gene_ids, gene_names):
        return {self.title: align_genes(list(self.genes_["feature_id"]), gene_ids, gene_names, self.title)}

    def read_counts(self, rows, alignments):
        assert (np.diff(rows) > 0).all(), "rows must ascend"
        with self._lock:
            self.reads.append(rows.tolist())
            if len(self.reads) - 1 == self.fails_at:
                raise self.error
        numbers = self.genes_["feature_id"].str[4:15].astype(int).to_numpy()
        counts = counts_of(self.obs["cell"].to_numpy()[rows], max(N_GENES, numbers.max() + 1))[:, numbers]
        return alignments[self.title].apply(sparse.csr_array(counts.astype(np.float32)))
