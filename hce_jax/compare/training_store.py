"""The store that the compared runs were trained on."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hce_jax.compare.trained import TrainedRun
from hce_jax.errors import CheckpointError, StoreError
from hce_jax.store import Store, open_store
from hce_jax.store.label_counts import label_counts
from hce_jax.typing import Int


def training_store(runs: Sequence[TrainedRun], data_path: Path | None = None) -> Store | None:
    """Open the store that all runs were trained on; None if it is not there.

    Parameters
    ----------
    runs
        All of the same types.
    data_path
        Where it is, if not where their configurations say.

    Raises
    ------
    CheckpointError
        If they were trained on stores that differ, or that are not all there to be looked at.
    StoreError
        If it cannot be read, or has other types than the runs.

    Examples
    --------
    >>> training_store(comparison.runs).side.title  # doctest: +SKIP
    'store'
    """
    if data_path is not None and not data_path.is_dir():
        raise StoreError(f"--data-path={data_path}: there is no such folder; name the store the runs were trained on")
    if data_path is not None:
        return _checked_store(data_path, runs[0])
    first_of: dict[Path, TrainedRun] = {}
    for each in runs:
        first_of.setdefault(Path(each.config["data_path"]), each)
    if len(first_of) == 1 and not next(iter(first_of)).is_dir():
        return None
    stores = {}
    for path, run in first_of.items():
        if not path.is_dir():
            raise CheckpointError(
                f"the runs were trained on stores in {len(first_of)} places, and that of {run.folder}, {path}, is not "
                "there, so that it cannot be told whether they are the same; if they are, name it: --data-path STORE"
            )
        stores[run.folder] = _checked_store(path, run)
    (folder, store), *others = stores.items()
    cells = [training_cells(each) for each in stores.values()] if others else []
    for (other_folder, other), theirs in zip(others, cells[1:], strict=True):
        if store.side.gene_ids != other.side.gene_ids or not np.array_equal(cells[0], theirs):
            raise CheckpointError(
                f"{folder} was trained on {store.side.path} and {other_folder} on {other.side.path}, which have other "
                "genes or training cells; compare runs of one store"
            )
    return store


def _checked_store(path: Path, run: TrainedRun) -> Store:
    """Open a store and check that its types are those of a run."""
    store, counts = open_store(path), run.counts["id"]
    if store.side.labels != counts.labels or not np.array_equal(store.side.reachability, counts.reachability):
        raise StoreError(
            f"the store {path} has other cell types, or another hierarchy, than the run {run.folder}, which was not "
            "trained on it as it is; name the store that it was trained on: --data-path STORE"
        )
    return store


def training_cells(store: Store, sub_sample_frac: float = 1.0) -> Int[np.ndarray, " c"]:
    """Count the training cells of each type, of so large a share of the parts.

    Raises
    ------
    StoreError
        As :func:`hce_jax.store.label_counts.label_counts`.

    Examples
    --------
    >>> training_cells(store)  # doctest: +SKIP
    array([ 53024, 179310,  12377])
    """
    return label_counts(store.split("train", sub_sample_frac))
