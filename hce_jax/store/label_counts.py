"""How many cells of each type a split has, from its column of labels alone."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc
import pyarrow.parquet as pq
from jaxtyping import Int

from hce_jax.errors import StoreError
from hce_jax.store.cells import CellSplit
from hce_jax.store.merlin import MerlinSplit
from hce_jax.store.schema import LABEL_COLUMN
from hce_jax.store.split import check_codes, n_readers


def label_counts(split: CellSplit | MerlinSplit) -> Int[np.ndarray, " c"]:
    """Count the cells of each type of a split.

    The expression is not read: of a cell store that is a hundredth of its bytes, of a published one less.

    Parameters
    ----------
    split
        Of an opened store.

    Raises
    ------
    StoreError
        If a file is damaged, or a code has no entry in the lookup of the types.

    Examples
    --------
    >>> label_counts(open_store("store").split("train"))  # doctest: +SKIP
    array([ 53024, 179310,  12377])
    """
    if isinstance(split, MerlinSplit):
        files, read = list(dict.fromkeys(part for part, _, _ in split.row_groups)), _parquet_labels
    else:
        files = [split.side.path / split.name / part.file for part in split.parts if part.cells]
        read = partial(_arrow_labels, column=split.columns.index(LABEL_COLUMN))

    def counts_of(file: Path) -> np.ndarray:
        counts = np.zeros(split.side.n_types, np.int64)
        try:
            for labels in read(file):
                check_codes(file, LABEL_COLUMN, labels.min().item(), labels.max().item(), split.side)
                counts += np.bincount(labels, minlength=len(counts))
        except (OSError, pa.ArrowException, ValueError) as error:
            raise StoreError(f"{file} is damaged: its labels cannot be read ({error})") from error
        return counts

    with ThreadPoolExecutor(n_readers()) as pool:
        return np.sum(list(pool.map(counts_of, files)), axis=0)


def _parquet_labels(file: Path) -> Iterator[np.ndarray]:
    """Give the labels of a part in the published format."""
    yield pq.ParquetFile(file).read([LABEL_COLUMN])[LABEL_COLUMN].to_numpy()


def _arrow_labels(file: Path, column: int) -> Iterator[np.ndarray]:
    """Give the labels of a part of a cell store, block by block."""
    options = ipc.IpcReadOptions(use_threads=False, included_fields=[column])
    with pa.OSFile(str(file)) as opened:
        reader = ipc.open_file(opened, options=options)
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number).column(0).to_numpy()
