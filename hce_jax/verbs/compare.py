"""The verb compare."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from hce_jax.errors import ConfigError

PURPOSE = "compare what losses come to: tables, pictures and tests over seeds"

#: The report, by which a folder is known to hold a comparison.
REPORT_FILE = "comparison.md"
#: The names of what a comparison writes.
_WRITTEN = re.compile(
    r"comparison\.(md|tex)|(overall|by_seed|per_type|by_class|decoders|calibration|reliability)\.csv"
    r"|(overall|waterfall|ontology|dag|by_class|calibration)(_.+)?\.(png|pdf)"
)


def describe(parser: argparse.ArgumentParser) -> None:
    """Add its description and its arguments."""
    parser.description = (
        "Compare trained models that differ in their loss, over seeds and models, from what their evaluations counted: "
        "F1 with intervals over studies, each cell type with a test over seeds, the ontology, decoders and "
        "calibration, as Markdown, LaTeX, CSV and pictures. Runs that cannot be compared are refused with the reason."
    )
    parser.add_argument(
        "runs",
        metavar="RUNS",
        nargs="+",
        type=Path,
        help="run folders (version_N), checkpoints of runs, or folders with runs below (tb_logs), all evaluated",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder of the comparison")
    parser.add_argument(
        "--data-path", metavar="STORE", type=Path, help="the store they were trained on, if it has been moved"
    )
    parser.add_argument(
        "--baseline",
        metavar="LOSS",
        help="what the other losses are compared with; CE if not given, as they are called",
    )


def run(arguments: argparse.Namespace) -> None:
    """Do it, and say what was found."""
    check_place(arguments.out)
    write(arguments.runs, arguments.out, arguments.data_path, arguments.baseline)


def check_place(folder: Path) -> None:
    """Check that a folder holds nothing but an older comparison.

    Raises
    ------
    ConfigError
        If it does, or is no folder.

    Examples
    --------
    >>> check_place(Path("no/such/folder"))
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; name a folder for the comparison: --out DIR")
    others = [] if not folder.is_dir() else sorted(path.name for path in folder.iterdir() if not _is_ours(path))
    if others:
        raise ConfigError(f"{folder} holds {others[0]}, which is of no comparison; name another folder: --out DIR")


def _is_ours(path: Path) -> bool:
    return (
        path.name.startswith(".") or _WRITTEN.fullmatch(path.name) is not None
    )  # hidden: what a kill left, or the system


def write(runs: Sequence[Path], out: Path, data_path: Path | None = None, baseline: str | None = None) -> None:
    """Compare runs, write all there is to it, and print what a person reads first.

    Parameters
    ----------
    runs, data_path, baseline
        As :func:`hce_jax.compare.load.load_comparison`.
    out
        The folder; its files appear together, and those of an older comparison go.

    Raises
    ------
    UserError
        If the runs cannot be compared, or another process writes there.

    Examples
    --------
    >>> write([Path("store/tb_logs")], Path("comparison"))  # doctest: +SKIP
    """
    from hce_jax.compare import figures, report  # take seconds, which the other verbs do not need
    from hce_jax.compare.load import load_comparison
    from hce_jax.compare.numbers import tables
    from hce_jax.files import written_together

    comparison = load_comparison(runs, data_path, baseline)
    numbers = tables(comparison)
    print(overall_table(numbers.overall))
    print()
    for note in comparison.notes:
        print(f"note        {note}")
    with written_together(out) as aside:
        report.write(comparison, numbers, figures.draw(comparison, numbers, aside), aside)
        written = {path.name for path in aside.iterdir()}
    for path in out.iterdir():
        if path.name not in written and _WRITTEN.fullmatch(path.name):  # of an older comparison
            path.unlink()
    print(f"written     {out / REPORT_FILE}")


def overall_table(overall: pd.DataFrame) -> str:
    """Lay out macro F1 for a terminal, in per cent.

    Parameters
    ----------
    overall
        Of :func:`hce_jax.compare.numbers.overall`.

    Examples
    --------
    >>> columns = ["model", "loss", "split", "average", "mean", "sd", "n_seeds", "difference", "low", "high"]
    >>> ours = ["mlp", "HCE", "ood", "macro", 0.701, 0.004, 4, 0.131, 0.092, 0.152]
    >>> print(overall_table(pd.DataFrame([ours], columns=columns)))
    model  split  F1     loss  per cent     seeds  difference, points (95 % over studies)
    mlp    ood    macro  HCE   70.1 +- 0.4  4      +13.1 (+9.2 to +15.2)
    """
    rows = [("model", "split", "F1", "loss", "per cent", "seeds", "difference, points (95 % over studies)")]
    macro = overall[overall["average"].str.startswith("macro")]
    for _, row in macro.iterrows():
        spread = "" if pd.isna(row["sd"]) else f" +- {100 * row['sd']:.1f}"
        ends = "" if pd.isna(row["low"]) else f" ({100 * row['low']:+.1f} to {100 * row['high']:+.1f})"
        gain = "" if pd.isna(row["difference"]) else f"{100 * row['difference']:+.1f}{ends}"
        f1 = f"{100 * row['mean']:.1f}{spread}"
        rows.append((row["model"], row["split"], row["average"], row["loss"], f1, str(row["n_seeds"]), gain))
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    return "\n".join(
        "".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
