"""Evaluate trained models and write their metric files.

    python evaluate.py --split id                        the newest run, on the test split (held-out donors)
    python evaluate.py --split ood                       the newest run, on new studies
    python evaluate.py --split id --run DIR              that run's best checkpoint
    python evaluate.py --split id --checkpoint CKPT      that checkpoint; also a published one (model.ckpt)
    python evaluate.py --split id --run DIR,DIR,DIR      an ensemble: the mean of the probabilities of several
    python evaluate.py --split id --checkpoint_list FILE  many, one after the name of the other; cells are read once
    python evaluate.py --split id --calibrate_on val      and calibrated, for `annotate --max-error`

The store is --data_path, or the folder in DATA_PATH, or the one the named run was trained on; without any of them, the
built-in simulated atlas. New studies are those of --ood_data (h5ad files with raw counts), or the kept studies of the
simulated atlas, or else what the Census of 2023-12-15 has beyond that of 2023-05-15, which is downloaded once.
"""

import os
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from hce_jax import command
from hce_jax.errors import CheckpointError, SourceError, UserError
from hce_jax.evaluation.calibration import (
    MAX_ERRORS,
    Calibration,
    Unit,
    calibrate,
    calibration_of,
    calibration_path,
    keep,
)
from hce_jax.evaluation.cells import Cells, SourceCells, StoreCells
from hce_jax.evaluation.decoders import DECODERS
from hce_jax.evaluation.evaluate import Job, Result, Settings, evaluate
from hce_jax.evaluation.predict import Classifier
from hce_jax.evaluation.reports import decoder_table, overall_table, published_subset, read_subset
from hce_jax.hierarchy.cell_ontology import CellOntology
from hce_jax.open_model import open_model, published_checkpoint
from hce_jax.predictor import Ensemble
from hce_jax.runs import listed_checkpoints, newest_run, results_folder
from hce_jax.store import SideFiles, open_store
from hce_jax.store.builtin import BUILTIN_ATLAS, builtin_atlas
from hce_jax.store.h5ad import H5adColumns, H5adSource

CELLTYPIST = "celltypist"
#: The split to calibrate on, and to choose between models by.
VALIDATION = "val"

flags.DEFINE_enum("split", "id", ["id", "ood"], "id: held-out donors, the store's test split. ood: new studies.")
flags.DEFINE_list("run", None, "Folder of a run (version_N), whose best checkpoint is evaluated; or several: a,b,c.")
flags.DEFINE_list("checkpoint", None, "A checkpoint (*.ckpt), ours or a published one; or several.")
flags.DEFINE_string("checkpoint_list", None, "File with a checkpoint a line, or a folder of runs: each by itself.")
flags.DEFINE_string("hparams_file", None, "hparams.yaml of a published checkpoint, if it does not lie with its run.")
flags.DEFINE_enum(
    "model_type", None, ["linear", "mlp", "tabnet", CELLTYPIST], "What the checkpoint is; celltypist: a model.pkl."
)
flags.DEFINE_string("data_path", None, "Folder of the store.")
flags.DEFINE_list("ood_data", None, "h5ad files with raw counts, or folders of such: the new studies.")
flags.DEFINE_list("dataset_ids", None, "Studies of the Census, or diff_VERSION: new since then; diff_2023-05-15.")
flags.DEFINE_string("census_version", None, "Census of the new studies, a version or a copy; 2023-12-15.")
flags.DEFINE_bool("force_download", False, "Collect the new studies anew.")
flags.DEFINE_string("output_root", None, "Folder for the collected new studies; the store's if not given.")
flags.DEFINE_string("label_column", None, "obs column of --ood_data with the cell types; cell_type.")
flags.DEFINE_string("donor_column", None, "obs column of --ood_data with the donors; donor_id.")
flags.DEFINE_string("dataset_column", None, "obs column of --ood_data with the studies; dataset_id, or the file.")
flags.DEFINE_string("gene_column", None, "var column of --ood_data with ids or names; feature_id, or the index.")
flags.DEFINE_string("counts", None, "Matrix of --ood_data with raw counts: X, raw or a layer; looked for if not given.")
flags.DEFINE_string("output_dir", None, "Folder for the results; with the run or beside the checkpoint if not given.")
flags.DEFINE_string("subset_labels", None, "File with one cell type (label or code) a line, for the subset metrics.")
flags.DEFINE_enum("decoder", DECODERS[0], list(DECODERS), "How probabilities become the type that is predicted.")
flags.DEFINE_float("confidence", 0.5, "backoff: probability that the predicted type and those below it must hold.")
flags.DEFINE_float(
    "max_error",
    None,
    "backoff: share of its labels that may be wrong, by calibration.json; 0.05.",
    lower_bound=MAX_ERRORS[0],
    upper_bound=MAX_ERRORS[-1],
)
flags.DEFINE_list("calibrate_on", None, "Make calibration.json: of val, or of these studies, or files, of --split ood.")
flags.DEFINE_bool("detailed_results", None, "Write every cell's probabilities (parquet); for ood, unless said not to.")
flags.DEFINE_integer("batch_size", 2048, "Cells computed at a time.", lower_bound=1, upper_bound=32_768)
FLAGS = flags.FLAGS

_OF_H5AD = ("label_column", "donor_column", "dataset_column", "gene_column", "counts")
_OF_CENSUS = ("dataset_ids", "census_version", "force_download", "output_root")


def check_flags() -> None:
    """Refuse flags that are empty or do not go together."""
    for flag in ("run", "checkpoint", "ood_data", "dataset_ids", "calibrate_on"):
        if FLAGS[flag].present and not all(FLAGS[flag].value or [""]):
            raise UserError(f"--{flag} has an empty name; leave the flag out, or name something")
    named = [flag for flag in ("run", "checkpoint", "checkpoint_list") if FLAGS[flag].value]
    if len(named) > 1:
        raise UserError(f"--{named[0]} and --{named[1]} exclude each other; give one of them")
    useless = [flag for flag in _OF_H5AD if FLAGS[flag].value and not FLAGS.ood_data]
    useless += [flag for flag in _OF_CENSUS if FLAGS[flag].value and (FLAGS.ood_data or FLAGS.split == "id")]
    useless += ["ood_data"] if FLAGS.ood_data and FLAGS.split == "id" else []
    if useless:
        raise UserError(f"--{useless[0]} says nothing here: it is for --split ood {_where(useless[0])}")
    calibrated = [flag for flag in ("max_error", "calibrate_on") if FLAGS[flag].value is not None]
    if calibrated and FLAGS["confidence"].present:
        raise UserError(f"--{calibrated[0]} and --confidence exclude each other; give one of them")
    if FLAGS.split == "id" and (FLAGS.calibrate_on or [VALIDATION]) != [VALIDATION]:
        raise UserError("--calibrate_on names studies of --split ood; with --split id it can be val only")
    if FLAGS.model_type == CELLTYPIST and not (FLAGS.checkpoint and len(FLAGS.checkpoint) == 1):
        raise UserError("--model_type celltypist needs --checkpoint model.pkl")


def _where(flag: str) -> str:
    return "with --ood_data" if flag in _OF_H5AD else "" if flag == "ood_data" else "without --ood_data"


def named_store() -> Path | None:
    """Return the store that is asked for; None: that of the run."""
    named = FLAGS.data_path or os.environ.get("DATA_PATH")
    return Path(named) if named else None


def load_classifiers() -> list[tuple[Classifier, list[Path]]]:
    """Load the models that the flags name, each with its checkpoints, of which an ensemble has several."""
    if FLAGS.model_type == CELLTYPIST:
        from hce_jax.evaluation.celltypist import CellTypistClassifier

        return [
            (CellTypistClassifier(FLAGS.checkpoint[0], side_files("a CellTypist model")), [Path(FLAGS.checkpoint[0])])
        ]
    if FLAGS.checkpoint_list:
        groups: list[Sequence[str | Path]] = [[each] for each in listed_checkpoints(Path(FLAGS.checkpoint_list))]
    elif named := FLAGS.checkpoint or FLAGS.run:
        groups = [named]
    else:
        store = named_store()
        if store is None and not BUILTIN_ATLAS.is_dir():
            raise UserError("no trained run: set DATA_PATH to a store, or train first (python train.py --config FILE)")
        groups = [[newest_run((store or builtin_atlas()) / "tb_logs")]]
    return [_load(group) for group in groups]


def side_files(what: str) -> SideFiles:
    """Return genes and types of the named store, for a model that does not know its own."""
    if (store := named_store()) is None:
        raise UserError(f"{what} names no genes and cell types of a store; name one: DATA_PATH or --data_path")
    return open_store(store).side


def _load(paths: Sequence[str | Path]) -> tuple[Ensemble, list[Path]]:
    predictors = []
    for path in paths:
        published = published_checkpoint(Path(path)) is not None
        side = side_files(f"the published checkpoint {path}") if published else None
        predictors.append(open_model(path, side, FLAGS.hparams_file))
        if FLAGS.model_type not in (None, predictors[-1].model_type):
            raise CheckpointError(
                f"{path} is a {predictors[-1].model_type} model, not {FLAGS.model_type} (--model_type)"
            )
    return Ensemble(predictors), [predictor.path for predictor in predictors]


def store_of(classifier: Classifier) -> Path:
    """Return the named store, or the one that a model was trained on."""
    own = Path(classifier.card.data_path) if isinstance(classifier, Ensemble) else classifier.side.path
    store = named_store() or own
    if not store.is_dir():
        raise UserError(f"the store {store} is not there; name one: DATA_PATH or --data_path")
    return store


def store_cells(first: Classifier, split: str) -> StoreCells:
    """Return the cells of a split of the store."""
    cells = StoreCells(open_store(store_of(first)).split(split))
    if isinstance(first, Ensemble):
        first.predictors[0].check_store(cells.side)
    print(f"store       {cells.side.path}, {split} split: {cells.n_cells:,} cells", flush=True)
    return cells


def choose_cells(first: Classifier) -> tuple[Cells, Cells | None]:
    """Find the cells to evaluate on, and those of other studies that are to calibrate on, if such are named."""
    if FLAGS.split == "id":
        held_out = store_cells(first, "test")
        if not np.array_equal(first.side.reachability, held_out.side.reachability):
            print(f"{first.side.path} was trained with another hierarchy; the store's counts here", file=sys.stderr)
        return held_out, None
    if FLAGS.ood_data:
        files = FLAGS.ood_data
    else:
        root = Path(FLAGS.output_root) if FLAGS.output_root else store_of(first)
        print(f"store       {root}", flush=True)
        here, is_asked_for = root / "ood", any(FLAGS[name].value for name in _OF_CENSUS)
        files = [here if any(here.glob("*.h5ad")) and not is_asked_for else download(first.side, root)]
    columns = {name.removesuffix("_column"): value for name in _OF_H5AD if (value := FLAGS[name].value)}
    source, ontology = H5adSource.open(files, H5adColumns(**columns), needs_donors=False), CellOntology.open()
    if FLAGS.calibrate_on in (None, [VALIDATION]):
        cells, others = SourceCells.choose(source, first.side, ontology), None
    else:
        named, rest = named_studies(source, FLAGS.calibrate_on)
        others = SourceCells.choose(source, first.side, ontology, named)
        cells = SourceCells.choose(source, first.side, ontology, rest)
    print(cells.report(), flush=True)
    return cells, others


def named_studies(source: H5adSource, names: Collection[str]) -> tuple[set[str], set[str]]:
    """Return the studies of that name, or in files of that name, and the other ones."""
    batches = zip(source.files, source.obs_batches(), strict=True)
    of_file = {file.name: {*batch["dataset_id"].unique()} for file, batch in batches}
    every = set[str]().union(*of_file.values())
    if unknown := [name for name in names if name not in every and Path(name).name not in of_file]:
        raise SourceError(
            f"--calibrate_on: {source.title} has no study or file {unknown[0]!r}; its studies are "
            f"{', '.join(map(repr, sorted(every)))}"
        )
    named = set[str]().union(*({name} if name in every else of_file[Path(name).name] for name in names))
    if named == every:
        raise SourceError("--calibrate_on names every study, so that none is left to report on; leave one out")
    return named, every - named


def calibrations(models: Sequence[Classifier], cells: Cells, others: Cells | None) -> list[Calibration | None]:
    """Return what each model's back-off goes by: made now, or kept with its checkpoint, or nothing."""
    if not FLAGS.calibrate_on:
        return [None if FLAGS.max_error is None else kept_calibration(model, cells) for model in models]
    unit: Unit = "donor" if others is None else "study"
    labelled = store_cells(models[0], VALIDATION) if others is None else others
    made: list[Calibration | None] = []
    for model in models:
        made.append(calibration := calibrate(labelled, model, unit, FLAGS.batch_size))
        if isinstance(model, Ensemble) and len(model.predictors) == 1:
            keep(calibration, calibration_path(model.predictors[0].path))
        else:
            print(f"{model.title}: {calibration.about}; not kept, for it has no checkpoint of its own", file=sys.stderr)
    return made


def kept_calibration(model: Classifier, cells: Cells) -> Calibration:
    """Return the calibration that is kept with a model's checkpoint; say if it knows some of the cells."""
    if not isinstance(model, Ensemble):
        raise UserError(f"{model.title} has no calibration.json; add --calibrate_on val")
    calibration = calibration_of(model)
    if known := {*calibration.studies} & {*cells.lookups["dataset_id"]}:
        what = f"the model is calibrated on {min(known)!r}, which is reported on: its promised error says little"
        print(f"{what}; leave it out, or calibrate on others (--calibrate_on)", file=sys.stderr)
    return calibration


def download(side: SideFiles, root: Path) -> Path:
    """Collect the new studies of a Census, unless they are there."""
    from hce_jax.census.download import download_new_studies

    return download_new_studies(
        side,
        root,
        census_version=FLAGS.census_version or "2023-12-15",
        dataset_ids=tuple(FLAGS.dataset_ids or ["diff_2023-05-15"]),
        force=FLAGS.force_download,
    )


def result_folders(checkpoints: Sequence[Sequence[Path]]) -> list[Path]:
    """Return where the results of each model belong."""
    if FLAGS.output_dir and len(checkpoints) == 1:
        return [Path(FLAGS.output_dir)]
    folders = [results_folder(each, FLAGS.split) for each in checkpoints]
    if not FLAGS.output_dir:
        return folders
    common = Path(os.path.commonpath([folder.resolve() for folder in folders]))
    return [Path(FLAGS.output_dir) / folder.resolve().relative_to(common) for folder in folders]


def main() -> None:
    """Load the models, find the cells, write the results, print the tables."""
    check_flags()
    models = load_classifiers()
    first, checkpoints = models[0][0], [paths for _, paths in models]
    for other, _ in models[1:]:
        check_same(first, other)
    for paths in checkpoints:
        for path in paths:
            print(f"checkpoint  {path}")
    cells, others = choose_cells(first)
    settings = Settings(
        split=FLAGS.split,
        decoder=FLAGS.decoder,
        confidence=FLAGS.confidence,
        max_error=0.05 if FLAGS.max_error is None else FLAGS.max_error,
        batch_size=FLAGS.batch_size,
        detailed=FLAGS.split == "ood" if FLAGS.detailed_results is None else FLAGS.detailed_results,
        subset_labels=chosen_subset(first.side.labels),
    )
    folders = result_folders(checkpoints)
    parts = zip(models, folders, calibrations([model for model, _ in models], cells, others), strict=True)
    jobs = [Job(classifier, folder, calibration) for (classifier, _), folder, calibration in parts]
    for job, result in zip(jobs, evaluate(cells, jobs, settings), strict=True):
        report(job, result, settings)


def chosen_subset(labels: Sequence[str]) -> np.ndarray | None:
    """Return the codes of the types of the subset table, if there shall be one."""
    if FLAGS.subset_labels:
        return read_subset(FLAGS.subset_labels, labels)
    return published_subset(labels) if FLAGS.split == "id" else None


def check_same(first: Classifier, other: Classifier) -> None:
    """Check that models can be evaluated on the same cells."""
    if isinstance(first, Ensemble) and isinstance(other, Ensemble):
        remedy = "models of different stores are evaluated one after the other"
        first.predictors[0].check_alike(other.predictors[0], remedy)
    if not np.array_equal(first.side.reachability, other.side.reachability):
        raise CheckpointError(
            f"{first.side.path} and {other.side.path} have other hierarchies of the same cell types; evaluate them one "
            "by one"
        )


def report(job: Job, result: Result, settings: Settings) -> None:
    """Print what a person reads of a model's results."""
    print(f"\n{job.classifier.title}\nresults     {job.folder}\n\n{overall_table(result.tallies[settings.decoder])}")
    subset = result.reports.subset
    if subset is not None and settings.subset_labels is not None:
        macro = subset["f1-score"]["macro avg"]
        print(f"Over the subset of {len(settings.subset_labels)} types: macro F1 {macro:.4f}.")
    print(f"\n{decoder_table(result.reports.decoders)}")


if __name__ == "__main__":
    with command.sigterm_as_ctrl_c():
        command.run(main)
