"""Stores of cells at rest: opening, reading block by block, converting, and the built-in simulated atlas."""

from pathlib import Path

from hce_jax.errors import StoreError
from hce_jax.store.block import Block
from hce_jax.store.cells import FORMAT, CellStore
from hce_jax.store.convert import Conversion, convert
from hce_jax.store.held import HeldSplit, hold
from hce_jax.store.merlin import MerlinStore
from hce_jax.store.schema import LABEL_COLUMN, SPLITS, STORE_FILE, SideFiles, read_side_files
from hce_jax.store.split import Entries, Split

__all__ = [
    "LABEL_COLUMN",
    "SPLITS",
    "Block",
    "CellStore",
    "Conversion",
    "Entries",
    "HeldSplit",
    "MerlinStore",
    "SideFiles",
    "Split",
    "Store",
    "convert",
    "hold",
    "open_store",
]

Store = CellStore | MerlinStore


def open_store(path: str | Path) -> Store:
    """Open a store of either kind and check its side files.

    Parameters
    ----------
    path
        Folder of a cell store, or of a store in the published merlin format.

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
        raise StoreError(f"the store {path} {problem}; set DATA_PATH, or name it as STORE, to a store's folder")
    if not (path / STORE_FILE).is_file() and any(path.glob("*/part.*.arrow")):
        raise StoreError(
            f"{path / STORE_FILE} does not exist, but a cell store needs it; take it from a copy of the store"
        )
    side = read_side_files(path)
    kind = side.about.get("format", "merlin")  # the published store says nothing
    if kind not in (FORMAT, "merlin"):
        raise StoreError(
            f"{path / STORE_FILE} has the format {kind!r}, which this hce_jax does not know; install a newer one"
        )
    if kind == "merlin":
        return MerlinStore(side)
    store = CellStore(side)
    store.check_meaning()
    return store
