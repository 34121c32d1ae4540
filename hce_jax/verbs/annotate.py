"""The verb annotate."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from hce_jax import command
from hce_jax.errors import ConfigError

if TYPE_CHECKING:
    from hce_jax.annotate import Annotation

PURPOSE = "name the cell types of your own cells, at the depth that the data support"
#: Labels that are printed.
_MOST_LABELS = 20


def describe(parser: argparse.ArgumentParser) -> None:
    """Add its description and its arguments."""
    parser.description = (
        "Write a copy of a file with the cell types of its cells (columns hce_* of obs), their embedding (obsm X_hce), "
        "and a report (HTML). The file itself is only read; one larger than memory will do."
    )
    parser.add_argument("cells", metavar="CELLS", help=".h5ad, .zarr, 10x .h5, or a 10x folder with matrix.mtx")
    parser.add_argument(
        "--checkpoint",
        metavar="RUN",
        required=True,
        help="a checkpoint or a run folder (its best); several, a,b,c: the mean of their probabilities",
    )
    parser.add_argument("-o", "--out", metavar="FILE", type=Path, required=True, help="the copy, .h5ad or .zarr")
    parser.add_argument(
        "--max-error",
        metavar="SHARE",
        type=float,
        help="share of the labels that may be wrong, on cells like those of the calibration; 0.05. The model's "
        "calibration.json says what keeps it; where there is none, it is made from the validation split of its store",
    )
    parser.add_argument(
        "--confidence",
        metavar="MASS",
        type=float,
        help="instead: the probability that a label and the types below it must hold together, e.g. 0.9",
    )
    parser.add_argument("--group-by", metavar="COLUMN", help="obs column with clusters; each gets a label, too")
    parser.add_argument(
        "--counts", metavar="MATRIX", help="X, raw or a layer; by default the one with raw counts, or the next best"
    )
    parser.add_argument(
        "--gene-column", metavar="COLUMN", help="var column with ids or names; by default the one that fits best"
    )
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="write the probability of every type and those below it (obsm hce_probabilities)",
    )
    parser.add_argument(
        "--explain", action="store_true", help="write the genes that drove each label, against its nearest sibling"
    )
    parser.add_argument("--batch-size", metavar="N", type=int, default=2048, help="cells computed at a time; 2048")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE and what lies beside it, if it is there")


def run(arguments: argparse.Namespace) -> None:
    """Do it, and say what was found."""
    from hce_jax.annotate import Settings, annotate_file, files_of  # takes seconds, which the other verbs do not need

    settings = Settings(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Settings)})
    checkpoints = [each for each in arguments.checkpoint.split(",") if each]
    if not checkpoints:
        raise ConfigError("--checkpoint is empty; name a checkpoint or a run folder")

    def say(lines: str) -> None:
        print(lines, flush=True)

    with command.sigterm_as_ctrl_c():
        annotation = annotate_file(
            arguments.cells, arguments.out, checkpoints, settings, overwrite=arguments.overwrite, say=say
        )
    print(summary(annotation))
    for what, path in files_of(arguments.out, settings).items():
        print(f"{what:12}{path}")


def summary(annotation: "Annotation") -> str:
    """Say how many cells got which label, in lines for a person."""
    labels = annotation.obs["hce_label"].value_counts()
    n_labelled = int((annotation.labels.codes >= 0).sum())
    lines = [f"labels      {n_labelled:,} of {len(annotation.obs):,} cells have one"]
    lines += [f"            {n_cells:>9,}  {label}" for label, n_cells in labels.head(_MOST_LABELS).items()]
    if len(labels) > _MOST_LABELS:
        lines.append(f"            {labels.iloc[_MOST_LABELS:].sum():>9,}  of {len(labels) - _MOST_LABELS} more types")
    return "\n".join(lines)
