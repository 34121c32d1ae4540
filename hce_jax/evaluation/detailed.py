"""What was predicted for every cell: a parquet file, written while cells are predicted."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hce_jax.evaluation.cells import JOINID
from hce_jax.files import written_aside
from hce_jax.store import LABEL_COLUMN, Block
from hce_jax.store.work_folder import named_in_errors
from hce_jax.typing import Float, Int

#: Text columns of the file that are not the label, in the published order.
_TEXTS = ("assay", "dataset_id", "donor_id", "development_stage", "disease", "tissue", "tissue_general")
#: Cells of a row group: some 20 MB with 164 types.
_ROW_GROUP = 32_768
#: The type of a cell for which a decoder finds none.
UNASSIGNED_LABEL = "unassigned"


class DetailedResults:
    """Writes ``{model}_detailed_results.parquet``, row group by row group.

    Columns, as published: ``y_true`` and ``y_pred`` (labels; the prediction is not corrected), ``cell_type`` (the label
    again), ``soma_joinid``, what is said of the cell, ``y_probs`` (the probabilities of all types, float32).

    It appears under its name when the ``with`` block ends without an error.

    Parameters
    ----------
    path
        The file.
    labels
        Names of the types.
    lookups
        Texts of the codes of the other columns.

    Raises
    ------
    StoreError
        From every method, if it cannot be written.

    Examples
    --------
    >>> with DetailedResults(path, side.labels, cells.lookups) as file:  # doctest: +SKIP
    ...     file.add(batch.block, codes, batch.probabilities[0])
    """

    def __init__(self, path: Path, labels: Sequence[str], lookups: Mapping[str, tuple[str, ...]]):
        self._path = path
        self._labels = pa.array([*labels, UNASSIGNED_LABEL], pa.string())
        self._texts = {name: pa.array(lookups[name], pa.string()) for name in _TEXTS}
        coded = ["y_true", "y_pred", LABEL_COLUMN, *_TEXTS]
        fields: list[tuple[str, pa.DataType]] = [(name, pa.string()) for name in coded]
        fields.insert(3, (JOINID, pa.int64()))
        self._schema = pa.schema([*fields, ("y_probs", pa.list_(pa.float32()))])
        self._waiting: list[pa.RecordBatch] = []
        with ExitStack() as stack:
            aside = stack.enter_context(written_aside(path))
            # Probabilities are noise: neither a dictionary nor a compressor would make them smaller.
            packed = dict.fromkeys(coded, "zstd")
            with named_in_errors(path):
                self._writer = pq.ParquetWriter(aside, self._schema, compression=packed, use_dictionary=coded)
            self._stack = stack.pop_all()

    def add(self, block: Block, predictions: Int[np.ndarray, "n"], probabilities: Float[np.ndarray, "n c"]) -> None:
        """Write some cells: their columns, predicted codes (-1: unassigned), and probabilities."""
        n_cells, n_types = probabilities.shape
        true = self._labels.take(pa.array(block.column(LABEL_COLUMN)))
        predicted = self._labels.take(pa.array(predictions % (n_types + 1)))
        texts = [values.take(pa.array(block.column(name))) for name, values in self._texts.items()]
        starts = pa.array(np.arange(n_cells + 1, dtype=np.int32) * n_types)
        values = pa.array(np.ascontiguousarray(probabilities, np.float32).ravel())
        lists = pa.ListArray.from_arrays(starts, values)
        columns = [true, predicted, true, pa.array(block.column(JOINID)), *texts, lists]
        self._waiting.append(pa.RecordBatch.from_arrays(columns, schema=self._schema))
        if sum(map(len, self._waiting)) >= _ROW_GROUP:
            self._write()

    def __enter__(self) -> "DetailedResults":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if kind is not None:
            with suppress(OSError):  # else it would be closed when it is collected, and complain then
                self._writer.close()
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            if self._waiting:
                self._write()
            with named_in_errors(self._path):
                self._writer.close()

    def _write(self) -> None:
        table = pa.Table.from_batches(self._waiting)
        self._waiting = []
        with named_in_errors(self._path):
            self._writer.write_table(table, row_group_size=len(table))
