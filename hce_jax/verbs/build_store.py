"""The verb build-store."""

import argparse
import dataclasses
import shlex
from collections.abc import Iterator
from typing import Any

from hce_jax.errors import ConfigError
from hce_jax.hierarchy.cell_ontology import CellOntology
from hce_jax.store.augmentations import AugmentationOptions
from hce_jax.store.build import FORMATS, Built, Recipe, build_store
from hce_jax.store.selection import PUBLISHED_ASSAYS, Rules
from hce_jax.store.split_cells import SplitTable
from hce_jax.verbs import sources

PURPOSE = "build a store from the CELLxGENE Census or from h5ad files"

#: Training with a batch size wants so many batches; the published one.
_STEPS_PER_EPOCH, PUBLISHED_BATCH = 10, 2_048
#: Flag, what it counts, and its field in AugmentationOptions.
_AUGMENTATIONS = {
    "cells": "training cells to take means of",
    "pairs_per_type": "pairs of tech_samples of a type at most",
    "threshold": "differences that are smaller become 0",
    "limit": "differences are cut to +- this",
    "clusters": "of k-means over all differences",
    "min_cluster_size": "only clusters with more differences are used; scaled down for small stores",
    "vectors": "to draw",
}


def describe(parser: argparse.ArgumentParser) -> None:
    """Add its description and its arguments."""
    default = Recipe()
    parser.description = (
        "Build a store: choose cells and genes by the published rules, split donors, shuffle all cells on disk, and "
        "write class weights, reachability matrix, augmentation vectors and a summary beside them. Counts are "
        "streamed. Interrupted, the same command goes on with what is not finished."
    )
    parser.add_argument("destination", metavar="DESTINATION", help="folder of the store; must not exist yet")
    sources.describe(parser)
    _describe_rules(parser.add_argument_group("which cells; the published rules if not given"), default)
    made = parser.add_argument_group("what is made")
    made.add_argument(
        "--splits",
        metavar="FILE",
        help="CSV or parquet with the columns split (train, val, test) and soma_joinid, tech_sample, donor_id or "
        "dataset_id; with soma_joinid also cell_type, in place of the cells' own. If not given: tech_samples 70/15/15",
    )
    made.add_argument("--split-column", metavar="NAME", help="of obs in the h5ad files: train, val or test")
    made.add_argument("--seed", type=int, default=default.seed, help="of splits and order; 1 if not given")
    made.add_argument("--format", choices=FORMATS, default=default.format, help="cells if not given")
    made.add_argument("--workers", type=int, default=2, metavar="N", help="chunks or parts at a time; 2 if not given")
    vectors = parser.add_argument_group("augmentation vectors")
    vectors.add_argument("--no-augmentations", action="store_true", help="make none")
    for field in dataclasses.fields(AugmentationOptions):
        if field.name in _AUGMENTATIONS:
            flag, what = f"--augment-{field.name.replace('_', '-')}", _AUGMENTATIONS[field.name]
            help_text = f"{what}; {field.default} if not given"
            vectors.add_argument(flag, type=type(field.default), default=field.default, metavar="N", help=help_text)


def _describe_rules(rules: argparse._ArgumentGroup, default: Recipe) -> None:
    count: dict[str, Any] = {"type": int, "metavar": "N"}
    rules.add_argument("--include-secondary", action="store_true", help="also cells that are not marked primary")
    rules.add_argument(
        "--assays", nargs="+", metavar="NAME", default=list(PUBLISHED_ASSAYS), help="the seven of 10x; or any"
    )
    rules.add_argument("--tissues", nargs="+", metavar="NAME", help="general tissues; any if not given")
    rules.add_argument("--below", metavar="TYPE", default=default.rules.below, help="types below this one; or any")
    rules.add_argument("--min-cells", default=default.rules.min_cells, help="of a type; 5000", **count)
    rules.add_argument(
        "--min-tech-samples", default=default.rules.min_tech_samples, help="with a type; 31: more than 30", **count
    )
    rules.add_argument(
        "--min-ancestors",
        help="of a type in the ontology. If not given: more than 7 with a release in which the published types have "
        "these (2022-12-15), any number with others",
        **count,
    )
    rules.add_argument(
        "--keep-copies", action="store_true", help="keep cells whose counts are those of another, as published"
    )
    rules.add_argument(
        "--genes",
        default=default.genes,
        metavar="FILE",
        help="parquet or CSV with feature_id, or with feature_name; protein-coding: where the source says which code "
        "for proteins; or all",
    )
    rules.add_argument(
        "--ontology",
        metavar="RELEASE",
        help="release of the Cell Ontology that cellxgene-ontology-guide carries, or an OBO file; 2026-03-26",
    )


def run(arguments: argparse.Namespace) -> None:
    """Do it, and say what was done."""
    if arguments.workers < 1:
        raise ConfigError(f"--workers={arguments.workers}: at least one is needed")
    if arguments.seed < 0:
        raise ConfigError(f"--seed={arguments.seed}: it must be 0 or more")
    if arguments.splits and arguments.split_column:
        raise ConfigError("--splits and --split-column both say which cell goes where; give one of them")
    rules = Rules(
        primary=not arguments.include_secondary,
        assays=sources.unless_any(arguments.assays),
        tissues=sources.unless_any(arguments.tissues),
        below=None if arguments.below == sources.ANY else arguments.below,
        min_cells=arguments.min_cells,
        min_tech_samples=arguments.min_tech_samples,
        min_ancestors=arguments.min_ancestors,
    )
    vectors = AugmentationOptions(
        **{name: getattr(arguments, f"augment_{name}") for name in _AUGMENTATIONS}, seed=arguments.seed
    )
    recipe = Recipe(
        rules=rules,
        genes=arguments.genes,
        seed=arguments.seed,
        keep_copies=arguments.keep_copies,
        format=arguments.format,
        augmentations=None if arguments.no_augmentations else vectors,
    )
    ontology = CellOntology.open(arguments.ontology)
    splits = SplitTable.read(arguments.splits) if arguments.splits else None
    with sources.opened(arguments, arguments.split_column) as source:
        built = build_store(
            source, arguments.destination, recipe, ontology=ontology, splits=splits, workers=arguments.workers
        )
    _report(built, ontology)


def _report(built: Built, ontology: CellOntology) -> None:
    cells = sum(built.cells.values())
    print(f"store       {built.store}")
    print(f"cells       {cells:,} ({', '.join(f'{name} {n:,}' for name, n in built.cells.items())})")
    print(f"types       {len(built.selection.cl_ids)}, Cell Ontology {ontology.release} from {ontology.source}")
    for title, found in built.genes_found.items():
        print(f"genes       {found:,} of {built.n_genes:,} are in {title}")
    if built.copies.cells:
        across = f"{built.copies.across_splits:,} of them would lie in another split"
        print(f"copies      {built.copies.cells:,} cells have the counts of another cell; {across}")
    if built.cells_as_values:
        print(f"kept as     values {built.cells_as_values:,}: counts that are not whole numbers, or above 65,535")
    if built.empty:
        print(f"empty       {built.empty:,} cells express none of the genes")
    for note in built.notes:
        print(f"note        {note}")
    if built.untrained:
        print(
            f"untrained   {', '.join(built.untrained)}: no cell in train, so no model can learn it; try another --seed"
        )
    if built.augmentations is not None:
        made = built.augmentations
        of = f"{made.pairs:,} differences of {made.groups:,} means (of a type in a tech_sample)"
        kept = f"{made.clusters_kept} of {made.clusters} clusters kept"
        print(f"augment     {len(made.vectors):,} vectors of {of}, {kept}")
    if built.new_cells:
        rate = built.new_cells / built.seconds
        print(f"time        {built.seconds:,.0f} s to read and shuffle {built.new_cells:,} cells, {rate:,.0f} cells/s")
    print(f"look at     {built.store}/data_summary.png")
    print(
        f"next        DATA_PATH={shlex.quote(str(built.store.resolve()))} python train.py {' '.join(_training(built))}"
    )


def _training(built: Built) -> Iterator[str]:
    """Give the flags of train.py that suit the store."""
    yield "--config configs/tabnet_hce.py"
    if built.cells["train"] < _STEPS_PER_EPOCH * PUBLISHED_BATCH:
        yield f"--config.batch_size={max(1 << (built.cells['train'] // _STEPS_PER_EPOCH).bit_length() - 1, 16)}"
    if built.augmentations is None or not len(built.augmentations.vectors):
        yield "--config.augment_training_data=false"
