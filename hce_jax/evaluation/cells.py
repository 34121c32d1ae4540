"""Labelled cells to evaluate on, in blocks: a split of a store, or cells with raw counts."""

import abc
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import pandas as pd

from hce_jax.errors import SourceError, StoreError
from hce_jax.hierarchy.cell_ontology import CellOntology
from hce_jax.preprocess.genes import GeneAlignment
from hce_jax.store import LABEL_COLUMN, Block, SideFiles, Split
from hce_jax.store.cell_source import TEXT_COLUMNS, CellSource, warn_of_few_genes
from hce_jax.store.type_matching import TypeMatcher

#: What is said of each cell beside its label.
OBS_COLUMNS = tuple(name for name in TEXT_COLUMNS if name != LABEL_COLUMN)
#: The number of a cell.
JOINID = "soma_joinid"
#: Cells of a block with raw counts.
_BLOCK_SIZE = 2048
#: Lines of each kind in a report.
_MOST_LINES = 12
#: Names of each kind in a message, and of studies in a title.
_MOST_NAMES, _MOST_STUDIES = 6, 3

_Name = TypeVar("_Name", str, tuple[str, str])


class Cells(abc.ABC):
    """Labelled cells, in blocks that are read one at a time.

    Attributes
    ----------
    title
        What to call them, e.g. "test split of STORE".
    side
        The genes of the blocks and the types of the labels.
    block_sizes
        Cells of each block, (n_blocks,) int64.
    lookups
        For each of the :data:`OBS_COLUMNS` the text of its codes.
    """

    title: str
    side: SideFiles
    block_sizes: np.ndarray
    lookups: Mapping[str, tuple[str, ...]]

    @abc.abstractmethod
    def read_block(self, index: int) -> Block:
        """Read one block; safe to call from several threads.

        Returns
        -------
        Block
            Expression in the order of the genes of ``side``, and the columns ``cell_type``, ``soma_joinid`` and the
            codes of the ``lookups``.

        Raises
        ------
        StoreError, SourceError
            If it cannot be read.
        """

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return int(self.block_sizes.sum())


class StoreCells(Cells):
    """The cells of a store's split, in the order of the store.

    A column without a lookup table has its codes as text; to know how many there are, the split is read once more.

    Parameters
    ----------
    split
        It must have the columns of a :class:`Cells`.

    Raises
    ------
    StoreError
        If a lookup table is damaged; if a column is absent, when a block is read.

    Examples
    --------
    >>> StoreCells(open_store("store").split("test")).title  # doctest: +SKIP
    'test split of store'
    """

    def __init__(self, split: Split):
        self._split = split
        self.side = split.side
        self.title = f"{split.name} split of {split.side.path}"
        self.block_sizes = split.block_sizes
        named = {name: self.side.lookup(name) for name in OBS_COLUMNS if name in self.side.lookup_sizes}
        self.lookups = named | self._numbered([name for name in OBS_COLUMNS if name not in named])

    def _numbered(self, columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
        if not columns:
            return {}
        sizes = dict.fromkeys(columns, 0)
        for index in range(len(self.block_sizes)):
            block = self._split.read_block(index, tuple(columns))
            for name in columns:
                codes = block.column(name)
                if codes.min() < 0:
                    raise StoreError(f"the {self.title} has the {name} code {codes.min()}; codes are 0 or more")
                sizes[name] = max(sizes[name], int(codes.max()) + 1)
        return {name: tuple(map(str, range(size))) for name, size in sizes.items()}

    def read_block(self, index: int) -> Block:
        """Read one block; see :meth:`Cells.read_block`."""
        return self._split.read_block(index, (LABEL_COLUMN, JOINID, *OBS_COLUMNS))


@dataclasses.dataclass(frozen=True, eq=False)
class SourceCells(Cells):
    """Cells with raw counts whose label is one of a model's types; see :meth:`choose`.

    Attributes
    ----------
    title, side, block_sizes
        As of :class:`Cells`; the title is the source's, or names the studies that were asked for; the genes and types
        are the model's.
    source
        Where their counts are.
    alignments
        Where the source's genes lie among the model's.
    lookups
        As of :class:`Cells`; sorted, all of them used.
    rows
        Their rows in the source, (n,) int64, ascending.
    columns
        The integer columns of the blocks, (n,) each, of small types where they will do.
    n_in_source
        Cells of the source, or of the studies that were asked for.
    left_out
        Cells by label that were left out because it is none of the model's types; most frequent first.
    taken_as
        By (label, type of the model) the cells whose label is not the type's; most frequent first.
    """

    title: str
    side: SideFiles
    block_sizes: np.ndarray
    source: CellSource
    alignments: dict[str, GeneAlignment]
    lookups: dict[str, tuple[str, ...]]
    rows: np.ndarray
    columns: dict[str, np.ndarray]
    n_in_source: int
    left_out: dict[str, int]
    taken_as: dict[tuple[str, str], int]

    @classmethod
    def choose(
        cls,
        source: CellSource,
        side: SideFiles,
        ontology: CellOntology,
        dataset_ids: Collection[str] | None = None,
    ) -> "SourceCells":
        """Choose the cells whose label is one of a model's types. Counts are not read.

        Which type a label stands for: see :meth:`hce_jax.store.type_matching.TypeMatcher.match`. Types of the model
        that the ontology does not know are found by the same label or id only, which is said on stderr.

        Parameters
        ----------
        source
            Cells of any assay, primary data or not.
        side
            The model's genes and types; its path is what to call the model.
        ontology
            Says which type a label or an id stands for.
        dataset_ids
            Only cells of these studies; None: of all.

        Raises
        ------
        SourceError
            If no cell is left, no gene is the model's, a study is not there, or the source cannot be read.

        Examples
        --------
        >>> source = H5adSource.open("study.h5ad")  # doctest: +SKIP
        >>> cells = SourceCells.choose(source, open_store("store").side, CellOntology.open())  # doctest: +SKIP
        >>> print(cells.report())  # doctest: +SKIP
        """
        alignments = source.align(side.gene_ids, side.gene_names)
        warn_of_few_genes(alignments, "the model's")
        choice = _Choice(side, ontology, dataset_ids)
        for batch in source.obs_batches():
            choice.add(batch)
        choice.check(source.title)
        columns, lookups = choice.columns()
        rows = columns.pop("row")
        return cls(
            title=source.title if dataset_ids is None else _studies(dataset_ids),
            side=side,
            block_sizes=np.diff([*range(0, len(rows), _BLOCK_SIZE), len(rows)]),
            source=source,
            alignments=alignments,
            lookups=lookups,
            rows=rows,
            columns=columns,
            n_in_source=choice.n_cells,
            left_out=_sorted(choice.left_out),
            taken_as=_sorted(choice.taken_as),
        )

    def read_block(self, index: int) -> Block:
        """Read the counts of one block, scaled over the model's genes; see :meth:`Cells.read_block`."""
        cells = slice(index * _BLOCK_SIZE, (index + 1) * _BLOCK_SIZE)
        counts = self.source.read_counts(self.rows[cells], self.alignments)
        return Block.of_counts(counts, {name: codes[cells] for name, codes in self.columns.items()})

    def report(self) -> str:
        """Say what was chosen, in lines for a person."""
        types, studies = len(np.unique(self.columns[LABEL_COLUMN])), len(self.lookups["dataset_id"])
        lines = [
            f"cells       {len(self.rows):,} of {self.n_in_source:,} in {self.title} are of {types} of the model's "
            f"{self.side.n_types} types, from {studies:,} {'study' if studies == 1 else 'studies'}"
        ]
        lines += _most("taken as", {f"{label} -> {type_}": n for (label, type_), n in self.taken_as.items()})
        lines += _most("left out", self.left_out)
        found = {alignment.n_found for alignment in self.alignments.values()}
        if len(found) == 1:
            (n_found,) = found
            return "\n".join(
                [*lines, f"genes       {n_found:,} of the model's {self.side.n_genes:,} are in {self.title}"]
            )
        fewest_first = sorted(self.alignments.items(), key=lambda item: item[1].n_found)
        lines += [
            f"genes       {alignment.n_found:,} of the model's {self.side.n_genes:,} are in {title}"
            for title, alignment in fewest_first[:_MOST_LINES]
        ]
        if len(fewest_first) > _MOST_LINES:
            lines.append(f"genes       more of them are in {len(fewest_first) - _MOST_LINES:,} other files")
        return "\n".join(lines)


def _most(name: str, counts: Mapping[str, int]) -> Iterator[str]:
    """Write the most frequent of some labels, and what the others are together."""
    n_shown = _MOST_LINES if len(counts) > _MOST_LINES + 1 else len(counts)  # a last one is shown, not counted
    shown = list(counts.items())[:n_shown]
    yield from (f"{name:12}{label}: {n_cells:,}" for label, n_cells in shown)
    if rest := list(counts.values())[n_shown:]:
        yield f"{name:12}{len(rest):,} other labels: {sum(rest):,}"


class _Choice:
    """Chooses cells batch by batch, and keeps a few bytes of each."""

    def __init__(self, side: SideFiles, ontology: CellOntology, dataset_ids: Collection[str] | None):
        self._labels = side.labels
        self._matcher = TypeMatcher(side.labels, side.cl_ids, ontology)
        self._matcher.warn(side.path)
        self._dataset_ids = None if dataset_ids is None else frozenset(dataset_ids)
        self._studies = set[str]()
        self._parts: list[dict[str, np.ndarray]] = []
        self._codes: dict[str, dict[str, int]] = {name: {} for name in OBS_COLUMNS}
        self.n_cells = 0
        self.left_out, self.taken_as = Counter[str](), Counter[tuple[str, str]]()

    def add(self, batch: pd.DataFrame) -> None:
        """Choose of the cells of a batch of obs."""
        self._studies.update(batch["dataset_id"].unique())
        if self._dataset_ids is not None:
            batch = batch[batch["dataset_id"].isin(self._dataset_ids)]
        self.n_cells += len(batch)
        label_n = self._matcher.codes(batch)
        self._count(batch[LABEL_COLUMN], label_n)
        chosen = batch[label_n >= 0]
        part = {"row": chosen["row"].to_numpy(), JOINID: chosen[JOINID].to_numpy()}
        part[LABEL_COLUMN] = _small(label_n[label_n >= 0], len(self._labels))
        for name, code_of in self._codes.items():
            column = chosen[name].cat.remove_unused_categories().cat
            codes = np.array([code_of.setdefault(text, len(code_of)) for text in column.categories], np.int64)
            part[name] = _small(codes[column.codes], len(code_of))
        self._parts.append(part)

    def _count(self, labels: pd.Series, label_n: np.ndarray) -> None:
        """Count the cells that are left out, and those whose label is not the type's."""
        pairs = pd.DataFrame({"label": labels, "type": label_n}).groupby(["label", "type"], observed=True).size()
        for label, code, n_cells in pairs.reset_index().itertuples(index=False, name=None):
            if code < 0:
                self.left_out[label] += n_cells
            elif self._labels[code] != label:
                self.taken_as[label, self._labels[code]] += n_cells

    def check(self, title: str) -> None:
        """Raise an error if there is nothing to evaluate on, or a study is not there."""
        if absent := sorted((self._dataset_ids or frozenset()) - self._studies):
            has = _some(sorted(self._studies))
            raise SourceError(f"{title} has no cell of the study {absent[0]!r}; its studies are {has} (--dataset_ids)")
        if not self.n_cells:
            raise SourceError(f"{title} has no cells")
        if all(len(part["row"]) == 0 for part in self._parts):
            theirs = _some([*_sorted(self.left_out)])
            raise SourceError(
                f"no cell of {title} is of one of the model's {len(self._labels)} types: its cells are called "
                f"{theirs}; the model knows {_some(self._labels)}; name the column that has the cell types "
                "(--label_column), or rename them"
            )

    def columns(self) -> tuple[dict[str, np.ndarray], dict[str, tuple[str, ...]]]:
        """Return the columns of all chosen cells, codes in the order of their sorted texts; and the texts."""
        columns = {name: np.concatenate([part.pop(name) for part in self._parts]) for name in [*self._parts[0]]}
        lookups = {}
        for name, code_of in self._codes.items():
            texts = sorted(code_of)
            place = np.argsort([code_of[text] for text in texts])
            columns[name] = _small(place, len(texts))[columns[name]]
            lookups[name] = tuple(texts)
        return columns, lookups


def _sorted(cells: Mapping[_Name, int]) -> dict[_Name, int]:
    """Sort numbers of cells, the largest first, equal ones by name."""
    return dict(sorted(cells.items(), key=lambda item: (-item[1], item[0])))


def _small(codes: np.ndarray, n_codes: int) -> np.ndarray:
    """Return codes 0 to n_codes - 1 in as few bytes as they need."""
    return codes.astype(np.min_scalar_type(max(n_codes - 1, 0)))


def _studies(dataset_ids: Collection[str]) -> str:
    names = sorted(set(dataset_ids))
    return f"{'study' if len(names) == 1 else 'studies'} {_some(names, _MOST_STUDIES)}"


def _some(names: Sequence[str], most: int = _MOST_NAMES) -> str:
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(repr, names[:most])) + more
