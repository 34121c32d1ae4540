"""The study from a store to the comparison: what is done, what is never done twice, and what is refused."""

import dataclasses
import importlib

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score
from stores import LABELS, N_GENES, write_tiny_store
from verbs import in_process

from configs import paper
from hce_jax import evaluation, reproduce
from hce_jax.compare import figures
from hce_jax.errors import UserError
from hce_jax.evaluation.counts import Counts

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections reads so

FLAGS = (
    "--config=configs/paper.py",
    "--config.models=('linear',)",
    "--config.max_epochs=1",
    "--config.linear.batch_size=30",
    "--config.linear.learning_rate=0.05",
)


def write_study(path):
    """Write two new studies with raw counts of the tiny store's genes and types."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(LABELS), 40)
    counts = rng.poisson(3, (40, N_GENES)).astype(np.float32)
    counts[np.arange(40), 1 + labels] += 30
    obs = {"cell_type": np.array(LABELS)[labels], "donor_id": "d", "dataset_id": np.where(np.arange(40) < 20, "s", "t")}
    var = pd.DataFrame(index=[f"ENSG{gene:011d}" for gene in range(N_GENES)])
    ad.AnnData(counts, pd.DataFrame(obs, index=[f"cell{i}" for i in range(40)]), var).write_h5ad(path)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = write_tiny_store(tmp_path_factory.mktemp("reproduce") / "store")
    (path / "ood").mkdir()
    write_study(path / "ood" / "new.h5ad")
    return path


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Pictures have their own tests, and take longest."""
    monkeypatch.setattr(figures, "draw", lambda *given: [])


def done(monkeypatch, capsys, *flags):
    """Return what reproduce printed; it must not end with an error."""
    said = in_process(monkeypatch, capsys, "reproduce", *flags)
    assert "error:" not in said
    return said


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_the_study_is_planned_done_and_never_done_twice(store, monkeypatch, capsys):
    flags = (*FLAGS, "--config.seeds=(1,2)", f"--config.data_path={store}")
    before = times(store)
    said = done(monkeypatch, capsys, *flags, "--dry-run")
    assert "linear      4 models (ce, hce x seeds 1, 2), at most 1 epochs of 3 steps (few: lower" in said
    assert "evaluation  0 of 4 models are evaluated on 17 (id) and 40 (ood) cells" in said
    assert times(store) == before

    done(monkeypatch, capsys, *flags)
    overall = pd.read_csv(store / "comparison" / "overall.csv").set_index(["loss", "split", "average"])
    f1 = []
    for seed in (1, 2):
        run = store / "tb_logs" / "linear_hierarchical_loss" / "default" / f"version_{seed - 1}"
        codes = evaluation.predict(run, store).argmax(axis=1)
        labels = (np.arange(2000, 2017) * 7) % len(LABELS)
        reach = np.load(store / "cell_type_hierarchy" / "child_matrix.npy")
        f1.append(f1_score(labels, np.where(reach[labels, codes] > 0, labels, codes), average="macro"))
    assert overall.loc[("HCE", "id", "macro"), "mean"] == pytest.approx(np.mean(f1))
    assert overall.loc[("HCE", "id", "macro"), "sd"] == pytest.approx(np.std(f1, ddof=1))
    assert (store / "comparison" / "comparison.md").is_file()

    runs = times(store / "tb_logs")
    said = done(monkeypatch, capsys, *flags)
    assert "are trained: done" in said
    assert "4 of 4 models are evaluated on 17 (id) and 40 (ood) cells: done" in said
    assert times(store / "tb_logs") == runs

    stopped, promised, *_ = sorted((store / "tb_logs").rglob("sctab_test/*/linear_counts.npz"))
    stopped.unlink()  # as if the evaluation had been stopped before this model
    dataclasses.replace(Counts.read(promised), backoff={"max_error": 0.1}).write(promised)  # as of evaluate.py
    done(monkeypatch, capsys, *flags)
    again = times(store / "tb_logs")
    changed = {path.parent for path, time in again.items() if runs.get(path) != time}
    assert changed == {stopped.parent, promised.parent}


def test_a_study_without_new_studies_is_of_held_out_donors_alone(store, tmp_path, monkeypatch, capsys):
    flags = (*FLAGS, f"--config.data_path={store}", f"--config.log_dir={tmp_path / 'logs'}", "--config.seeds=(1,)")
    done(monkeypatch, capsys, *flags, "--config.new_studies=none", f"--out={tmp_path / 'out'}")
    assert set(pd.read_csv(tmp_path / "out" / "overall.csv")["split"]) == {"id"}
    assert not any((tmp_path / "logs").rglob("checkpoints/*/linear_counts.npz"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"models": ("linear", "svm")}, "config.models names 'svm'; there are linear, mlp, tabnet"),
        ({"models": ()}, r"config.models is \(\); name one or more of linear"),
        ({"models": ("mlp", "mlp")}, "each once"),
        ({"losses": ("hce",)}, "config.losses needs two or more"),
        ({"seeds": ()}, "config.seeds one or more"),
        ({"seeds": (1, 1)}, r"config.seeds is \(1, 1\)"),
        ({"max_epochs": 0}, "config.max_epochs is 0"),
        ({"new_studies": "no/such/folder"}, "no/such/folder"),
    ],
)
def test_a_study_that_makes_no_sense_is_refused(store, changes, says):
    config = paper.get_config()
    config.data_path = str(store)
    config.update(changes)
    with pytest.raises(UserError, match=says):
        reproduce.Study.of(config)


def test_a_configuration_of_a_single_run_is_no_study(monkeypatch, capsys):
    error = in_process(monkeypatch, capsys, "reproduce", "--config=configs/linear_ce.py")
    assert "this is no configuration of a study, which names its models; begin with configs/paper.py" in error


def test_the_published_recipes_are_those_of_the_single_runs():
    config = paper.get_config()
    config.data_path = "store"
    for name, ours in reproduce.model_configs(config).items():
        alone = importlib.import_module(f"configs.{name}_ce").get_config()
        differ = {field for field in ours if ours[field] != alone[field]}
        assert differ == {"data_path", "seeds", "losses"}
