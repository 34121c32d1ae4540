"""The verb ontology."""

import argparse

from hce_jax.hierarchy.cell_ontology import CellOntology
from hce_jax.hierarchy.ontology_diff import diff_ontology
from hce_jax.store import open_store

PURPOSE = "say what another release of the Cell Ontology changes in a store"


def describe(parser: argparse.ArgumentParser) -> None:
    """Add its description and its arguments."""
    parser.description = (
        "Say what changes for the types of a store, in their labels and in the reachability matrix, with another "
        "release of the Cell Ontology. Nothing is written."
    )
    parser.add_argument("action", choices=("diff",), help="diff")
    parser.add_argument("store", metavar="STORE", help="folder of a store")
    parser.add_argument(
        "--ontology",
        metavar="RELEASE",
        help="the other release: one that cellxgene-ontology-guide carries, or an OBO file; 2026-03-26 if not given",
    )


def run(arguments: argparse.Namespace) -> None:
    """Do it, and print what changes."""
    side = open_store(arguments.store).side
    ontology = CellOntology.open(arguments.ontology)
    release = side.about.get("ontology_release")
    if release == ontology.release:
        print(
            f"{arguments.store} is of Cell Ontology {release} itself; --ontology names another release to compare with"
        )
    print(diff_ontology(side.labels, side.cl_ids, side.reachability, ontology, release).report())
