"""The verb new-studies."""

import argparse
import sys
from collections.abc import Collection
from pathlib import Path

from hce_jax.hierarchy.cell_ontology import CellOntology
from hce_jax.store import SideFiles, open_store
from hce_jax.store.new_studies import write_new_studies
from hce_jax.store.selection import PUBLISHED_ASSAYS
from hce_jax.verbs import sources

PURPOSE = "collect the cells of studies that a store does not know, to evaluate on"


def describe(parser: argparse.ArgumentParser) -> None:
    """Add its description and its arguments."""
    parser.description = (
        "Write the cells of studies that a store was not built from, or of named ones, with the store's genes and of "
        "its types, as h5ad files with raw counts. Interrupted, the same command goes on with what is not finished."
    )
    parser.add_argument("store", metavar="STORE", help="folder of the store")
    parser.add_argument("destination", metavar="DESTINATION", help="folder of the files; must not exist yet")
    sources.describe(parser)
    parser.add_argument(
        "--old-census",
        metavar="VERSION",
        help="the Census whose studies are not new; if not given, the studies that the store's source had",
    )
    parser.add_argument(
        "--dataset-ids",
        nargs="+",
        metavar="ID",
        help="only these studies, new or not; diff_VERSION: those that this Census had not, as with --old-census",
    )
    parser.add_argument(
        "--assays", nargs="+", metavar="NAME", default=list(PUBLISHED_ASSAYS), help="the seven of 10x; or any"
    )
    parser.add_argument(
        "--ontology",
        metavar="RELEASE",
        help="release of the Cell Ontology that cellxgene-ontology-guide carries, or an OBO file; 2026-03-26",
    )
    parser.add_argument("--force-download", action="store_true", help="make anew what is there")


def run(arguments: argparse.Namespace) -> None:
    """Do it, and say what was found."""
    side = open_store(arguments.store).side
    known, named = _wanted(arguments, side)
    ontology = CellOntology.open(arguments.ontology)
    with sources.opened(arguments) as source:
        found = write_new_studies(
            source,
            side,
            known,
            Path(arguments.destination),
            ontology=ontology,
            assays=sources.unless_any(arguments.assays),
            dataset_ids=named,
            force=arguments.force_download,
        )
    print(found.report())


def _wanted(arguments: argparse.Namespace, side: SideFiles) -> tuple[Collection[str] | None, Collection[str]]:
    """Return the studies that are not new, None where that does not matter, and those that are named."""
    asked = [each for given in arguments.dataset_ids or () for each in given.split(",") if each]
    if arguments.old_census:
        asked.append(f"diff_{arguments.old_census}")
    if asked:
        from hce_jax.census import known_and_named

        return known_and_named(asked)
    if (known := side.about.get("source_datasets")) is not None:
        return known, ()
    known = side.lookup("dataset_id")
    print(
        f"{side.path} does not say which studies it was chosen from: new are those but the {len(known):,} that it has "
        "cells of; --old-census VERSION names the Census it was chosen from (2023-05-15 for the published store)",
        file=sys.stderr,
    )
    return known, ()
