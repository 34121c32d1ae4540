"""Finished and evaluated runs on disk: folders of names and counts, without a model."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from comparisons import make_counts, make_run, reachability

from hce_jax.evaluation.counts import counts_path
from hce_jax.runs import results_folder
from hce_jax.store.merlin_write import write_side_files, write_split
from hce_jax.store.schema import CATEGORICAL_COLUMNS

N_TYPES = 10
#: Training cells of each type, in the order in which they are written.
LABELS = np.repeat(np.arange(N_TYPES), [5, 3, 8, 1, 2, 0, 4, 9, 6, 7])
BEST = "val_f1_macro_epoch=3_val_f1_macro=0.812.ckpt"


def write_run(tb_logs, model="linear", loss="CE", seed=1, counts=None, *, splits=("id", "ood"), best=BEST, **config):
    """Write a run whose best checkpoint was evaluated; return its folder."""
    place = ("CE", "HCE").index(loss) if loss in ("CE", "HCE") else 2
    if counts is None:
        counts = {split: make_counts(split, N_TYPES, 10 * place + seed, 0.4 + 0.2 * place) for split in splits}
    made = make_run(model, loss, seed, counts, **config)
    run = tb_logs.joinpath(*made.folder.parts[-3:])
    if config.get("epsilon", 1e-6) != 1e-6 or loss == "HCE exact":
        run = run.with_name(f"version_{100 + seed}")
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"config": made.config}))
    (run / "result.json").write_text(json.dumps({"checkpoint": best, "val_f1_macro": 0.8123}))
    for split, each in counts.items():
        write_counts(run, split, each, best)
    return run


def write_counts(run, split, counts, checkpoint=BEST):
    path = counts_path(results_folder([run / "checkpoints" / checkpoint], split), "linear")
    path.parent.mkdir(parents=True, exist_ok=True)
    counts.write(path)


def write_runs(tb_logs, models=("linear",), losses=("CE", "HCE"), seeds=(1, 2), **changes):
    """Write a run of each; return them by model, loss and seed."""
    return {
        (model, loss, seed): write_run(tb_logs, model, loss, seed, **changes)
        for model in models
        for loss in losses
        for seed in seeds
    }


def change_config(run, **fields):
    path = run / "config.json"
    config = json.loads(path.read_text())["config"]
    path.write_text(json.dumps({"config": {**config, **fields}}))


def write_store(folder: Path, labels=LABELS, genes=("ENSG1", "ENSG2"), names=None, reach=None) -> Path:
    """A store of the types of the counts, in parts of 16 cells."""
    names = [f"type {code}" for code in range(N_TYPES)] if names is None else names
    reach = reachability(N_TYPES) if reach is None else reach
    lookups = {column: names if column == "cell_type" else ["a"] for column in CATEGORICAL_COLUMNS}
    table = pd.DataFrame({"feature_id": genes, "feature_name": genes})
    write_side_files(folder, table, lookups, class_weights=np.ones(N_TYPES), child_matrix=reach)
    obs = pd.DataFrame({column: np.zeros(len(labels), int) for column in CATEGORICAL_COLUMNS})
    obs = obs.assign(cell_type=labels, soma_joinid=np.arange(len(labels)), is_primary_data=True)
    x = sp.csr_array(np.full((len(labels), len(genes)), 0.5, np.float32))
    write_split(folder / "train", x, obs, rows_per_part=16, rows_per_group=8)
    return folder
