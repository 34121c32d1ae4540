"""The names that a store consists of, and the side files that every kind of store shares."""

import dataclasses
import json
from collections import Counter
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from hce_jax.errors import StoreError
from hce_jax.hierarchy import validate_reachability

SPLITS = ("train", "val", "test")

#: The column that holds a cell's expression, and the column of its label.
EXPRESSION_COLUMN = "X"
LABEL_COLUMN = "cell_type"

#: Columns of integer codes, each with a table ``categorical_lookup/<column>.parquet`` (column "label", row = code).
CATEGORICAL_COLUMNS = (
    "cell_type",
    "dataset_id",
    "donor_id",
    "assay",
    "development_stage",
    "disease",
    "tissue",
    "tissue_general",
    "tech_sample",
)

VAR_FILE = "var.parquet"
LOOKUP_FOLDER = "categorical_lookup"
CLASS_WEIGHTS_FILE = "class_weights.npy"
AUGMENTATIONS_FILE = "augmentations.npy"
CHILD_MATRIX_FILE = "cell_type_hierarchy/child_matrix.npy"
STORE_FILE = "store.json"


def read_table(path: Path, columns: list[str]) -> pd.DataFrame:
    """Read a small parquet table and check that it has the columns.

    Raises
    ------
    StoreError
        If the file is absent, damaged, or lacks a column.

    Examples
    --------
    >>> read_table(Path("store/var.parquet"), ["feature_id", "feature_name"])  # doctest: +SKIP
    """
    if not path.is_file():
        raise StoreError(f"{path} does not exist; a store needs it")
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} is not a readable parquet file ({error})") from error
    missing = [column for column in columns if column not in table.columns]
    if missing:
        raise StoreError(f"{path} lacks the column {missing[0]!r}; it has {', '.join(map(str, table.columns))}")
    empty = [column for column in columns if table[column].isna().any()]
    if empty:
        raise StoreError(f"{path} has an empty entry in the column {empty[0]!r}")
    return table


def read_array(path: Path) -> np.ndarray:
    """Read a ``.npy`` file.

    Raises
    ------
    StoreError
        If the file is absent or damaged, or holds something else than numbers.

    Examples
    --------
    >>> read_array(Path("store/class_weights.npy"))  # doctest: +SKIP
    """
    if not path.is_file():
        raise StoreError(f"{path} does not exist; a store needs it")
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise StoreError(f"{path} is not a readable .npy file of numbers") from error
    if array.dtype.kind not in "biuf":
        raise StoreError(f"{path} holds no numbers: its type is {array.dtype}")
    return array


@dataclasses.dataclass(frozen=True)
class SideFiles:
    """What lies beside the splits of a store: genes, cell types, hierarchy, weights.

    Attributes
    ----------
    path
        The store's folder.
    gene_ids, gene_names
        One per gene, in the order of the columns of X.
    labels
        Cell type labels; the position is the code.
    cl_ids
        Cell Ontology ids of the labels, or None where the store does not record them (the published one does not).
    reachability
        R (c, c) float32.
    about
        What store.json says, empty for a store that has none (the published one).
    """

    path: Path
    gene_ids: tuple[str, ...]
    gene_names: tuple[str, ...]
    labels: tuple[str, ...]
    cl_ids: tuple[str, ...] | None
    reachability: Float[np.ndarray, "c d"]
    about: dict[str, Any]

    @property
    def n_genes(self) -> int:
        """Number of genes G."""
        return len(self.gene_ids)

    @property
    def n_types(self) -> int:
        """Number of cell types C."""
        return len(self.labels)

    def class_weights(self, filename: str = CLASS_WEIGHTS_FILE) -> Float[np.ndarray, "c"]:
        """Read the training weight of each type, (c,) float32.

        Raises
        ------
        StoreError
            If the file is absent, of the wrong size, or holds a negative or non-finite weight.
        """
        path = self.path / filename
        weights = read_array(path).astype(np.float32)
        if weights.shape != (self.n_types,):
            raise StoreError(f"{path} has shape {weights.shape}, but the store has {self.n_types} cell types")
        if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
            raise StoreError(f"{path} holds a negative or non-finite weight, or only zeros")
        return weights

    def augmentations(self) -> Float[np.ndarray, "a g"]:
        """Read the augmentation vectors, (n, g) float32.

        Raises
        ------
        StoreError
            If the file is absent, holds no vectors, vectors of another length than the number of genes, or a
            non-finite value.
        """
        path = self.path / AUGMENTATIONS_FILE
        if not path.is_file():
            raise StoreError(f"{path} does not exist; train without: --config.augment_training_data=false")
        vectors = read_array(path)
        if not vectors.size:
            raise StoreError(f"{path} holds no vectors; make some, or pass --config.augment_training_data=false")
        if vectors.ndim != 2 or vectors.shape[1] != self.n_genes:
            raise StoreError(f"{path} has shape {vectors.shape}, but the store has {self.n_genes} genes")
        if not np.isfinite(vectors).all():
            raise StoreError(f"{path} holds a non-finite value")
        return vectors.astype(np.float32)

    @cached_property
    def lookup_sizes(self) -> dict[str, int]:
        """Number of codes of each categorical column that has a lookup table."""
        folder = self.path / LOOKUP_FOLDER
        present = [column for column in CATEGORICAL_COLUMNS if (folder / f"{column}.parquet").is_file()]
        return {column: len(self.lookup(column)) for column in present}

    def lookup(self, column: str) -> tuple[str, ...]:
        """Read the labels of a categorical column; the position is the code.

        Raises
        ------
        StoreError
            If the table is absent or damaged.
        """
        table = read_table(self.path / LOOKUP_FOLDER / f"{column}.parquet", ["label"])
        return tuple(table["label"].astype(str))


def read_side_files(path: Path) -> SideFiles:
    """Read and check the side files of a store.

    Raises
    ------
    StoreError, HierarchyError
        If one is absent, damaged, or does not agree with the others.

    Examples
    --------
    >>> read_side_files(Path("store")).n_types  # doctest: +SKIP
    164
    """
    var = read_table(path / VAR_FILE, ["feature_id", "feature_name"])
    gene_ids = tuple(var["feature_id"].astype(str))
    if not gene_ids:
        raise StoreError(f"{path / VAR_FILE} names no genes")
    types = read_table(path / LOOKUP_FOLDER / f"{LABEL_COLUMN}.parquet", ["label"])
    labels = tuple(types["label"].astype(str))
    for name, values in ((VAR_FILE, gene_ids), (f"{LOOKUP_FOLDER}/{LABEL_COLUMN}.parquet", labels)):
        repeated = [value for value, count in Counter(values).items() if count > 1]
        if repeated:
            raise StoreError(f"{path / name} names {repeated[0]!r} more than once; each must be there once")
    child_matrix = path / CHILD_MATRIX_FILE
    return SideFiles(
        path=path,
        gene_ids=gene_ids,
        gene_names=tuple(var["feature_name"].astype(str)),
        labels=labels,
        cl_ids=tuple(types["cl_id"].astype(str)) if "cl_id" in types.columns else None,
        reachability=validate_reachability(read_array(child_matrix), labels, where=str(child_matrix)),
        about=_read_about(path / STORE_FILE),
    )


def _read_about(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{path} is not a readable JSON object ({error})") from error
