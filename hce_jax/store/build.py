"""Build a store from cells with raw counts: choose, shuffle, split, and write what goes with them."""

import dataclasses
import functools
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xxhash
from scipy import sparse

from hce_jax.errors import SourceError
from hce_jax.files import written_aside
from hce_jax.hierarchy.cell_ontology import CellOntology
from hce_jax.preprocess.genes import GeneAlignment
from hce_jax.preprocess.normalize import normalize_log1p
from hce_jax.store import cells, merlin_write
from hce_jax.store.augmentations import AugmentationOptions, Augmentations, augmentation_vectors
from hce_jax.store.block import PACKED_COLUMNS, VALUES, Block
from hce_jax.store.cell_source import UNKNOWN, CellSource, warn_of_few_genes
from hce_jax.store.gene_list import PROTEIN_CODING, gene_list
from hce_jax.store.merlin import MerlinStore
from hce_jax.store.packing import unpack
from hce_jax.store.schema import (
    AUGMENTATIONS_FILE,
    CATEGORICAL_COLUMNS,
    LABEL_COLUMN,
    SPLITS,
    STORE_FILE,
    read_side_files,
)
from hce_jax.store.selection import Rules, Selection, select_cells
from hce_jax.store.shuffle import CELLS_PER_CHUNK, CELLS_PER_PART, Shuffle, chunk_path
from hce_jax.store.split_cells import SplitTable, draw_splits
from hce_jax.store.summary import data_summary, write_summary
from hce_jax.store.threads import Tick, run_in_threads
from hce_jax.store.work_folder import SCRATCH, WorkFolder, named_in_errors, open_work_folder, refuse_existing

#: Kinds of stores that can be written.
FORMATS = (cells.FORMAT, "merlin")
_SUFFIX = {cells.FORMAT: "arrow", "merlin": "parquet"}
#: Integer columns of both kinds.
_COLUMNS = ("soma_joinid", "is_primary_data", *CATEGORICAL_COLUMNS, "idx")
_ORIGINALS = f"{SCRATCH}/originals.npy"
_NO_FILE = Path("/")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a store is to hold, given the cells; the defaults are those of the published store.

    Attributes
    ----------
    rules
        What cells and types must be.
    genes
        See :func:`hce_jax.store.gene_list.gene_list`.
    seed
        Of the splits and of the order of the cells.
    keep_copies
        Keep cells whose counts are those of another cell, as the published store does.
    format
        "cells" or "merlin".
    augmentations
        How the augmentation vectors are made; None: there are none.
    """

    rules: Rules = dataclasses.field(default_factory=Rules)
    genes: str = PROTEIN_CODING
    seed: int = 1
    keep_copies: bool = False
    format: str = cells.FORMAT
    augmentations: AugmentationOptions | None = dataclasses.field(default_factory=AugmentationOptions)


class Copies(NamedTuple):
    """Cells that are there once more: how many were found, and how many of them in another split than the first."""

    cells: int
    across_splits: int


@dataclasses.dataclass(frozen=True)
class Built:
    """A store that was built.

    Attributes
    ----------
    store
        Its folder.
    selection
        Which cells were chosen, and how.
    cells
        Cells of each split.
    copies
        Cells with the counts of another cell.
    empty, cells_as_values
        Cells without any expressed gene, and cells whose counts are not whole numbers, or too large.
    genes_found
        By file, or for the Census: how many of the store's genes it has.
    n_genes
        Genes of the store.
    untrained
        Types without a cell in train.
    notes
        What a person should know of the splits.
    augmentations
        What the augmentation vectors were made of; None if there are none.
    new_cells, seconds
        Cells that this call read, and the time that reading and shuffling took.
    """

    store: Path
    selection: Selection
    cells: dict[str, int]
    copies: Copies
    empty: int
    cells_as_values: int
    genes_found: dict[str, int]
    n_genes: int
    untrained: tuple[str, ...]
    notes: tuple[str, ...]
    augmentations: Augmentations | None
    new_cells: int
    seconds: float


def build_store(
    source: CellSource,
    destination: str | Path,
    recipe: Recipe | None = None,
    *,
    ontology: CellOntology | None = None,
    splits: SplitTable | None = None,
    workers: int = 2,
    cells_per_part: int = CELLS_PER_PART,
    cells_per_chunk: int = CELLS_PER_CHUNK,
) -> Built:
    """Build a store from a Census or from h5ad files.

    Counts are streamed: memory holds what is said of the cells, and ``workers`` chunks or parts of 32,768 cells. The
    cells of a split are in an order drawn uniformly from all orders (:mod:`hce_jax.store.shuffle`). An interrupted
    build is taken up by the same call.

    Parameters
    ----------
    source
        Where the cells are.
    destination
        Folder of the store. It appears when it is complete; until then the work lies in ``NAME.partial`` beside it,
        and takes twice the room of the store.
    recipe
        What it is to hold; as the published store if None.
    ontology
        Where types, their ancestors and the reachability matrix come from; the default release if None.
    splits
        The split of each cell; cells that it does not name are left out. None: donors of a study (tech_samples) are
        split 70/15/15, as published.
    workers
        Chunks and parts at a time, each by a thread.
    cells_per_part, cells_per_chunk
        Of the store, and of what is read at a time.

    Raises
    ------
    SourceError, OntologyError, StoreError
        If the source cannot be used, a type is not known, no cell is left, or the destination exists or cannot be
        written. What is finished is kept.

    Examples
    --------
    >>> with CensusSource("2023-05-15") as census:  # doctest: +SKIP
    ...     build_store(census, "atlas", Recipe(genes="features.parquet")).cells["train"]
    """
    destination = Path(destination)
    refuse_existing(destination)
    ontology = ontology or CellOntology.open()
    plan = _Plan.make(source, recipe or Recipe(), ontology, splits, cells_per_part, cells_per_chunk)
    started = time.perf_counter()
    sources = dict.fromkeys(plan.names, _NO_FILE)  # what the files are made from is a part of the settings
    with open_work_folder(destination, plan.settings(), sources) as work:
        new_cells, part_cells = _shuffle(plan, work, workers)
        seconds = time.perf_counter() - started
        with named_in_errors(work.store):
            built = _finish(plan, work, part_cells)
        work.publish(destination)
    return dataclasses.replace(built, store=destination, new_cells=new_cells, seconds=seconds)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What there is to do, before counts are read.

    Attributes
    ----------
    source, recipe, ontology, selection
        As given, and chosen.
    genes
        Of the store.
    alignments
        Of the source's genes.
    obs
        Of the selection, with the column ``split``.
    shuffle
        Where each cell goes.
    reach_cc, splits_from
        Reachability matrix, and what decided about the splits.
    reading
        Held by the thread that reads: a source uses several processors itself, and reading takes most memory.
    """

    source: CellSource
    recipe: Recipe
    ontology: CellOntology
    selection: Selection
    genes: pd.DataFrame
    alignments: dict[str, GeneAlignment]
    obs: pd.DataFrame
    shuffle: Shuffle
    reach_cc: np.ndarray
    splits_from: str
    reading: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    @staticmethod
    def make(
        source: CellSource,
        recipe: Recipe,
        ontology: CellOntology,
        splits: SplitTable | None,
        cells_per_part: int,
        cells_per_chunk: int,
    ) -> "_Plan":
        """Choose genes and cells, and draw splits and order."""
        genes = gene_list(recipe.genes, source)
        alignments = source.align(list(genes["feature_id"]), list(genes["feature_name"]))
        warn_of_few_genes(alignments)
        selection = select_cells(source, recipe.rules, ontology, splits)
        print(selection.report(), flush=True)
        obs = selection.obs
        splits_from = splits.name if splits else "a column of the source"
        if "split" not in obs:
            obs = obs.assign(split=draw_splits(obs["tech_sample"], recipe.seed))
            splits_from = "tech_sample"
        obs["split"] = obs["split"].cat.set_categories(list(SPLITS))
        split_n = obs["split"].cat.codes.to_numpy()
        if not (split_n == 0).any():
            raise SourceError(f"none of the {len(obs):,} cells that are left goes into train; a store needs some there")
        shuffle = Shuffle.draw(
            split_n, len(genes), recipe.seed, cells_per_part=cells_per_part, cells_per_chunk=cells_per_chunk
        )
        reach_cc = ontology.reachability(selection.cl_ids)
        return _Plan(source, recipe, ontology, selection, genes, alignments, obs, shuffle, reach_cc, splits_from)

    @functools.cached_property
    def chunk_names(self) -> list[str]:
        """Files of the first pass."""
        return [chunk_path(Path(SCRATCH), chunk).as_posix() for chunk in range(self.shuffle.n_chunks)]

    @property
    def names(self) -> list[str]:
        """All files that are made one by one; fewer parts where copies are dropped."""
        none = self.dropped(np.arange(len(self.obs)))
        return [*self.chunk_names, _ORIGINALS, *(name for name, _ in self.parts(none))]

    def parts(self, dropped_n: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """Name the parts of the store, with the numbers of their cells in order."""
        suffix = _SUFFIX[self.recipe.format]
        return [
            (f"{split}/part.{number}.{suffix}", cells_of_part)
            for code, split in enumerate(SPLITS)
            for number, cells_of_part in enumerate(self.shuffle.parts(code, dropped_n))
        ]

    def dropped(self, original_n: np.ndarray) -> np.ndarray:
        """Tell which cells are left out because another has the same counts, (n,) bool."""
        return (original_n != np.arange(len(original_n))) & (not self.recipe.keep_copies)

    def settings(self) -> dict[str, Any]:
        """Return what must be the same when the work is taken up again."""
        digest = xxhash.xxh3_64()
        for array in (self.obs["row"].to_numpy(), self.shuffle.split_n, self.shuffle.place_n):
            digest.update(np.ascontiguousarray(array).data)
        for column in CATEGORICAL_COLUMNS:
            digest.update(np.ascontiguousarray(self.obs[column].cat.codes.to_numpy()).data)
            digest.update("\n".join(self.obs[column].cat.categories).encode())
        digest.update("\n".join(self.genes["feature_id"]).encode())
        return {
            "source": self.source.about(),
            "format": self.recipe.format,
            "seed": self.recipe.seed,
            "keep_copies": self.recipe.keep_copies,
            "cells_per_part": self.shuffle.cells_per_part,
            "cells_per_chunk": self.shuffle.cells_per_chunk,
            "choice of cells and genes (rules, splits, ontology)": {"xxh3_64": digest.hexdigest()},
        }

    def read(self, numbers: np.ndarray) -> Block:
        """Read and pack the cells with these numbers."""
        rows = self.obs["row"].to_numpy()[numbers]
        with self.reading:
            counts = self.source.read_counts(rows, self.alignments)
        return Block.of_counts(counts, {})

    def columns(self, numbers: np.ndarray, first_idx: int) -> dict[str, np.ndarray]:
        """Return the integer columns of these cells, of which the first has this place in its split."""
        obs = self.obs.iloc[numbers]
        codes = {name: obs[name].cat.codes.to_numpy(np.int64) for name in CATEGORICAL_COLUMNS}
        ids = {name: obs[name].to_numpy(np.int64) for name in ("soma_joinid", "is_primary_data")}
        return ids | codes | {"idx": first_idx + np.arange(len(numbers))}


def _shuffle(plan: _Plan, work: WorkFolder, workers: int) -> tuple[int, dict[str, np.ndarray]]:
    """Make the chunks and then the parts; return the cells that were read now, and the cells of each part."""
    finished = work.finished()
    missing = [] if _ORIGINALS in finished else [name for name in plan.chunk_names if name not in finished]
    number = {name: chunk for chunk, name in enumerate(plan.chunk_names)}
    scratch = work.path / SCRATCH

    def make_chunk(name: str, tick: Tick) -> None:
        work.finish(name, lambda path: plan.shuffle.write_chunk(number[name], path, plan.read, tick))

    new_cells = sum(len(plan.shuffle.chunk_cells(number[name])) for name in missing)
    total = len(plan.obs)
    run_in_threads("read", make_chunk, missing, workers, done=total - new_cells, total=total)
    if _ORIGINALS not in finished:
        work.finish(_ORIGINALS, lambda path: _save(path, plan.shuffle.originals(scratch)))
    parts = dict(plan.parts(plan.dropped(np.load(work.place(_ORIGINALS)))))
    missing = [name for name in parts if name not in finished]

    def make_part(name: str, tick: Tick) -> None:
        work.finish(name, lambda path: _write_part(plan, name, parts[name], scratch, path))
        tick(len(parts[name]))

    total = sum(map(len, parts.values()))
    n_missing = sum(len(parts[name]) for name in missing)
    run_in_threads("shuffle", make_part, missing, workers, done=total - n_missing, total=total)
    return new_cells, parts


def _save(path: Path, array: np.ndarray) -> dict[str, Any]:
    with written_aside(path) as aside:
        np.save(aside, array)
        return {"bytes": aside.stat().st_size}


def _write_part(plan: _Plan, name: str, numbers: np.ndarray, scratch: Path, path: Path) -> dict[str, Any]:
    first_idx = int(name.split(".")[1]) * plan.shuffle.cells_per_part
    block = plan.shuffle.read_part(numbers, scratch).with_columns(plan.columns(numbers, first_idx))
    if plan.recipe.format == cells.FORMAT:
        return dataclasses.asdict(cells.write_part(path, [block]))
    with written_aside(path) as aside:
        merlin_write.write_part(aside, _row_groups(block))
        return {"cells": len(block), "bytes": aside.stat().st_size}


def _row_groups(block: Block) -> Iterator[tuple[sparse.csr_array, pd.DataFrame]]:
    """Give the row groups of a part, with the expression that follows from the counts in float64, as published."""
    size = merlin_write.ROWS_PER_GROUP
    for start in range(0, len(block), size):
        group = block.slice(start, min(start + size, len(block)))
        x = normalize_log1p(group.counts) + unpack(group.stream(VALUES), group.n_genes)
        obs = pd.DataFrame({name: group.column(name) for name in _COLUMNS})
        yield x, obs.astype({"is_primary_data": bool})


def _finish(plan: _Plan, work: WorkFolder, parts: dict[str, np.ndarray]) -> Built:
    """Write what goes with the cells, and say what was made."""
    finished, original_n = work.finished(), np.load(work.place(_ORIGINALS))
    obs = plan.obs[~plan.dropped(original_n)]
    types = obs[LABEL_COLUMN].cat
    train_c = np.bincount(types.codes[obs["split"] == SPLITS[0]], minlength=len(types.categories))
    built = Built(
        store=work.store,
        selection=plan.selection,
        cells={split: sum(len(part) for name, part in parts.items() if name.startswith(split)) for split in SPLITS},
        copies=_count_copies(plan.shuffle.split_n, original_n),
        **_count_odd(plan, finished),
        genes_found={title: alignment.n_found for title, alignment in plan.alignments.items()},
        n_genes=len(plan.genes),
        untrained=tuple(types.categories[train_c == 0]),
        notes=tuple(_notes_on_splits(obs)),
        augmentations=None,
        new_cells=0,
        seconds=0.0,
    )
    merlin_write.write_side_files(
        work.store,
        plan.genes,
        {column: list(obs[column].cat.categories) for column in CATEGORICAL_COLUMNS},
        class_weights=_balanced(train_c),
        child_matrix=plan.reach_cc,
        cl_ids=plan.selection.cl_ids,
    )
    write_summary(work.store, data_summary(obs))
    (work.store / AUGMENTATIONS_FILE).unlink(missing_ok=True)  # of an earlier attempt, maybe with other numbers
    records = {name: finished[name] for name in parts}
    _write_about(plan, work.store, built, records)
    if plan.recipe.augmentations is None:
        return built
    built = dataclasses.replace(built, augmentations=_augment(plan.recipe, plan.recipe.augmentations, work))
    _write_about(plan, work.store, built, records)
    return built


def _augment(recipe: Recipe, options: AugmentationOptions, work: WorkFolder) -> Augmentations:
    """Make the augmentation vectors, from the store as it lies."""
    kind = cells.CellStore if recipe.format == cells.FORMAT else MerlinStore
    train = kind(read_side_files(work.store)).split(SPLITS[0])
    made = augmentation_vectors(train, options, scratch=work.path / SCRATCH)
    if len(made.vectors):
        _save(work.store / AUGMENTATIONS_FILE, made.vectors)
    return made


def _count_odd(plan: _Plan, finished: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Count the cells without expressed genes, and those kept as values."""
    chunks = [finished[name] for name in plan.chunk_names]
    empty, as_values = (sum(chunk[key] for chunk in chunks) for key in ("empty", "cells_as_values"))
    if empty == len(plan.obs):
        raise SourceError(f"none of the {empty:,} cells expresses any of the {len(plan.genes):,} genes of the store")
    return {"empty": empty, "cells_as_values": as_values}


def _notes_on_splits(obs: pd.DataFrame) -> Iterator[str]:
    empty = [split for split in SPLITS if not (obs["split"] == split).any()]
    if empty:
        yield f"no cell goes into {' and '.join(empty)}; train.py needs val, evaluate.py --split id needs test"
    donors = obs["donor_id"].cat
    unnamed = int((obs["donor_id"] == UNKNOWN).sum())
    if unnamed:
        yield f"{unnamed:,} cells have no donor; they count as one donor of their study"
    pairs = np.unique(donors.codes.to_numpy(np.int64) * len(SPLITS) + obs["split"].cat.codes.to_numpy())
    several = int((np.bincount(pairs // len(SPLITS)) > 1).sum())
    if several:
        yield (
            f"{several:,} donor_id lie in more than one split, in different studies; if they are the same people, say "
            "which goes where by donor_id (--splits)"
        )


def _balanced(cells_c: np.ndarray) -> np.ndarray:
    """Weigh types as scikit-learn's "balanced" does, n / (types * cells of the type); 0 for a type without cells."""
    present = cells_c > 0
    return np.where(present, cells_c.sum() / (present.sum() * np.maximum(cells_c, 1)), 0.0)


def _count_copies(split_n: np.ndarray, original_n: np.ndarray) -> Copies:
    copies = np.flatnonzero(original_n != np.arange(len(original_n)))
    return Copies(len(copies), int((split_n[copies] != split_n[original_n[copies]]).sum()))


def _write_about(plan: _Plan, folder: Path, built: Built, records: dict[str, dict[str, Any]]) -> None:
    """Write store.json."""
    recipe = plan.recipe
    of_split = {split: [about for name, about in records.items() if name.startswith(split)] for split in SPLITS}
    splits = {split: {"cells": built.cells[split], "parts": parts} for split, parts in of_split.items() if parts}
    about = {
        "format": recipe.format,
        "source": plan.source.about(),
        "source_datasets": list(plan.selection.datasets),
        "ontology_release": plan.ontology.release,
        "ontology_source": plan.ontology.source,
        "rules": dataclasses.asdict(recipe.rules),
        "cells_left": [step._asdict() for step in plan.selection.steps],
        "mapped_types": [dataclasses.asdict(each) for each in plan.selection.mapped],
        "genes": {"list": Path(recipe.genes).name, "found": built.genes_found},
        "splits_from": plan.splits_from,
        "seed": recipe.seed,
        "copies": {**built.copies._asdict(), "kept": recipe.keep_copies},
        "cells_without_genes": built.empty,
        "cells_as_values": built.cells_as_values,
        "augmentations": recipe.augmentations and dataclasses.asdict(recipe.augmentations),
        "splits": splits,
    }
    if recipe.format == cells.FORMAT:
        about |= {
            "format_version": cells.FORMAT_VERSION,
            "block_size": cells.BLOCK_SIZE,
            "columns": [*PACKED_COLUMNS, *_COLUMNS],
            "side_files": dict(_side_files(folder)),
        }
    with written_aside(folder / STORE_FILE) as aside:
        aside.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _side_files(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] not in (*SPLITS, STORE_FILE):
            yield name.as_posix(), {"bytes": path.stat().st_size, "xxh3_64": cells.checksum(path)}
