"""Stores of cells at rest: opening, reading block by block, and the built-in simulated atlas."""

from pathlib import Path

from hce_jax.errors import StoreError
from hce_jax.store.block import Block
from hce_jax.store.merlin import MerlinStore, Split
from hce_jax.store.schema import LABEL_COLUMN, SPLITS, SideFiles, read_side_files

__all__ = ["LABEL_COLUMN", "SPLITS", "Block", "MerlinStore", "SideFiles", "Split", "open_store"]


def open_store(path: str | Path) -> MerlinStore:
    """Open a store and check its side files.

    Parameters
    ----------
    path
        Folder of a store in the published merlin format.

    Raises
    ------
    StoreError, HierarchyError
        If the folder does not exist or a side file is absent, damaged, or does not agree with the others.

    Examples
    --------
    >>> store = open_store("store")  # doctest: +SKIP
    >>> store.side.n_genes, store.split("val").n_cells  # doctest: +SKIP
    (19331, 3500032)
    """
    path = Path(path)
    if not path.is_dir():
        problem = "is not a folder" if path.exists() else "does not exist"
        raise StoreError(f"the store {path} {problem}; set DATA_PATH to a store's folder")
    return MerlinStore(read_side_files(path))
