"""Cells of h5ad files, the files of anndata, as a source of raw counts."""

import dataclasses
import itertools
import sys
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from hce_jax.errors import SourceError
from hce_jax.preprocess.genes import GeneAlignment, align_genes, without_version
from hce_jax.store.anndata_file import modernized, opened, read_columns, read_element
from hce_jax.store.cell_source import TERM_COLUMN, TEXT_COLUMNS, UNKNOWN, CellSource
from hce_jax.store.matrices import RowReader, has_numbers, matrices_of
from hce_jax.store.new_studies import refuse_incomplete
from hce_jax.store.raw_counts import LARGEST_NORMALIZED, find_raw_counts
from hce_jax.store.schema import LABEL_COLUMN, SPLITS

#: Columns of var that may hold the names of genes; the first that is there counts.
_NAME_COLUMNS = ("feature_name", "gene_symbols", "gene_symbol", "gene_name", "gene_names", "symbol")


@dataclasses.dataclass(frozen=True)
class H5adColumns:
    """Where h5ad files keep what is needed, in the words of the flags.

    Attributes
    ----------
    label
        Column of obs with the cell types, labels or Cell Ontology ids (``--label-column``).
    donor
        Column of obs with the donors (``--donor-column``).
    dataset
        Column of obs with the studies (``--dataset-column``); a file without it is a study by itself.
    gene
        Column of var with the ids or names of the genes (``--gene-column``); None: ``feature_id``, else var_names.
    counts
        The matrix with raw counts (``--counts``): "X", "raw" or a layer; None: the first of raw, X, the layer "counts"
        and the other layers whose values, of the first cells, are whole numbers and not negative.
    split
        Column of obs that says train, val or test (``--split-column``); it is given as ``split``. None: no such column.
    """

    label: str = LABEL_COLUMN
    donor: str = "donor_id"
    dataset: str = "dataset_id"
    gene: str | None = None
    counts: str | None = None
    split: str | None = None

    def of(self, name: str) -> str:
        """Return which column of obs holds what a source calls so.

        Examples
        --------
        >>> H5adColumns(donor="patient").of("donor_id")
        'patient'
        """
        named = {LABEL_COLUMN: self.label, "donor_id": self.donor, "dataset_id": self.dataset, _SPLIT: self.split}
        return named.get(name) or name


_DEFAULT = H5adColumns()
#: What a source calls the column that says to which split a cell belongs.
_SPLIT = "split"


@dataclasses.dataclass(frozen=True, eq=False)
class H5adSource(CellSource):
    """The cells of some h5ad files, one file after the other; see :meth:`open`.

    Attributes
    ----------
    files
        The files; no two have the same name.
    columns
        Where they keep what is needed.
    """

    files: tuple["_File", ...]
    columns: H5adColumns

    @classmethod
    def open(
        cls,
        paths: str | Path | Sequence[str | Path],
        columns: H5adColumns = _DEFAULT,
        *,
        needs_donors: bool = True,
    ) -> "H5adSource":
        """Look through h5ad files.

        What a file says of its cells in other columns than those named is read if it is there, else it is "unknown";
        a file that does not say which cells are primary data has only such. Cells keep their ``soma_joinid`` if all
        files have it and none occurs twice; else they are numbered. Where a file has several matrices and none is
        named, it is said on stderr which one is taken for the raw counts.

        Parameters
        ----------
        paths
            Files, and folders of which every ``*.h5ad`` is taken, sorted by name; a folder of new studies must be
            complete.
        columns
            Where they keep what is needed.
        needs_donors
            Whether a file without ``donor_id`` is refused, unless another column is named; else its donors are unknown.

        Raises
        ------
        SourceError
            If there is no file, one is given twice, is no h5ad file, or lacks what is needed; raw counts for one.
        StoreError
            If a folder of new studies lacks a file.

        Examples
        --------
        >>> import tempfile
        >>> import anndata
        >>> path = Path(tempfile.mkdtemp()) / "study.h5ad"
        >>> obs = pd.DataFrame({"cell_type": ["T cell", "neuron"], "donor_id": ["a", "b"]}, index=["1", "2"])
        >>> var = pd.DataFrame(index=["CD4", "CD8A"])
        >>> anndata.AnnData(sparse.csr_array([[1.0, 2.0], [0.0, 3.0]]), obs, var).write_h5ad(path)
        >>> source = H5adSource.open(path)
        >>> source.read_counts(np.array([1]), source.align(["CD8A"], ["CD8A"])).toarray()
        array([[3.]], dtype=float32)
        """
        found = list(_find_files([paths] if isinstance(paths, str | Path) else paths))
        files = tuple(_File.open(path, columns, needs_donors) for path in found)
        said = defaultdict[str, list[str]](list)
        for file in files:
            said[file.choice].append(file.name)
        for choice, (first, *others) in said.items():
            if choice:
                which = f"{first} and {len(others)} more" if others else first
                print(f"{which}: {choice}", file=sys.stderr)
        return cls(files, columns)

    @property
    def title(self) -> str:
        """The file's name, or how many there are."""
        first, *others = self.files
        return f"{len(self.files)} h5ad files ({first.name}, ...)" if others else first.name

    def about(self) -> dict[str, Any]:
        """Say which files these are, with their size and time, and what is read of them."""
        return {
            "h5ad": [
                {"file": file.name, "bytes": file.bytes, "mtime_ns": file.mtime_ns, "counts": file.counts}
                for file in self.files
            ],
            "columns": dataclasses.asdict(self.columns),
        }

    def genes(self) -> pd.DataFrame:
        """Return the genes of all files, in the order in which they first appear; Ensembl ids without versions.

        ``feature_type`` is there if every file has it.
        """
        every = pd.concat([file.genes for file in self.files], ignore_index=True, join="inner")
        every["feature_id"] = [*map(without_version, every["feature_id"])]
        return every.drop_duplicates("feature_id", ignore_index=True)

    def obs_batches(self) -> Iterator[pd.DataFrame]:
        """Go through all cells, a file at a time; see :meth:`CellSource.obs_batches`."""
        has_terms = self.columns.label == LABEL_COLUMN and all(TERM_COLUMN in file.obs_columns for file in self.files)
        names = [*TEXT_COLUMNS, *([TERM_COLUMN] if has_terms else []), *([_SPLIT] if self.columns.split else [])]
        for file, (start, stop) in zip(self.files, itertools.pairwise(self._starts), strict=True):
            rows = np.arange(start, stop)
            ids = rows if self._joinids is None else self._joinids[rows]
            obs = pd.DataFrame({"row": rows, "soma_joinid": ids, **file.read_obs(names, self.columns)})
            if wrong := sorted(set(obs.get(_SPLIT, ())) - set(SPLITS)):
                raise SourceError(
                    f"{file.name}: {self.columns.split} is {wrong[0]!r} for some cells, not one of {', '.join(SPLITS)}"
                )
            yield obs

    def align(self, gene_ids: Sequence[str], gene_names: Sequence[str]) -> dict[str, GeneAlignment]:
        """Find the genes of each file among ours, by the file's name; see :meth:`CellSource.align`."""
        return {
            file.name: align_genes(list(file.genes["feature_id"]), gene_ids, gene_names, file.name)
            for file in self.files
        }

    def read_counts(self, rows: np.ndarray, alignments: dict[str, GeneAlignment]) -> sparse.csr_array:
        """Read the raw counts of some cells, (n, g); see :meth:`CellSource.read_counts`.

        Counts that are not whole numbers are kept as they are, which is said once for each file.

        Raises
        ------
        SourceError
            If a count is negative or not finite, or a file cannot be read.
        ValueError
            If the rows do not ascend, or there is no such row.
        """
        n_cells = int(self._starts[-1])
        if (np.diff(rows, prepend=-1, append=n_cells) <= 0).any():
            raise ValueError(f"the rows must ascend and lie between 0 and {n_cells - 1}")
        parts = []
        for file, (start, stop) in zip(self.files, itertools.pairwise(self._starts), strict=True):
            low, high = np.searchsorted(rows, [start, stop])
            parts += [alignments[file.name].apply(part) for part in file.read_counts(rows[low:high] - start)]
        n_genes = next(iter(alignments.values())).n_genes
        return sparse.vstack([sparse.csr_array((0, n_genes), dtype=np.float32), *parts], format="csr")

    @property
    def has_joinids(self) -> bool:
        """Whether every file has a ``soma_joinid``, another for each cell."""
        return self._joinids is not None

    @cached_property
    def _starts(self) -> np.ndarray:
        """The first row of each file, and the number of cells."""
        return np.concatenate([[0], np.cumsum([file.n_cells for file in self.files])]).astype(np.int64)

    @cached_property
    def _joinids(self) -> np.ndarray | None:
        """The files' own numbers of their cells, if these can be told by them."""
        each = [ids for file in self.files if (ids := file.read_joinids()) is not None]
        if len(each) == len(self.files):
            every = np.concatenate(each)
            if len(np.unique(every)) == len(every):
                return every
        if any("soma_joinid" in file.obs_columns for file in self.files):
            why = "not every cell has a whole number of its own there"
            print(f"{self.title}: soma_joinid is left aside and cells are numbered: {why}", file=sys.stderr)
        return None


def _find_files(paths: Sequence[str | Path]) -> Iterator[Path]:
    seen: dict[str, Path] = {}
    places = set[Path]()
    for given in map(Path, paths):
        refuse_incomplete(given)
        inside = sorted(given.glob("[!.]*.h5ad")) if given.is_dir() else [given]
        if not inside:
            raise SourceError(f"the folder {given} has no *.h5ad files; name h5ad files or a folder that has some")
        for path in inside:
            if not path.is_file():
                raise SourceError(f"{path} does not exist; name h5ad files or a folder that has some")
            if path.resolve() in places:
                raise SourceError(f"{path} is given twice; give each file once")
            if path.name in seen:
                raise SourceError(f"{path} and {seen[path.name]} have the same name, and files go by it; rename one")
            seen[path.name] = path
            places.add(path.resolve())
            yield path
    if not seen:
        raise SourceError("no h5ad files were named")


@dataclasses.dataclass(frozen=True, eq=False)
class _File:
    """One h5ad file, looked through.

    Attributes
    ----------
    path
        Where it is.
    bytes, mtime_ns
        Its size and time.
    n_cells
        Number of its cells.
    obs_columns
        What obs has.
    counts, place
        The matrix that is read: its name for a person, and in the file.
    others
        Names of the other matrices.
    choice
        Why that matrix, for a person; empty where it was named or is the only one.
    genes
        ``feature_id``, ``feature_name`` and, if known, ``feature_type`` of that matrix's genes (t,).
    reader
        Reads that matrix.
    modern
        The file as anndata writes it now, in memory, if it is from before anndata 0.7.
    """

    path: Path
    bytes: int
    mtime_ns: int
    n_cells: int
    obs_columns: tuple[str, ...]
    counts: str
    place: str
    others: tuple[str, ...]
    choice: str
    genes: pd.DataFrame
    reader: RowReader
    modern: h5py.File | None
    _told: threading.Event = dataclasses.field(default_factory=threading.Event)

    @staticmethod
    def open(path: Path, columns: H5adColumns, needs_donors: bool) -> "_File":
        """Look through a file."""
        status = path.stat()
        modern = modernized(path)
        with opened(path, modern) as file:
            matrices = matrices_of(file)
            counts, choice = (columns.counts or "X").removeprefix("layers/"), ""
            if columns.counts is None and matrices:
                counts, choice = find_raw_counts(path.name, file, matrices)
            if counts not in matrices:
                what = f"has no matrix {counts!r}; it has {', '.join(matrices) or 'none'}"
                raise SourceError(f"{path.name} {what}; name the one with raw counts (--counts)")
            place, var_place = matrices[counts]
            if not has_numbers(file[place]):
                raise SourceError(f"{path.name}: {counts} is no matrix of numbers; name another (--counts)")
            obs = file["obs"]
            index = obs[obs.attrs["_index"]]
            n_cells = len(index if isinstance(index, h5py.Dataset) else index["values"])
            genes = _genes(path.name, read_element(file[var_place]), columns.gene)
            found = _File(
                path=path,
                bytes=status.st_size,
                mtime_ns=status.st_mtime_ns,
                n_cells=n_cells,
                obs_columns=tuple(obs.attrs["column-order"]),
                counts=counts,
                place=place,
                others=tuple(name for name in matrices if name != counts),
                choice=choice,
                genes=genes,
                reader=RowReader.of(path.name, counts, file[place], n_cells, len(genes)),
                modern=modern,
            )
        found._check_columns(columns, needs_donors)
        return found

    @property
    def name(self) -> str:
        """What to call it."""
        return self.path.name

    def _check_columns(self, columns: H5adColumns, needs_donors: bool) -> None:
        needed = {"label": "the cell types"}
        if needs_donors:
            needed["donor"] = "the donors, who decide about the split"
        elif columns.donor != _DEFAULT.donor:
            needed["donor"] = "the donors"
        needed |= {"dataset": "the studies"} if columns.dataset != _DEFAULT.dataset else {}
        needed |= {"split": "the splits"} if columns.split else {}
        for flag, what in needed.items():
            column = getattr(columns, flag)
            if column not in self.obs_columns:
                has = ", ".join(self.obs_columns) or "none"
                raise SourceError(
                    f"{self.name} has no column {column!r} in obs; its columns are {has}; name the one with {what} "
                    f"(--{flag}-column)"
                )

    def read_joinids(self) -> np.ndarray | None:
        """Read soma_joinid, if it is there and whole numbers."""
        if "soma_joinid" not in self.obs_columns:
            return None
        ids = self._read_columns(["soma_joinid"])["soma_joinid"]
        return ids.to_numpy(np.int64) if pd.api.types.is_integer_dtype(ids) and not ids.isna().any() else None

    def read_obs(self, names: Iterable[str], columns: H5adColumns) -> dict[str, Any]:
        """Read what is said of the cells: ``is_primary_data``, and the columns of text as categoricals."""
        place = {name: columns.of(name) for name in (*names, "is_primary_data")}
        there = self._read_columns([column for column in place.values() if column in self.obs_columns])
        result: dict[str, Any] = {}
        for name, column in place.items():
            if name == "is_primary_data":
                result[name] = self._truths(there[column]) if column in there else np.ones(self.n_cells, bool)
            elif column in there:
                result[name] = _categories(there[column])
            else:
                value = pd.Index([self.path.stem if name == "dataset_id" else UNKNOWN])
                result[name] = pd.Categorical.from_codes(np.zeros(self.n_cells, np.int8), value)
        return result

    def _truths(self, values: pd.Series) -> np.ndarray:
        if values.dtype == bool:
            return values.to_numpy()
        truths = values.astype(str).str.lower().map({"true": True, "1": True, "false": False, "0": False})
        if truths.isna().any():
            n_cells = truths.isna().sum()
            raise SourceError(f"{self.name}: is_primary_data is neither true nor false for {n_cells:,} cells")
        return truths.to_numpy(bool)

    def _read_columns(self, names: Iterable[str]) -> pd.DataFrame:
        with opened(self.path, self.modern) as file:
            return read_columns(file["obs"], names, self.n_cells)

    def read_counts(self, rows: np.ndarray) -> Iterator[sparse.csr_array]:
        """Read the counts of some cells, ascending, some at a time, (n, t) float32."""
        if len(rows):
            with opened(self.path, self.modern) as file:
                for part in self.reader.parts(file[self.place], rows):
                    yield self._checked(part)

    def _checked(self, part: sparse.csr_array) -> sparse.csr_array:
        part = part.astype(np.float32, copy=False)
        bad = ~(part.data >= 0) | np.isinf(part.data)
        if bad.any():
            raise SourceError(
                f"{self.name}: {np.count_nonzero(bad):,} of {part.nnz:,} values read from {self.counts} are negative "
                f"or not finite (first: {part.data[bad][0]:g}); raw counts are needed{self._elsewhere}"
            )
        if not self._told.is_set() and (part.data != np.rint(part.data)).any():
            self._told.set()
            largest = part.data.max()
            print(
                f"{self.name}: {self.counts} has counts that are not whole numbers; they are kept as they are"
                if largest >= LARGEST_NORMALIZED
                else f"{self.name}: {self.counts} looks normalised already (its values are not whole numbers, and the "
                f"largest of the first cells is {largest:.3g}); it is taken for raw counts{self._elsewhere}",
                file=sys.stderr,
            )
        part.sum_duplicates()
        part.eliminate_zeros()
        return part

    @property
    def _elsewhere(self) -> str:
        others = ", ".join(self.others)
        return f"; name another matrix (--counts): it has {others}" if others else "; it has no other matrix"


def _genes(name: str, var: pd.DataFrame, column: str | None) -> pd.DataFrame:
    if column is not None and column not in var:
        has = ", ".join(map(str, var.columns)) or "none"
        raise SourceError(f"{name} has no column {column!r} in var; its columns are {has} (--gene-column)")
    column = column or ("feature_id" if "feature_id" in var else None)
    ids = _texts(var[column] if column else var.index, var.index)
    names = next((var[each] for each in _NAME_COLUMNS if each in var), ids)
    genes = {"feature_id": ids, "feature_name": _texts(names, ids)}
    if "feature_type" in var:
        genes["feature_type"] = _texts(var["feature_type"], np.full(len(var), UNKNOWN))
    return pd.DataFrame(genes)


def _texts(values: Any, instead: Any) -> np.ndarray:
    """Return values as text, with another's in place of missing ones."""
    values = np.asarray(values, object)
    return np.where(pd.isna(values), np.asarray(instead, object), values).astype(str).astype(object)


def _categories(values: pd.Series) -> pd.Categorical:
    """Return values as categories of text, the missing ones as "unknown"."""
    if values.dtype.kind == "f" and (values.dropna() % 1 == 0).all():
        values = values.astype("Int64")  # numbers of donors become float where one is missing
    codes, different = pd.factorize(values)
    texts = pd.Categorical([*(str(value) or UNKNOWN for value in different), UNKNOWN])
    every = pd.Categorical.from_codes(texts.codes[codes], texts.categories)  # -1, missing, is the last: unknown
    return every.remove_unused_categories()
