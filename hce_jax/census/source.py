"""The cells of one organism of a Census."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from hce_jax.census.open import census_facts, open_census
from hce_jax.errors import SourceError
from hce_jax.preprocess.genes import GeneAlignment, align_genes
from hce_jax.store.cell_source import TERM_COLUMN, TEXT_COLUMNS, UNKNOWN, CellSource

#: Cells of a batch of obs.
_OBS_ROWS = 1 << 17
#: The Census keeps the counts of so many neighbouring cells together; reading one of them costs as much as all.
_TILE = 2048
#: Cells whose counts are asked for at a time, give or take a tile.
_CELLS = 4096


class CensusSource(CellSource):
    """The cells of one organism of a Census; a row is a soma_joinid.

    It may be read by several threads at a time. It is open until ``close`` or the end of a ``with`` block.

    Parameters
    ----------
    version
        As for :func:`open_census`.
    organism
        As the Census names it.

    Raises
    ------
    SourceError
        If it cannot be opened, or has no such organism.

    Examples
    --------
    >>> with CensusSource("2023-05-15") as source:  # doctest: +SKIP
    ...     counts = source.read_counts(np.arange(1000), source.align(gene_ids, gene_names))
    """

    def __init__(self, version: str, organism: str = "homo_sapiens"):
        with contextlib.ExitStack() as stack:
            self.census = stack.enter_context(open_census(version))
            self.organism = organism
            experiment = self.census.experiment(organism)
            self._obs, self._var = experiment.obs, experiment.ms["RNA"].var
            self._x = experiment.ms["RNA"].X["raw"]
            self._n_cells, rows, counted = self.census.read("how many cells", self._extent)
            if not self._n_cells or not np.any(counted):  # so does an array look whose files are missing
                raise SourceError(f"{self.title} has no counts of cells of {organism}; is the copy complete?")
            self._last_row = int(rows[0][1])
            self._stack = stack.pop_all()

    def _extent(self) -> tuple[int, Any, Any]:
        return int(self._obs.count), self._obs.non_empty_domain(), self._x.non_empty_domain()

    def close(self) -> None:
        """Close the Census."""
        self._stack.close()

    def __enter__(self) -> "CensusSource":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def title(self) -> str:
        """What to call it in messages: "Census 2023-05-15", or "Census at NAME"."""
        return self.census.title

    def about(self) -> dict[str, Any]:
        """Say which Census and organism it is, when it was built, and how many cells it has; a copy by its name."""
        which = {"census_version": self.census.version} if self.census.version else {"census_copy": self.census.name}
        date = census_facts(self.census).get("build_date")
        return {**which, "census_build_date": date, "organism": self.organism, "cells": self._n_cells}

    def genes(self) -> pd.DataFrame:
        """Return its genes by soma_joinid: ``feature_id``, ``feature_name`` and, in newer ones, ``feature_type``.

        Raises
        ------
        SourceError
            If they cannot be read, or their soma_joinid are not 0, 1, 2, ...
        """
        columns = [name for name in ("feature_id", "feature_name", "feature_type") if name in self._var.schema.names]
        table = self.census.read(
            "the genes", lambda: self._var.read(column_names=["soma_joinid", *columns]).concat()
        ).sort_by("soma_joinid")
        if not np.array_equal(table["soma_joinid"], np.arange(len(table))):
            raise SourceError(f"the genes of {self.title} are not numbered 0 to {len(table) - 1:,}")
        return pd.DataFrame({name: _text(table[name]).to_pandas() for name in columns})

    def obs_batches(self) -> Iterator[pd.DataFrame]:
        """Go through its cells, as :meth:`CellSource.obs_batches` says; ``row`` is ``soma_joinid``.

        Yields
        ------
        DataFrame
            131,072 cells, or as many as have such numbers.

        Raises
        ------
        SourceError
            If they cannot be read.
        """
        for first in range(0, self._last_row + 1, _OBS_ROWS):
            yield self._obs_frame(first, min(first + _OBS_ROWS - 1, self._last_row))

    def _obs_frame(self, first: int, last: int) -> pd.DataFrame:
        texts = (*TEXT_COLUMNS, TERM_COLUMN)
        columns = ("soma_joinid", "is_primary_data", *texts)
        table = self.census.read(
            f"the cells {first:,} to {last:,}",
            lambda: self._obs.read((slice(first, last),), column_names=columns).concat(),
        ).sort_by("soma_joinid")
        joinids = table["soma_joinid"].to_numpy()
        primary = pc.fill_null(table["is_primary_data"], False).to_numpy()
        frame = pd.DataFrame({"row": joinids, "soma_joinid": joinids, "is_primary_data": primary.astype(bool)})
        return frame.assign(**{name: _categories(table[name]) for name in texts})

    def align(self, gene_ids: Sequence[str], gene_names: Sequence[str]) -> dict[str, GeneAlignment]:
        """Find its genes among ours, under its title.

        Raises
        ------
        SourceError
            If none is found, or one is found twice.
        """
        return {self.title: align_genes(list(self.genes()["feature_id"]), gene_ids, gene_names, self.title)}

    def read_counts(self, rows: np.ndarray, alignments: dict[str, GeneAlignment]) -> sparse.csr_array:
        """Read the raw counts of some cells in our order of genes, (n, g) float32 with sorted indices.

        Beside the result, and the same again while it is put together, this takes about half a GB.

        Parameters
        ----------
        rows
            Their rows, (n,) int64, ascending.
        alignments
            Of :meth:`align`.

        Raises
        ------
        SourceError
            If they cannot be read; from the network only after some attempts.
        """
        if np.any(np.diff(rows) <= 0):
            raise ValueError("rows must ascend")
        alignment = alignments[self.title]
        pieces = [sparse.csr_array((0, alignment.n_genes), dtype=np.float32)]
        pieces += [self._counts(some, alignment) for some in _in_tiles(rows)]
        return sparse.vstack(pieces, format="csr")

    def _counts(self, rows: np.ndarray, alignment: GeneAlignment) -> sparse.csr_array:
        """Read counts of a few thousand cells, as many triples at a time as a query's buffers hold."""
        from tiledbsoma import IntIndexer

        place_of = IntIndexer(rows)  # np.searchsorted, but five times as fast
        shape = rows.size, alignment.places_t.size

        def read() -> sparse.csr_array:
            counts = sparse.csr_array((rows.size, alignment.n_genes), dtype=np.float32)
            # TileDB itself reads runs of neighbours among the points as ranges. Genes that we lack are dropped here:
            # to have it look for ours takes twice as long.
            for table in self._x.read((rows,)).tables():
                places = place_of.get_indexer(table["soma_dim_0"].to_numpy()).astype(np.int32)
                genes = table["soma_dim_1"].to_numpy().astype(np.int32)
                triples = sparse.coo_array((table["soma_data"].to_numpy(), (places, genes)), shape=shape)
                counts = counts + alignment.apply(triples.tocsr())
            return counts

        return self.census.read(f"the counts of cells {rows[0]:,} to {rows[-1]:,}", read)


def _in_tiles(rows: np.ndarray) -> list[np.ndarray]:
    """Cut ascending rows into a few thousand each, not within a tile, which would be read twice."""
    if not rows.size:
        return []
    first_of_tile = np.searchsorted(rows, rows // _TILE * _TILE)
    return np.split(rows, np.flatnonzero(np.diff(first_of_tile // _CELLS)) + 1)


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pc.fill_null(column.cast(pa.large_string()), UNKNOWN)


def _categories(column: pa.ChunkedArray) -> pd.Series:
    """Make categories of a column of text, or of one that is a dictionary already, as some Censuses have it."""
    return _text(column).dictionary_encode().combine_chunks().to_pandas()
