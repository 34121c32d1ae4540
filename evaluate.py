"""Evaluate a trained model and write its metric files.

    python evaluate.py --split id                        the newest run, on the test split (held-out donors)
    python evaluate.py --split id --run DIR              that run's best checkpoint
    python evaluate.py --split id --checkpoint CKPT      that checkpoint
    python evaluate.py --split id --run DIR,DIR,DIR      an ensemble: the mean of the probabilities of several

The store is --data_path, or the folder in DATA_PATH, or the one the named run was trained on; without any of them, the
built-in simulated atlas.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from hce_jax import command
from hce_jax.checkpoint import Ensemble, load_model
from hce_jax.errors import UserError
from hce_jax.evaluation.plots import performance_plot
from hce_jax.evaluation.predict import predict_split
from hce_jax.evaluation.reports import overall_table, published_subset, read_subset, write_id_reports
from hce_jax.runs import ensemble_results_folder, id_results_folder, newest_run
from hce_jax.store import open_store
from hce_jax.store.builtin import BUILTIN_ATLAS, builtin_atlas

flags.DEFINE_enum("split", "id", ["id"], "id: held-out donors, the store's test split.")
flags.DEFINE_list("run", None, "Folder of a run (version_N), whose best checkpoint is evaluated; or several: a,b,c.")
flags.DEFINE_list("checkpoint", None, "A checkpoint folder (*.ckpt), or several.")
flags.DEFINE_string("data_path", None, "Folder of the store.")
flags.DEFINE_string("output_dir", None, "Folder for the metric files; sctab_test/ in the run's folder if not given.")
flags.DEFINE_string("subset_labels", None, "File with one cell type (label or code) a line, for the subset metrics.")
flags.DEFINE_integer("batch_size", 2048, "Cells computed at a time.", lower_bound=1)
FLAGS = flags.FLAGS


def load_ensemble() -> tuple[Ensemble, Path]:
    """Find checkpoint and store from the flags."""
    for flag in ("run", "checkpoint"):
        if FLAGS[flag].present and not all(FLAGS[flag].value or [""]):
            raise UserError(f"--{flag} has an empty name; leave the flag out to evaluate the newest run")
    if FLAGS.run and FLAGS.checkpoint:
        raise UserError("--run and --checkpoint exclude each other; give one of them")
    data_path = FLAGS.data_path or os.environ.get("DATA_PATH")
    named = FLAGS.checkpoint or FLAGS.run
    if named:
        ensemble = Ensemble([load_model(path) for path in named])
        return ensemble, Path(data_path or ensemble.card.data_path)
    if not data_path and not BUILTIN_ATLAS.is_dir():
        raise UserError("no trained run: set DATA_PATH to a store, or train first (python train.py --config FILE)")
    store_path = Path(data_path) if data_path else builtin_atlas()
    return Ensemble([load_model(newest_run(store_path / "tb_logs"))]), store_path


def results_folder(checkpoints: Sequence[Path]) -> Path:
    """Return where the metric files of a checkpoint, or of an ensemble, belong."""
    return id_results_folder(*checkpoints) if len(checkpoints) == 1 else ensemble_results_folder(checkpoints)


def main() -> None:
    """Predict the test split, write the metric files, print the overall table."""
    ensemble, store_path = load_ensemble()
    store = open_store(store_path)
    ensemble.predictors[0].check_store(store.side)
    labels, checkpoints = ensemble.card.labels, [predictor.path for predictor in ensemble.predictors]
    subset = read_subset(FLAGS.subset_labels, labels) if FLAGS.subset_labels else published_subset(labels)
    for checkpoint in checkpoints:
        print(f"checkpoint  {checkpoint}")
    print(f"store       {store.side.path}", flush=True)

    test_split = store.split("test")
    folder = Path(FLAGS.output_dir) if FLAGS.output_dir else results_folder(checkpoints)
    folder.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is found before the work
    cells = predict_split(ensemble, test_split, min(FLAGS.batch_size, test_split.n_cells))
    reports = write_id_reports(folder, ensemble.model_type, *cells, ensemble.reachability, subset)
    plot = folder / f"{ensemble.model_type}_performance_plot.png"
    title = f"{ensemble.title}: F1 per cell type, held-out donors"
    performance_plot(reports.per_type, labels, plot, title)
    print(f"results     {folder}\n\n{overall_table(reports.overall, reports.per_type)}")
    if subset is not None and reports.subset is not None:
        print(f"Over the subset of {len(subset)} types: macro F1 {reports.subset['f1-score']['macro avg']:.4f}.")


if __name__ == "__main__":
    command.run(main)
