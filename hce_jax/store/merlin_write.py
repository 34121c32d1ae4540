"""Write a store in the merlin format: the published layout of dense parquet parts and side files."""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from hce_jax.errors import StoreError
from hce_jax.store.schema import (
    AUGMENTATIONS_FILE,
    CATEGORICAL_COLUMNS,
    CHILD_MATRIX_FILE,
    CLASS_WEIGHTS_FILE,
    EXPRESSION_COLUMN,
    LABEL_COLUMN,
    LOOKUP_FOLDER,
    VAR_FILE,
)

#: Cells of a part and of a row group, as published.
ROWS_PER_PART, ROWS_PER_GROUP = 32_768, 1_024

PART_SCHEMA = pa.schema(
    [
        (EXPRESSION_COLUMN, pa.list_(pa.float32())),
        ("soma_joinid", pa.int64()),
        ("is_primary_data", pa.bool_()),
        *((column, pa.int64()) for column in CATEGORICAL_COLUMNS),
        ("idx", pa.int64()),
    ]
)


@contextmanager
def complete_or_absent(destination: Path) -> Iterator[Path]:
    """Give a folder beside ``destination`` to write into, and rename it to ``destination`` when the block ends well.

    When the block raises, the folder is removed: a half-written store never has the final name.

    Parameters
    ----------
    destination
        The folder to be; must not exist. Missing parents are made.

    Yields
    ------
    Path
        The folder to write into: the same parent, name + ``.partial-<pid>``.

    Raises
    ------
    StoreError
        If ``destination`` exists, at the beginning or at the end.

    Examples
    --------
    >>> import tempfile
    >>> destination = Path(tempfile.mkdtemp()) / "store"
    >>> with complete_or_absent(destination) as folder:
    ...     _ = (folder / "var.parquet").write_bytes(b"")
    >>> [path.name for path in destination.iterdir()]
    ['var.parquet']
    """
    partial = destination.with_name(f"{destination.name}.partial-{os.getpid()}")
    _refuse_existing(destination)
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had the same number
    partial.mkdir(parents=True)
    try:
        yield partial
        _refuse_existing(destination)  # another process may have been quicker
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _refuse_existing(destination: Path) -> None:
    if destination.exists():
        raise StoreError(f"{destination} exists already; remove it or name another folder")


def write_split(
    folder: Path,
    x: sparse.csr_array | sparse.csr_matrix,
    obs: pd.DataFrame,
    rows_per_part: int = ROWS_PER_PART,
    rows_per_group: int = ROWS_PER_GROUP,
) -> None:
    """Write the cells of one split as ``part.0.parquet``, ``part.1.parquet``, ...

    Each row group is made dense by itself, so memory holds one row group of dense values at a time. The column ``idx``
    counts the rows of the split from 0.

    Parameters
    ----------
    folder
        The split's folder, e.g. ``store/train``; made when missing.
    x
        The sf-log1p values, (cells, genes).
    obs
        One row per cell in the order of ``x``: integer codes in every categorical column, ``soma_joinid`` and
        ``is_primary_data``.
    rows_per_part
        Cells in a part; the last part may have fewer. A multiple of ``rows_per_group``.
    rows_per_group
        Cells in a row group; the last group of a part may have fewer.

    Raises
    ------
    ValueError
        If ``obs`` has another number of rows than ``x``.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> obs = pd.DataFrame({column: [0, 0, 0] for column in CATEGORICAL_COLUMNS})
    >>> obs = obs.assign(soma_joinid=[7, 8, 9], is_primary_data=True)
    >>> write_split(folder, sparse.csr_array(np.eye(3)), obs, rows_per_part=2, rows_per_group=2)
    >>> sorted(path.name for path in folder.iterdir())
    ['part.0.parquet', 'part.1.parquet']
    """
    n_cells = x.shape[0]
    if len(obs) != n_cells:
        raise ValueError(f"obs has {len(obs)} rows, x has {n_cells}")
    folder.mkdir(parents=True, exist_ok=True)
    obs = obs.assign(idx=np.arange(n_cells))
    for part, part_start in enumerate(range(0, n_cells, rows_per_part)):
        starts = range(part_start, min(part_start + rows_per_part, n_cells), rows_per_group)
        ends = [min(start + rows_per_group, part_start + rows_per_part, n_cells) for start in starts]
        groups = ((x[start:end], obs[start:end]) for start, end in zip(starts, ends, strict=True))
        write_part(folder / f"part.{part}.parquet", groups)


def write_part(path: Path, groups: Iterable[tuple[sparse.csr_array | sparse.csr_matrix, pd.DataFrame]]) -> None:
    """Write one part of a split, row group by row group; see :func:`write_split`, which writes them all.

    Parameters
    ----------
    path
        The file.
    groups
        For each row group its sf-log1p values, (cells, genes), and one row per cell with the columns of
        :data:`PART_SCHEMA` other than X.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "part.0.parquet"
    >>> obs = pd.DataFrame({field.name: [0, 0] for field in list(PART_SCHEMA)[1:]}).astype({"is_primary_data": bool})
    >>> write_part(path, [(sparse.csr_array(np.eye(2)), obs), (sparse.csr_array(np.eye(2)), obs)])
    >>> pq.ParquetFile(path).num_row_groups
    2
    """
    with pq.ParquetWriter(path, PART_SCHEMA) as writer:
        for x, obs in groups:
            writer.write_table(_row_group(x, obs))


def _row_group(x: sparse.csr_array | sparse.csr_matrix, obs: pd.DataFrame) -> pa.Table:
    n_cells, n_genes = x.shape
    values = pa.array(x.toarray().astype(np.float32, copy=False).reshape(-1))
    ends = pa.array(np.arange(n_cells + 1, dtype=np.int32) * n_genes)
    columns = [pa.ListArray.from_arrays(ends, values)]
    columns += [pa.array(obs[field.name].to_numpy(), type=field.type) for field in list(PART_SCHEMA)[1:]]
    return pa.Table.from_arrays(columns, schema=PART_SCHEMA)


def write_side_files(
    folder: Path,
    genes: pd.DataFrame,
    lookups: Mapping[str, Sequence[str]],
    *,
    class_weights: np.ndarray,
    child_matrix: np.ndarray,
    augmentations: np.ndarray | None = None,
    cl_ids: Sequence[str] | None = None,
) -> None:
    """Write what every split shares: genes, the tables of codes, class weights, hierarchy, augmentation vectors.

    Parameters
    ----------
    folder
        The store's folder.
    genes
        Columns ``feature_id`` and ``feature_name``, one row per column of X, in its order.
    lookups
        For each categorical column the labels, in the order of their codes.
    class_weights
        One weight per cell type, (types,); written as float64.
    child_matrix
        The reachability matrix, (types, types): [i, j] is 1 when j is i or a descendant of i; written as float64.
    augmentations
        Augmentation vectors on the sf-log1p scale, (vectors, genes); written as float32. None: no such file.
    cl_ids
        The Cell Ontology id of each cell type, in the order of their codes: column ``cl_id`` beside ``label``.
        Published stores do not have it.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> genes = pd.DataFrame({"feature_id": ["ENSG00000010610"], "feature_name": ["CD4"]})
    >>> lookups = {"cell_type": ["B cell", "T cell"]}
    >>> write_side_files(folder, genes, lookups, class_weights=np.ones(2), child_matrix=np.eye(2))
    >>> pq.read_table(folder / "categorical_lookup" / "cell_type.parquet")["label"].to_pylist()
    ['B cell', 'T cell']
    """
    for path in (folder / LOOKUP_FOLDER, (folder / CHILD_MATRIX_FILE).parent):
        path.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({name: list(genes[name]) for name in ("feature_id", "feature_name")}), folder / VAR_FILE)
    for column, labels in lookups.items():
        table = {"label": list(labels)}
        if column == LABEL_COLUMN and cl_ids is not None:
            table["cl_id"] = list(cl_ids)
        pq.write_table(pa.table(table), folder / LOOKUP_FOLDER / f"{column}.parquet")
    np.save(folder / CLASS_WEIGHTS_FILE, class_weights.astype(np.float64))
    np.save(folder / CHILD_MATRIX_FILE, child_matrix.astype(np.float64))
    if augmentations is not None:
        np.save(folder / AUGMENTATIONS_FILE, augmentations.astype(np.float32))
