"""Cells of studies that a store does not know, kept as h5ad files with raw counts, to evaluate models on."""

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import h5py
import numpy as np
import pandas as pd
import xxhash
from anndata.io import sparse_dataset, write_elem
from scipy import sparse

from hce_jax.errors import SourceError, StoreError
from hce_jax.files import written_aside
from hce_jax.hierarchy.cell_ontology import CellOntology
from hce_jax.preprocess.genes import GeneAlignment
from hce_jax.store.cell_source import TERM_COLUMN, TEXT_COLUMNS, CellSource, warn_of_few_genes
from hce_jax.store.schema import LABEL_COLUMN, SideFiles
from hce_jax.store.selection import Rules, Step, Steps, joined, refuse_unknown
from hce_jax.store.threads import Tick, run_in_threads
from hce_jax.store.type_matching import TypeMatcher
from hce_jax.store.work_folder import locked, named_in_errors, open_work_folder, work_path

#: Says what is in the folder, and why.
ABOUT_FILE = "new_studies.json"
#: Cells of a file, as published.
CELLS_PER_CHUNK = 131_072
#: Labels and studies that a report lists, each.
_MOST_LINES = 20
#: Cells read and written at a time.
_CELLS_AT_A_TIME = 4_096
#: How the matrix of a file is kept. Bytes are shuffled: half as large and twice as fast as gzip alone.
_STORAGE = {
    "compression": "gzip",
    "compression_opts": 1,
    "shuffle": True,
    "chunks": (1 << 16,),
    "indptr_dtype": np.int64,
}


@dataclasses.dataclass(frozen=True)
class NewStudies:
    """Cells of new studies that were written.

    Attributes
    ----------
    folder
        Where they are.
    chunks
        Number of files.
    cells
        Number of cells.
    studies
        Cells of each study.
    steps
        What each rule left, the first being all cells of the source.
    left_out_types
        Cells by label that were left out because no type of the store is meant.
    genes_found
        By file, or for the Census: how many of the store's genes it has.
    """

    folder: Path
    chunks: int
    cells: int
    studies: dict[str, int]
    steps: tuple[Step, ...]
    left_out_types: dict[str, int]
    genes_found: dict[str, int]

    @property
    def dropped(self) -> dict[str, int]:
        """Cells that each rule left out."""
        pairs = zip(self.steps[:-1], self.steps[1:], strict=True)
        return {after.rule: before.cells - after.cells for before, after in pairs}

    def report(self) -> str:
        """Say what was chosen, in lines for a person."""
        lines = [f"{'cells':>15}   left after each rule"]
        lines += [f"{step.cells:15,}   {step.rule}" for step in self.steps]
        for name, counts in (("left out", self.left_out_types), ("study", self.studies)):
            lines += [f"{name:12}{label}: {n_cells:,}" for label, n_cells in [*counts.items()][:_MOST_LINES]]
            if len(counts) > _MOST_LINES:
                lines.append(f"{name:12}and {len(counts) - _MOST_LINES:,} more, in {self.folder / ABOUT_FILE}")
        lines += [
            f"genes       {n_found:,} of the store's are in {title}" for title, n_found in self.genes_found.items()
        ]
        return "\n".join([*lines, f"files       {self.chunks:,} in {self.folder}"])


def write_new_studies(
    source: CellSource,
    side: SideFiles,
    known_datasets: Collection[str] | None,
    destination: str | Path,
    *,
    ontology: CellOntology,
    assays: tuple[str, ...] | None,
    dataset_ids: Collection[str] = (),
    chunk_cells: int = CELLS_PER_CHUNK,
    request: Mapping[str, Any] | None = None,
    force: bool = False,
) -> NewStudies:
    """Write the cells of new or named studies whose type is one of a store's, with the store's genes and labels.

    ``chunk_0.h5ad``, ``chunk_1.h5ad``, ... have raw counts (CSR, float32) in X, and in obs what the source says of the
    cells. Which type a label stands for: see :meth:`hce_jax.store.type_matching.TypeMatcher.match`; types that the
    ontology does not know are found by the same label or id only, which is said on stderr. An interrupted call is taken
    up by the next one; finished files are not read again.

    Parameters
    ----------
    source
        Where the cells are.
    side
        The store's genes and types.
    known_datasets
        Studies that are not new; None: only those of ``dataset_ids`` are wanted.
    destination
        Folder to be; it appears when it is complete.
    ontology
        Says which type a label or an id stands for.
    assays
        Only cells measured in one of these ways; None: in any.
    dataset_ids
        Studies that are wanted, new or not.
    chunk_cells
        Cells of a file.
    request
        What :func:`refuse_other_request` is to find in the folder; for JSON.
    force
        Make it anew: remove what is there under this name, and what an interrupted call left.

    Raises
    ------
    StoreError
        If the destination is there already, or cannot be written.
    SourceError
        If no cell is left, which says after which rule, no cell is of one of the named studies or has one of the
        assays, or the source cannot be read.

    Examples
    --------
    >>> with CensusSource("2023-12-15") as source:  # doctest: +SKIP
    ...     write_new_studies(source, open_store("store").side, known, "ood", ontology=ontology, assays=None).cells
    2600000
    """
    destination = Path(destination)
    if destination.exists() and not force:
        raise StoreError(f"{destination} is there already; --force-download makes it anew")
    studies = _Studies(None if known_datasets is None else frozenset(known_datasets), frozenset(dataset_ids))
    plan = _Plan.make(source, side, studies, ontology, assays, chunk_cells)
    if force:
        _remove(destination)
    with open_work_folder(destination, plan.settings(), dict.fromkeys(plan.chunks, Path("/"))) as work:
        finished = work.finished()
        missing = [name for name in plan.chunks if name not in finished]
        n_missing = sum(len(plan.chunks[name]) for name in missing)

        def make(name: str, tick: Tick) -> None:
            work.finish(name, lambda path: plan.write_chunk(name, path, tick))

        run_in_threads("new studies", make, missing, 1, done=len(plan.obs) - n_missing, total=len(plan.obs))
        with named_in_errors(work.store / ABOUT_FILE) as path, written_aside(path) as aside:
            about = plan.describe() | ({"request": request} if request else {})
            aside.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        work.publish(destination)
    return NewStudies(
        folder=destination,
        chunks=len(plan.chunks),
        cells=len(plan.obs),
        studies=plan.studies,
        steps=plan.steps,
        left_out_types=plan.left_out_types,
        genes_found={title: alignment.n_found for title, alignment in plan.alignments.items()},
    )


def refuse_incomplete(folder: Path) -> None:
    """Refuse a folder of new studies in which files are missing; of another folder nothing is known.

    Raises
    ------
    StoreError
        If the folder has a new_studies.json that cannot be read, or lacks a file that it names.

    Examples
    --------
    >>> refuse_incomplete(Path("my_h5ad_files"))
    """
    chunks = _read_about(folder).get("chunks", {}) if (folder / ABOUT_FILE).is_file() else {}
    missing = [name for name in chunks if not (folder / name).is_file()]
    if missing:
        raise StoreError(
            f"{folder} lacks {missing[0]}{f' and {len(missing) - 1} more' if missing[1:] else ''} of the {len(chunks)} "
            f"files that its {ABOUT_FILE} names; bring back what is missing, or make the folder anew (--force-download)"
        )


def refuse_other_request(folder: Path, request: Mapping[str, Any]) -> None:
    """Refuse a folder of new studies that was not written for this very request, or in which files are missing.

    Parameters
    ----------
    folder
        As :func:`write_new_studies` writes it.
    request
        As it was given there.

    Raises
    ------
    StoreError
        That says what differs.

    Examples
    --------
    >>> refuse_other_request(Path("ood/diff_2023-05-15_2023-12-15_chunks"), request)  # doctest: +SKIP
    """
    remedy = "--force-download makes it anew"
    made_for = _read_about(folder).get("request") if (folder / ABOUT_FILE).is_file() else None
    if not made_for:
        raise StoreError(f"{folder} has no {ABOUT_FILE} that says what was asked for; {remedy}")
    for key, wanted in request.items():
        if (was := made_for.get(key)) != wanted:
            is_digest = isinstance(wanted, dict)
            how = f"for other {key}" if is_digest else f"with {key} {_listed(was)}, not {_listed(wanted)}"
            raise StoreError(f"{folder} was made {how}; {remedy}")
    refuse_incomplete(folder)


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _read_about(folder: Path) -> dict[str, Any]:
    file = folder / ABOUT_FILE
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{file} is not a readable JSON object ({error}); make the folder anew") from error


def digest_of(side: SideFiles) -> dict[str, dict[str, str]]:
    """Return checksums of the genes and the types of a store, as part of a request.

    Examples
    --------
    >>> digest_of(open_store("store").side)  # doctest: +SKIP
    {'genes': {'xxh3_64': '1f0a6c7d0f4b3e55'}, 'types': {'xxh3_64': '9a3d1c2b7e6f5a40'}}
    """
    lists = {"genes": (side.gene_ids, side.gene_names), "types": (side.labels, side.cl_ids or ())}
    return {what: {"xxh3_64": xxhash.xxh3_64_hexdigest(json.dumps(names).encode())} for what, names in lists.items()}


class _Studies(NamedTuple):
    """Which studies are wanted.

    Attributes
    ----------
    known
        Those but these; None: no others than the named.
    named
        And these.
    """

    known: frozenset[str] | None
    named: frozenset[str]

    @property
    def rule(self) -> str:
        """What to call it."""
        return "of the named studies" if self.known is None else "of new studies"

    def wanted(self, dataset_ids: pd.Series) -> pd.Series:
        """Tell which cells are of such a study."""
        named = dataset_ids.isin(self.named)
        return named if self.known is None else named | ~dataset_ids.isin(self.known)

    def refuse_absent(self, found: Collection[str], title: str) -> None:
        """Refuse names that no cell has."""
        if absent := sorted(self.named.difference(found)):
            raise SourceError(
                f"no cell of {title} is of the study {' or '.join(map(repr, absent))}; studies go by their dataset_id, "
                f"such as {', '.join(sorted(found)[:3])}"
            )


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What there is to write.

    Attributes
    ----------
    source, side, ontology
        As given.
    cl_ids
        Ids of the store's types, as of :class:`TypeMatcher`.
    alignments
        Where the source's genes lie among the store's.
    obs
        The cells to write, in the order of the source; the categories of ``cell_type`` are the store's labels.
    steps, left_out_types
        As in :class:`NewStudies`.
    chunk_cells
        Cells of a file.
    wanted, assays
        The studies and the assays asked for.
    """

    source: CellSource
    side: SideFiles
    ontology: CellOntology
    cl_ids: tuple[str, ...]
    alignments: dict[str, GeneAlignment]
    obs: pd.DataFrame
    steps: tuple[Step, ...]
    left_out_types: dict[str, int]
    chunk_cells: int
    wanted: _Studies
    assays: tuple[str, ...] | None

    @staticmethod
    def make(
        source: CellSource,
        side: SideFiles,
        wanted: _Studies,
        ontology: CellOntology,
        assays: tuple[str, ...] | None,
        chunk_cells: int,
    ) -> "_Plan":
        """Choose the cells, and find the genes."""
        alignments = source.align(side.gene_ids, side.gene_names)
        warn_of_few_genes(alignments)
        steps, left_out, seen = Steps(), Counter[str](), {"dataset_id": set[str](), "assay": set[str]()}
        types = TypeMatcher(side.labels, side.cl_ids, ontology)
        types.warn(side.path)
        batches = list(_chosen_batches(source, wanted, assays, types, side.labels, steps, left_out, seen))
        refuse_unknown(Rules(assays=assays), seen | {"tissue_general": set()}, source.title)
        wanted.refuse_absent(seen["dataset_id"], source.title)
        steps.refuse_none()
        obs = joined(batches)
        left_out_types = dict(left_out.most_common())
        return _Plan(
            source=source,
            side=side,
            ontology=ontology,
            cl_ids=types.cl_ids,
            alignments=alignments,
            obs=obs,
            steps=steps.table(),
            left_out_types=left_out_types,
            chunk_cells=chunk_cells,
            wanted=wanted,
            assays=assays,
        )

    @property
    def chunks(self) -> dict[str, range]:
        """Which of the cells go into which file."""
        n_cells = len(self.obs)
        starts = range(0, n_cells, self.chunk_cells)
        return {
            f"chunk_{number}.h5ad": range(start, min(start + self.chunk_cells, n_cells))
            for number, start in enumerate(starts)
        }

    @property
    def studies(self) -> dict[str, int]:
        """Cells of each study."""
        counts = self.obs["dataset_id"].value_counts()
        return {str(study): int(n_cells) for study, n_cells in counts.items() if n_cells}

    def settings(self) -> dict[str, Any]:
        """Return what must be the same when the work is taken up again."""
        digest = xxhash.xxh3_64(np.ascontiguousarray(self.obs["row"].to_numpy()).data)
        for names in (self.side.gene_ids, self.side.gene_names, self.side.labels, self.cl_ids):
            digest.update("\n".join(names).encode())
        digest.update(self.obs[LABEL_COLUMN].cat.codes.to_numpy().tobytes())
        return {
            "source": self.source.about(),
            "chunk_cells": self.chunk_cells,
            "choice of cells, and genes": digest.hexdigest(),
        }

    def describe(self) -> dict[str, Any]:
        """Return what new_studies.json says."""
        return {
            "source": {"title": self.source.title, **self.source.about()},
            "ontology": str(self.ontology),
            "assays": self.assays,
            "known_studies": None if self.wanted.known is None else len(self.wanted.known),
            "named_studies": sorted(self.wanted.named),
            "left_after_each_rule": {step.rule: step.cells for step in self.steps},
            "left_out_types": self.left_out_types,
            "studies": self.studies,
            "genes": {
                title: {"found": alignment.n_found, "of": alignment.n_genes, "by": alignment.by}
                for title, alignment in self.alignments.items()
            },
            "chunks": {name: len(cells) for name, cells in self.chunks.items()},
        }

    def write_chunk(self, name: str, path: Path, tick: Tick) -> dict[str, Any]:
        """Write one file; memory holds some of its cells at a time."""
        cells = self.chunks[name]
        with written_aside(path) as aside:
            anndata.AnnData(obs=self._obs(cells), var=self._var()).write_h5ad(aside)
            with h5py.File(aside, "r+") as file:
                write_elem(
                    file, "X", sparse.csr_array((0, self.side.n_genes), dtype=np.float32), dataset_kwargs=_STORAGE
                )
                matrix = sparse_dataset(file["X"])
                for counts in self._counts(cells):
                    matrix.append(counts)
                    tick(counts.shape[0])
            return {"bytes": aside.stat().st_size}

    def _counts(self, cells: range) -> Iterator[sparse.csr_array]:
        rows = self.obs["row"].to_numpy()
        for start in range(cells.start, cells.stop, _CELLS_AT_A_TIME):
            stop = min(start + _CELLS_AT_A_TIME, cells.stop)
            yield self.source.read_counts(rows[start:stop], self.alignments)

    def _obs(self, cells: range) -> pd.DataFrame:
        obs = self.obs.iloc[cells.start : cells.stop]
        texts: dict[str, Any] = {name: obs[name].cat.remove_unused_categories() for name in TEXT_COLUMNS}
        code_n = obs[LABEL_COLUMN].cat.codes.to_numpy()
        texts[TERM_COLUMN] = pd.Categorical(np.array(self.cl_ids, object)[code_n])
        return (
            obs[["soma_joinid", "is_primary_data"]].assign(**texts).set_index(obs["soma_joinid"].astype(str).to_numpy())
        )

    def _var(self) -> pd.DataFrame:
        var = {"feature_id": self.side.gene_ids, "feature_name": self.side.gene_names}
        return pd.DataFrame(var, index=list(self.side.gene_ids))


def _chosen_batches(
    source: CellSource,
    wanted: _Studies,
    assays: tuple[str, ...] | None,
    types: TypeMatcher,
    labels: tuple[str, ...],
    steps: Steps,
    left_out: Counter[str],
    seen: dict[str, set[str]],
) -> Iterator[pd.DataFrame]:
    for batch in source.obs_batches():
        for name, values in seen.items():
            values.update(batch[name].unique())
        steps.count(f"in {source.title}", batch[LABEL_COLUMN])
        batch = batch[batch["is_primary_data"]]
        steps.count("primary data", batch[LABEL_COLUMN])
        if assays is not None:
            batch = batch[batch["assay"].isin(assays)]
            steps.count("of these assays", batch[LABEL_COLUMN])
        batch = batch[wanted.wanted(batch["dataset_id"])]
        steps.count(wanted.rule, batch[LABEL_COLUMN])
        label_n = pd.Categorical.from_codes(types.codes(batch), pd.Index(labels))
        ours = label_n.codes >= 0
        counts = batch[LABEL_COLUMN][~ours].value_counts()
        left_out.update({str(label): int(n_cells) for label, n_cells in counts.items() if n_cells})
        batch = batch.assign(**{LABEL_COLUMN: label_n})[ours]
        steps.count("of the store's types", batch[LABEL_COLUMN])
        yield batch[["row", "soma_joinid", "is_primary_data", *TEXT_COLUMNS]]


def _remove(destination: Path) -> None:
    """Remove new studies, and what an interrupted call left of them."""
    with locked(work_path(destination)), named_in_errors(destination):
        if destination.exists():
            ours = [*destination.glob("chunk_*.h5ad"), destination / ABOUT_FILE]
            strangers = sorted(set(destination.iterdir()) - set(ours))
            if strangers:
                raise StoreError(f"{destination} also holds {strangers[0].name}, which is not to be lost; move it away")
            shutil.rmtree(destination)
        shutil.rmtree(work_path(destination))
