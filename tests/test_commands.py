"""train.py and evaluate.py as a person runs them, in processes of their own."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from absl.testing import flagsaver
from messages import one_line_error
from stores import LABELS, N_GENES, N_TYPES, write_tiny_store

from hce_jax import command
from hce_jax.errors import CheckpointError, UserError
from hce_jax.store.h5ad import H5adSource
from hce_jax.training import fit

ROOT = Path(__file__).parents[1]
RESULTS = (
    "overall_metrics.csv per_class_metrics.csv per_assay_metrics.csv per_dataset_metrics.csv per_disease_metrics.csv "
    "per_tissue_metrics.csv per_tissue_general_metrics.csv hierarchical_metrics.csv calibration.csv calibration.png "
    "confusion_ontology.png performance_plot.png counts.npz"
).split()
FAST = ("--config.batch_size=30", "--config.max_epochs=2", "--config.learning_rate=0.05")


def run(cwd, script, *arguments, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=cwd,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "DATA_PATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def train(cwd, *arguments, config="linear_hce", **environment):
    return run(cwd, "train.py", "--config", str(ROOT / "configs" / f"{config}.py"), *arguments, **environment)


@pytest.fixture
def evaluated(tmp_path, monkeypatch, capsys):
    """evaluate.py in this process, in a folder of its own: give its arguments and DATA_PATH, get what it prints."""
    import evaluate  # its flags are defined for the whole process

    def run(*arguments, data_path=""):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("DATA_PATH", str(data_path))
        with flagsaver.flagsaver():
            evaluate.FLAGS(["evaluate.py", *arguments])
            evaluate.main()
        return capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def store_path(tmp_path_factory):
    return write_tiny_store(tmp_path_factory.mktemp("commands") / "store")


@pytest.fixture(scope="module")
def trained(store_path):
    done = train(store_path.parent, *FAST, DATA_PATH=str(store_path))
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_says_what_it_does_and_what_comes_next(store_path, trained):
    run_folder = store_path / "tb_logs" / "linear_hierarchical_loss" / "default" / "version_0"
    assert "90 training and 23 validation cells, 12 genes, 5 cell types" in trained
    assert "linear, 65 parameters\n" in trained  # 12 x 5 + 5
    assert len(re.findall(r"^epoch +\d+ +train loss [\d.]+ F1 [\d.]+ +val loss", trained, re.MULTILINE)) == 2
    assert f"next        python evaluate.py --split id --run {run_folder}" in trained


def test_evaluation_takes_the_newest_run_and_writes_the_metric_files_beside_it(store_path, trained):
    done = run(store_path.parent, "evaluate.py", "--split", "id", DATA_PATH=str(store_path))
    assert done.returncode == 0, done.stderr
    (folder,) = (store_path / "tb_logs/linear_hierarchical_loss/default/version_0/sctab_test").iterdir()
    (checkpoint,) = (folder.parents[1] / "checkpoints").glob("*.ckpt")
    assert folder.name + ".ckpt" == checkpoint.name
    assert {path.name for path in folder.iterdir()} == {f"linear_{name}" for name in RESULTS}
    overall = pd.read_csv(folder / "linear_overall_metrics.csv", index_col=0)
    assert list(overall.index) == ["accuracy", "macro avg", "weighted avg"]
    assert f"{overall.loc['accuracy', 'f1-score']:.4f}" in done.stdout
    assert re.search(r"test +macro F1 ([\d.]+)", trained)[1] == f"{overall.loc['macro avg', 'f1-score']:.4f}"


def test_evaluation_of_a_named_checkpoint_into_a_named_folder_with_a_subset(store_path, trained, tmp_path, evaluated):
    (checkpoint,) = (store_path / "tb_logs").glob("*/default/version_0/checkpoints/*.ckpt")
    (tmp_path / "subset.txt").write_text(f"{LABELS[1]}\n4\n")
    evaluated(f"--checkpoint={checkpoint}", "--output_dir=out", "--subset_labels=subset.txt")
    table = pd.read_csv(tmp_path / "out" / "linear_per_class_metrics.csv", index_col=0)
    subset = pd.read_csv(tmp_path / "out" / "linear_subset_metrics.csv", index_col=0)
    assert subset.loc["macro avg", "f1-score"] == pytest.approx(table.loc[[1, 4], "f1-score"].mean())


def write_study(path, labels, **columns):
    """Counts over the genes of the tiny store, in another order and with one that it lacks."""
    genes = [f"ENSG{gene:011d}" for gene in [*range(N_GENES - 1, -1, -1), 77]]
    counts = np.random.default_rng(0).poisson(3, (len(labels), len(genes)))
    obs = pd.DataFrame({"cell_type": labels, "donor_id": "d", "tissue": "lung"}, [f"c{i}" for i in range(len(labels))])
    anndata.AnnData(
        sp.csr_matrix(counts.astype(np.float32)), obs.assign(**columns), pd.DataFrame(index=genes)
    ).write_h5ad(path)
    return path


def test_new_studies_are_read_once_for_every_checkpoint_of_a_list(store_path, trained, tmp_path):
    (checkpoint,) = (store_path / "tb_logs").glob("*/default/version_0/checkpoints/*.ckpt")
    second = tmp_path / "runs" / "linear" / "default" / "version_1" / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint, second)
    (tmp_path / "list.txt").write_text(f"{checkpoint}\n{tmp_path / 'runs'}\n")
    labels = [*LABELS] * 6 + ["neuron"] * 4
    study = write_study(tmp_path / "study.h5ad", labels, donor_id=[f"d{i % 3}" for i in range(34)])
    done = run(tmp_path, "evaluate.py", "--split=ood", f"--ood_data={study}", "--checkpoint-list=list.txt")
    assert done.returncode == 0, done.stderr
    assert "30 of 34 in study.h5ad are of 5 of the model's 5 types, from 1 study" in done.stdout
    assert "left out    neuron: 4" in done.stdout
    for path in (checkpoint, second):
        folder = path.parent / path.name.removesuffix(".ckpt")
        assert {file.name for file in folder.iterdir()} == {
            f"linear_{n}" for n in [*RESULTS, "detailed_results.parquet"]
        }
        detailed = pd.read_parquet(folder / "linear_detailed_results.parquet")
        assert list(detailed["y_true"]) == labels[:30]
        assert set(detailed["tissue"]) == {"lung"}
    assert done.stdout.count("macro, labelled types") == 2


def test_several_results_go_into_folders_of_a_named_one(store_path, trained, tmp_path, evaluated):
    (checkpoint,) = (store_path / "tb_logs").glob("*/default/version_0/checkpoints/*.ckpt")
    for version in (0, 1):
        shutil.copytree(checkpoint, tmp_path / "runs" / f"version_{version}" / "checkpoints" / checkpoint.name)
    arguments = ("--checkpoint_list=runs", "--output_dir=out", "--decoder=backoff", "--confidence=0.9")
    evaluated(*arguments, data_path=store_path)
    folders = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*_overall_metrics.csv")}
    name = checkpoint.name.removesuffix(".ckpt")
    assert folders == {f"out/version_{version}/sctab_test/{name}" for version in (0, 1)}


@pytest.fixture
def checkpoint(store_path, trained, tmp_path):
    """A copy of the trained checkpoint, in a run of its own."""
    (path,) = (store_path / "tb_logs").glob("*/default/version_0/checkpoints/*.ckpt")
    return shutil.copytree(path, tmp_path / "version_0" / "checkpoints" / path.name)


def test_calibration_on_the_validation_split_is_kept_and_used_again(store_path, checkpoint, tmp_path, evaluated):
    arguments = (f"--checkpoint={checkpoint}", "--output_dir=out", "--decoder=backoff")
    said = evaluated(*arguments, "--calibrate_on=val", "--max_error=0.4", data_path=store_path)
    assert f"{checkpoint / 'calibration.json'}: calibrated on 23 cells of 1 donor, val split of" in said.err
    assert "backoff, error <= 40 %" in said.out
    table = pd.read_csv(tmp_path / "out" / "linear_hierarchical_metrics.csv", index_col="decoder")
    assert table.loc["backoff", "max_error"] == 0.4
    assert np.isnan(table.loc["backoff", "confidence"])
    (tmp_path / "out" / "linear_hierarchical_metrics.csv").unlink()
    assert "calibrated" not in evaluated(*arguments, "--max_error=0.4").err
    again = pd.read_csv(tmp_path / "out" / "linear_hierarchical_metrics.csv", index_col="decoder")
    pd.testing.assert_frame_equal(again, table)
    with pytest.raises(UserError, match=r"--max_error=0.005 cannot be promised .* or calibrate on more donors"):
        evaluated(*arguments, "--max_error=0.005")


def test_studies_that_are_calibrated_on_are_not_reported(checkpoint, tmp_path, evaluated):
    write_study(tmp_path / "one.h5ad", [*LABELS] * 8, dataset_id=["a"] * 20 + ["b"] * 20)
    write_study(tmp_path / "two.h5ad", [*LABELS] * 6, dataset_id=["b"] * 10 + ["c"] * 20)
    arguments = ("--split=ood", "--ood_data=one.h5ad,two.h5ad", f"--checkpoint={checkpoint}", "--output_dir=out")
    said = evaluated(*arguments, "--calibrate_on=some/folder/one.h5ad", "--max_error=0.5")
    assert "calibrated on 50 cells of 2 studies" in said.err
    reported = pd.read_csv(tmp_path / "out" / "linear_per_dataset_metrics.csv")
    assert reported[["dataset", "n_cells"]].to_numpy().tolist() == [["c", 20]]
    assert "which is reported on" not in said.err
    said = evaluated(*arguments, "--max_error=0.5")
    assert "the model is calibrated on 'a', which is reported on: its promised error says little" in said.err
    import evaluate as script  # its flags are defined for the whole process

    source = H5adSource.open([tmp_path / "one.h5ad", tmp_path / "two.h5ad"])
    assert script.named_studies(source, ["a"]) == ({"a"}, {"b", "c"})
    assert script.named_studies(source, ["two.h5ad"]) == ({"b", "c"}, {"a"})


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--split=ood", "--ood_data=nowhere.h5ad"), "nowhere.h5ad does not exist; name h5ad files"),
        (("--split=ood", "--ood_data="), "--ood_data has an empty name"),
        (("--ood_data=study.h5ad",), "--ood_data says nothing here: it is for --split ood"),
        (
            ("--split=ood", "--label_column=type"),
            "--label_column says nothing here: it is for --split ood with --ood_data",
        ),
        (("--split=ood", "--ood_data=study.h5ad", "--label_column=type"), "study.h5ad has no column 'type' in obs"),
        (("--split=ood", "--ood_data=study.h5ad", "--census_version=2023-12-15"), "--census_version says nothing here"),
        (("--split=ood", "--ood_data=strange.h5ad"), "no cell of strange.h5ad is of one of the model's 5 types"),
        (("--confidence=2",), "--confidence=2.0"),
        (("--model_type=mlp",), "is a linear model, not mlp (--model_type)"),
        (("--model_type=celltypist",), "--model_type celltypist needs --checkpoint model.pkl"),
        (("--checkpoint_list=absent.txt",), "absent.txt does not exist"),
        (("--max_error=0.1", "--confidence=0.9"), "--max_error and --confidence exclude each other"),
        (("--calibrate_on=val", "--confidence=0.5"), "--calibrate_on and --confidence exclude each other"),
        (("--calibrate_on=",), "--calibrate_on has an empty name"),
        (("--calibrate_on=a",), "--calibrate_on names studies of --split ood; with --split id it can be val only"),
        (
            ("--split=ood", "--ood_data=study.h5ad", "--calibrate_on=studi"),
            "--calibrate_on: study.h5ad has no study or file 'studi'; its studies are 'study'",
        ),
        (("--split=ood", "--ood_data=study.h5ad", "--calibrate_on=study"), "--calibrate_on names every study"),
    ],
)
def test_a_mistake_on_evaluate_s_command_line_is_named(store_path, trained, tmp_path, evaluated, arguments, says):
    write_study(tmp_path / "study.h5ad", ["T cell"])
    write_study(tmp_path / "strange.h5ad", ["neuron"])
    with pytest.raises(UserError, match=re.escape(says)):
        evaluated(*arguments, data_path=store_path)


def test_the_store_s_hierarchy_counts_and_another_one_of_the_checkpoint_is_said(
    store_path, trained, tmp_path, evaluated
):
    (checkpoint,) = (store_path / "tb_logs").glob("*/default/version_0/checkpoints/*.ckpt")
    shutil.copytree(store_path, tmp_path / "flat", ignore=shutil.ignore_patterns("tb_logs"))
    np.save(tmp_path / "flat" / "cell_type_hierarchy" / "child_matrix.npy", np.eye(N_TYPES))
    accuracy = {}
    for store in (store_path, tmp_path / "flat"):
        said = evaluated(f"--checkpoint={checkpoint}", f"--data_path={store}", f"--output_dir={store.name}").err
        assert ("trained with another hierarchy" in said) is (store.name == "flat")
        table = pd.read_csv(tmp_path / store.name / "linear_hierarchical_metrics.csv", index_col="decoder")
        accuracy[store.name] = table.loc["argmax", "accuracy"]
        assert (table.loc["argmax", "descendant"] > 0) == (store.name != "flat")
    assert accuracy["flat"] < accuracy["store"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("--config.batch_siz=1", "no field 'batch_siz'; did you mean 'batch_size'?"),
        ("--config.quux=1", "no field 'quux'; configs/common.py lists the fields"),
        ("--config.batch_size=many", "--config.batch_size=many: invalid literal for int()"),
        ("--config.batch_size=91", "config.batch_size is 91, but the train split has 90 cells"),
        ("--config.data_path=nowhere", "nowhere does not exist; set DATA_PATH"),
    ],
)
@pytest.mark.filterwarnings("ignore:the load_module")  # ml_collections reads the file so
def test_a_mistake_in_a_configuration_is_named(store_path, monkeypatch, change, says):
    monkeypatch.setenv("DATA_PATH", str(store_path))
    with pytest.raises(UserError, match=re.escape(says)):
        fit(command.read_config(str(ROOT / "configs" / "linear_hce.py"), [change]))


@pytest.mark.parametrize(
    ("argument", "says"), [("stray", "unexpected argument 'stray'"), ("--config.quux=1", "'quux'")]
)
def test_a_mistake_on_train_s_command_line_is_one_line_and_exit_2(store_path, argument, says):
    assert says in one_line_error(train(store_path.parent, argument, DATA_PATH=str(store_path)))


def test_a_missing_configuration_is_named(tmp_path):
    assert "python train.py --config configs/linear_hce.py" in one_line_error(run(tmp_path, "train.py"))
    absent = one_line_error(run(tmp_path, "train.py", "--config=absent.py"))
    assert "the configuration file cannot be read" in absent
    assert "absent.py" in absent


def test_a_damaged_part_found_in_mid_epoch_is_one_line_and_exit_2(tmp_path):
    path = write_tiny_store(tmp_path / "store")
    part = path / "train" / "part.0.parquet"
    data = bytearray(part.read_bytes())
    data[4:300] = bytes(296)
    part.write_bytes(data)
    says = one_line_error(train(tmp_path, *FAST, DATA_PATH=str(path)))
    assert "train/part.0.parquet is damaged: row group" in says


def test_evaluation_without_a_run_is_one_line_and_exit_2(tmp_path):
    other = write_tiny_store(tmp_path / "other")
    assert "no trained run under" in one_line_error(run(tmp_path, "evaluate.py", DATA_PATH=str(other)))


def test_evaluation_on_a_foreign_store_names_the_first_difference(store_path, trained, tmp_path, evaluated):
    other = write_tiny_store(tmp_path / "other")
    lookup = other / "categorical_lookup" / "cell_type.parquet"
    pd.DataFrame({"label": [f"type {i}" for i in range(N_TYPES)]}).to_parquet(lookup)
    checkpoint = store_path / "tb_logs" / "linear_hierarchical_loss" / "default" / "version_0"
    says = "list other cell types: number 0 is 'leukocyte' in the one and 'type 0' in the other"
    with pytest.raises(CheckpointError, match=says):
        evaluated(f"--run={checkpoint}", f"--data_path={other}")


def test_help_is_shown_with_exit_0(tmp_path):
    done = run(tmp_path, "evaluate.py", "--help")
    assert done.returncode == 0
    assert "--subset_labels" in done.stdout
