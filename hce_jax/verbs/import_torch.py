"""The verb import-torch."""

import argparse
import shlex
from pathlib import Path

from hce_jax.errors import CheckpointError
from hce_jax.store import open_store

PURPOSE = "make a checkpoint of one of the published PyTorch code"


def describe(parser: argparse.ArgumentParser) -> None:
    """Add its description and its arguments."""
    parser.description = (
        "Make a checkpoint of hce_jax of one that PyTorch Lightning wrote for microsoft/hce-classification or "
        "theislab/scTab (linear, MLP, TabNet). Torch is not needed, and nothing that the file asks for is executed."
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="the .ckpt file, or the folder of its run (its best one)")
    parser.add_argument(
        "--hparams",
        metavar="FILE",
        type=Path,
        help="the run's hparams.yaml, where the checkpoint has no hyper-parameters and it lies elsewhere",
    )
    parser.add_argument(
        "--store",
        metavar="STORE",
        required=True,
        help="folder of the store it was trained on, which says genes and cell types; the checkpoint does not",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the new checkpoint; must not exist yet")


def run(arguments: argparse.Namespace) -> None:
    """Do it, and say what was found."""
    from hce_jax.checkpoint import save_model  # takes seconds, which the other verbs do not need
    from hce_jax.open_model import published_checkpoint
    from hce_jax.torch_import import load_torch_checkpoint

    out = arguments.out
    if out.exists():
        raise CheckpointError(f"{out} exists already; name another --out")
    path = published_checkpoint(Path(arguments.checkpoint))
    if path is None:
        raise CheckpointError(f"{arguments.checkpoint} is a folder, not a .ckpt file of the published code")
    side = open_store(arguments.store).side
    model = load_torch_checkpoint(path, side, arguments.hparams)
    save_model(out, model.card, model.reachability, model.params, model.stats)
    card = model.card
    loss = "hierarchical cross entropy" if card.loss["use_hierarchical_loss"] else "cross entropy"
    score = f", validation macro F1 {card.scores['val_f1_macro']:.4f}" if "val_f1_macro" in card.scores else ""
    print(f"read        {path}")
    print(f"model       {model.model_type}, {loss}, epoch {card.epoch}, step {card.step:,}{score}")
    print(f"for         {side.n_genes:,} genes, {side.n_types} cell types: those of {side.path}, in their order there")
    print(f"checkpoint  {out}")
    print(f"next        python evaluate.py --split=id --checkpoint={shlex.quote(str(out))}")
