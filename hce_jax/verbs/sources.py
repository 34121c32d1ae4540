"""What the verbs share that read cells with raw counts: where the cells are, and what of them is wanted."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

from hce_jax.errors import ConfigError
from hce_jax.store.cell_source import CellSource

#: In place of names: no restriction.
ANY = "any"


def describe(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where the cells are."""
    source = parser.add_argument_group("where the cells are: one of the first two")
    source.add_argument(
        "--census-version",
        metavar="VERSION",
        help="a version of the CELLxGENE Census such as 2023-05-15, or the folder or URI of a copy of one",
    )
    source.add_argument(
        "--h5ad", nargs="+", metavar="PATH", help="h5ad files with raw counts, or folders of such files"
    )
    source.add_argument("--organism", metavar="NAME", help="of the Census; homo_sapiens if not given")
    columns = parser.add_argument_group("how the h5ad files call it")
    columns.add_argument("--label-column", metavar="NAME", help="of obs: cell types, labels or CL ids; cell_type")
    columns.add_argument("--donor-column", metavar="NAME", help="of obs: donors; donor_id")
    columns.add_argument(
        "--dataset-column", metavar="NAME", help="of obs: studies; dataset_id, or the name of the file"
    )
    columns.add_argument(
        "--gene-column", metavar="NAME", help="of var: Ensembl ids or gene names; feature_id, or the index of var"
    )
    columns.add_argument(
        "--counts",
        metavar="NAME",
        help="the matrix of raw counts: X, raw or a layer; if not given, the first of raw, X and the layers that looks "
        "like it",
    )


@contextmanager
def opened(arguments: argparse.Namespace, split_column: str | None = None) -> Iterator[CellSource]:
    """Open what the arguments name.

    Raises
    ------
    ConfigError
        If they name none, or both.
    SourceError
        If it cannot be opened.
    """
    if bool(arguments.census_version) == bool(arguments.h5ad):
        raise ConfigError("say where the cells are: either --census-version VERSION or --h5ad FILE ...")
    names = ("label", "donor", "dataset", "gene")
    columns = {name: value for name in names if (value := getattr(arguments, f"{name}_column")) is not None}
    columns |= {"counts": arguments.counts} if arguments.counts else {}
    columns |= {"split": split_column} if split_column else {}
    if arguments.h5ad:
        if arguments.organism is not None:
            raise ConfigError("--organism is for the Census; leave it out with --h5ad")
        from hce_jax.store.h5ad import H5adColumns, H5adSource

        yield H5adSource.open(arguments.h5ad, H5adColumns(**columns))
        return
    if columns:
        raise ConfigError(f"the Census has its own columns and counts; {', '.join(columns)} are for --h5ad")
    from hce_jax.census import CensusSource

    with CensusSource(arguments.census_version, arguments.organism or "homo_sapiens") as census:
        yield census


def unless_any(names: list[str] | None) -> tuple[str, ...] | None:
    """Return names as they are given; None for "any".

    Examples
    --------
    >>> unless_any(["any"]), unless_any(["blood", "lung"])
    (None, ('blood', 'lung'))
    """
    return None if names in (None, [ANY]) else tuple(names)
