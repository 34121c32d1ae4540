"""Evaluate a trained model and write its metric files.

    python evaluate.py --split id                        the newest run, on the test split (held-out donors)
    python evaluate.py --split id --run DIR              that run's best checkpoint
    python evaluate.py --split id --checkpoint CKPT      that checkpoint

The store is --data_path, or the folder in DATA_PATH, or the one the named run was trained on; without any of them, the
built-in simulated atlas.
"""

import os
from pathlib import Path

from absl import flags

from hce_jax import command
from hce_jax.checkpoint import Predictor, load_model
from hce_jax.errors import UserError
from hce_jax.evaluation.plots import performance_plot
from hce_jax.evaluation.predict import predict_split
from hce_jax.evaluation.reports import overall_table, published_subset, read_subset, write_id_reports
from hce_jax.runs import id_results_folder, newest_run
from hce_jax.store import open_store
from hce_jax.store.builtin import BUILTIN_ATLAS, builtin_atlas

flags.DEFINE_enum("split", "id", ["id"], "id: held-out donors, the store's test split.")
flags.DEFINE_string("run", None, "Folder of a run (version_N); its best checkpoint is evaluated.")
flags.DEFINE_string("checkpoint", None, "A checkpoint folder (*.ckpt).")
flags.DEFINE_string("data_path", None, "Folder of the store.")
flags.DEFINE_string("output_dir", None, "Folder for the metric files; sctab_test/ in the run's folder if not given.")
flags.DEFINE_string("subset_labels", None, "File with one cell type (label or code) a line, for the subset metrics.")
flags.DEFINE_integer("batch_size", 2048, "Cells computed at a time.", lower_bound=1)
FLAGS = flags.FLAGS


def load_predictor() -> tuple[Predictor, Path]:
    """Find checkpoint and store from the flags."""
    if FLAGS.run and FLAGS.checkpoint:
        raise UserError("--run and --checkpoint exclude each other; give one of them")
    data_path = FLAGS.data_path or os.environ.get("DATA_PATH")
    named = FLAGS.checkpoint or FLAGS.run
    if named:
        predictor = load_model(named)
        return predictor, Path(data_path or predictor.card.data_path)
    if not data_path and not BUILTIN_ATLAS.is_dir():
        raise UserError("no trained run: set DATA_PATH to a store, or train first (python train.py --config FILE)")
    store_path = Path(data_path) if data_path else builtin_atlas()
    return load_model(newest_run(store_path / "tb_logs")), store_path


def main() -> None:
    """Predict the test split, write the metric files, print the overall table."""
    predictor, store_path = load_predictor()
    store = open_store(store_path)
    predictor.check_store(store.side)
    labels = predictor.card.labels
    subset = read_subset(FLAGS.subset_labels, labels) if FLAGS.subset_labels else published_subset(labels)
    print(f"checkpoint  {predictor.path}\nstore       {store.side.path}", flush=True)

    test_split = store.split("test")
    folder = Path(FLAGS.output_dir) if FLAGS.output_dir else id_results_folder(predictor.path)
    folder.mkdir(parents=True, exist_ok=True)  # a place that cannot be written is found before the work
    cells = predict_split(predictor, test_split, min(FLAGS.batch_size, test_split.n_cells))
    reports = write_id_reports(folder, predictor.model_type, *cells, predictor.reachability, subset)
    plot = folder / f"{predictor.model_type}_performance_plot.png"
    loss = "hierarchical cross entropy" if predictor.card.loss["use_hierarchical_loss"] else "cross entropy"
    title = f"{predictor.model_type}, {loss}: F1 per cell type, held-out donors"
    performance_plot(reports.per_type, labels, plot, title)
    print(f"results     {folder}\n\n{overall_table(reports.overall, reports.per_type)}")
    if subset is not None and reports.subset is not None:
        print(f"Over the subset of {len(subset)} types: macro F1 {reports.subset['f1-score']['macro avg']:.4f}.")


if __name__ == "__main__":
    command.run(main)
