"""Checkpoints of the published code, as models of this package."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from conftest import DEFAULT_GOLDEN_DIR
from flax import nnx
from torch_files import Opcodes, named, pickled, state_dict, storage, tensor, write_checkpoint, write_torch_file
from verbs import in_process

from hce_jax.checkpoint import load_model, save_model
from hce_jax.errors import CheckpointError
from hce_jax.hierarchy import reachability_from_edges
from hce_jax.open_model import open_model
from hce_jax.runs import checkpoint_name, epoch_and_score
from hce_jax.store import SideFiles
from hce_jax.store.merlin_write import write_side_files
from hce_jax.torch_file import open_torch_file
from hce_jax.torch_import import load_torch_checkpoint

# Logits and embedding, probabilities: README of the golden vectors.
TOLERANCES = {"linear": (1e-5, 1e-5), "mlp": (1e-5, 1e-5), "tabnet": (5e-4, 5e-5)}
LABELS = ("leukocyte", "T cell", "CD4-positive T cell", "B cell")
REACH = reachability_from_edges(4, ((0, 1), (1, 2), (0, 3)))


@pytest.fixture(autouse=True)
def _no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # to import it is an error


def side_files(n_genes=6, reachability=REACH, labels=LABELS):
    genes = [tuple(f"{kind}{g}" for g in range(n_genes)) for kind in ("ENSG", "G")]
    return SideFiles(Path("store"), *genes, labels, None, np.asarray(reachability, np.float32), {})


def golden_side(golden):
    reach = golden.arrays["child_matrix"]
    return side_files(golden.arrays["x"].shape[1], reach, tuple(f"type {c}" for c in range(len(reach))))


def hyper_parameters(**changes):
    fields = {"gene_dim": 6, "type_dim": 4, "learning_rate": 5e-4, "optimizer": named("torch.optim.adamw", "AdamW"),
              "lr_scheduler_kwargs": {"step_size": 1, "verbose": True}, "use_hierarchical_loss": True}  # fmt: skip
    return {name: value for name, value in {**fields, **changes}.items() if value is not None}


def arrays_of(seed=0, **changes):
    """Give the arrays of a small linear model: those of None are left out."""
    rng = np.random.default_rng(seed)
    arrays = {
        "class_weights": np.ones(4, np.float32),
        "child_lookup": REACH.astype(np.int64),
        "child_lookup_transposed": REACH.T.astype(np.float32),
        "classifier.weight": rng.normal(size=(4, 6)).astype(np.float32),
        "classifier.bias": rng.normal(size=4).astype(np.float32),
    }
    return {name: array for name, array in {**arrays, **changes}.items() if array is not None}


def saved_by(path):
    """Give the arrays and hyper-parameters of a checkpoint, to be changed and written again."""
    with open_torch_file(path) as file:
        arrays = {name: file.array(tensor) for name, tensor in file.content["state_dict"].items()}
        plain = (int, float, str)
        return arrays, {k: v for k, v in file.content["hyper_parameters"].items() if isinstance(v, plain)}


def golden_checkpoint(model):
    return DEFAULT_GOLDEN_DIR / "checkpoints" / model / "model.ckpt"


def golden_pieces(model):
    """Give arrays, hyper-parameters and side files of a golden checkpoint."""
    arrays, fields = saved_by(golden_checkpoint(model))
    reach = arrays["child_lookup"]
    return arrays, fields, side_files(60, reach, tuple(f"type {c}" for c in range(len(reach))))


def refused(path, side=None, hparams_path=None):
    with pytest.raises(CheckpointError) as raised:
        load_torch_checkpoint(path, side or side_files(), hparams_path)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def cells(n_genes=6):
    return np.random.default_rng(1).random((5, n_genes)).astype(np.float32)


def softmax(logits):
    powers = np.exp(np.asarray(logits, np.float64))
    return powers / powers.sum(axis=1, keepdims=True)


# --- the published numbers


@nnx.jit
def everything(model, x):
    """Give logits, embedding and explanation of a model, as far as it has them, in one compilation."""
    return model(x), *(getattr(model, name)(x) if hasattr(model, name) else None for name in ("embed", "explain"))


def assert_same_weights(found, expected):
    for ours, theirs in ((found.params, expected.params), (found.stats, expected.stats)):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.golden("checkpoint")
def test_golden_checkpoint_gives_the_published_numbers(golden):
    model_type, arrays = golden.config["model"], golden.arrays
    predictor = load_torch_checkpoint(golden.path.with_name("model.ckpt"), golden_side(golden))
    assert predictor.model_type == model_type
    atol, atol_probabilities = TOLERANCES[model_type]
    model = nnx.merge(predictor.graphdef, predictor.params, predictor.stats)
    (logits, auxiliary), embedding, explained = everything(model, jnp.asarray(arrays["x"]))
    np.testing.assert_allclose(logits, arrays["logits"], atol=atol, rtol=0)
    probabilities = predictor.predict_proba(arrays["x"], 16)
    np.testing.assert_allclose(probabilities, arrays["probs"], atol=atol_probabilities, rtol=0)
    if "embedding" in arrays:
        np.testing.assert_allclose(embedding, arrays["embedding"], atol=atol, rtol=0)
    if "m_explain" in arrays:
        importance, masks = explained
        np.testing.assert_allclose(importance, arrays["m_explain"], atol=atol, rtol=0)
        np.testing.assert_allclose([mask.sum(1) for mask in masks], np.ones((2, 16)), atol=1e-5)
        np.testing.assert_allclose(auxiliary.mean(), -1e-5 * arrays["m_loss"], atol=1e-9, rtol=0)

    card = predictor.card
    name = Path(golden.config["original_relative_path"]).name
    assert epoch_and_score(name) == (card.epoch, pytest.approx(card.scores["val_f1_macro"], abs=5e-4))
    assert f"{card.scores['val_f1_macro']:.3f}" in name
    assert (card.epoch, card.step) == (0, 5)  # one epoch of five steps
    assert card.loss == {"use_hierarchical_loss": True, "epsilon": 1e-6}
    np.testing.assert_array_equal(predictor.reachability, arrays["child_matrix"])


@pytest.mark.golden("checkpoint", lightning_version="2.4.0")
def test_golden_import_torch_makes_a_checkpoint_that_gives_the_same(golden, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    side, model = golden_side(golden), golden.config["model"]
    genes = pd.DataFrame({"feature_id": side.gene_ids, "feature_name": side.gene_names})
    lookups = {"cell_type": side.labels}
    write_side_files(Path("store"), genes, lookups, class_weights=np.ones(9), child_matrix=side.reachability)
    ckpt = golden.path.with_name("model.ckpt").absolute()
    said = in_process(monkeypatch, capsys, "import-torch", str(ckpt), "--store=store", "--out=mine.ckpt")
    imported, original = load_model("mine.ckpt"), load_torch_checkpoint(ckpt, side)
    for line in (
        f"read        {ckpt}",
        f"model       {model}, hierarchical cross entropy, epoch 0, step 5, "
        f"validation macro F1 {original.card.scores['val_f1_macro']:.4f}",
        "for         60 genes, 9 cell types: those of store, in their order there",
        "checkpoint  mine.ckpt",
        "next        python evaluate.py --split=id --checkpoint=mine.ckpt",
    ):
        assert line in said.splitlines()
    assert imported.card == original.card
    assert imported.card.data_path == str(tmp_path / "store")
    assert_same_weights(imported, original)
    probabilities = imported.predict_proba(golden.arrays["x"], 16)
    np.testing.assert_allclose(probabilities, golden.arrays["probs"], atol=TOLERANCES[model][1], rtol=0)
    again = in_process(monkeypatch, capsys, "import-torch", str(ckpt), "--store=store", "--out=mine.ckpt")
    assert again == "error: mine.ckpt exists already; name another --out"
    ours = in_process(monkeypatch, capsys, "import-torch", "mine.ckpt", "--store=store", "--out=more.ckpt")
    assert ours == "error: mine.ckpt is a folder, not a .ckpt file of the published code"


def test_a_linear_model_is_its_matrix_and_its_bias_whatever_its_floats(tmp_path):
    for dtype in (np.float32, np.float64, np.float16):
        arrays = {name: array.astype(dtype) if name.startswith("classifier.") else array
                  for name, array in arrays_of().items()}  # fmt: skip
        path = write_checkpoint(tmp_path / "a.ckpt", arrays, hyper_parameters())
        predictor = load_torch_checkpoint(path, side_files())
        logits = cells().astype(np.float64) @ arrays["classifier.weight"].T + arrays["classifier.bias"]
        np.testing.assert_allclose(predictor.predict_proba(cells(), 5), softmax(logits), atol=1e-6)
        assert {leaf.dtype.name for leaf in jax.tree.leaves(predictor.params)} == {"float32"}
    assert (predictor.card.epoch, predictor.card.step) == (3, 40)
    assert predictor.card.gene_names == ("G0", "G1", "G2", "G3", "G4", "G5")
    assert predictor.card.labels == LABELS


def test_sctab_s_checkpoints_lack_what_the_hierarchical_loss_added(tmp_path):
    arrays = arrays_of(child_lookup_transposed=None, sample_labels=np.zeros(30, np.int64),
                       augmentations=np.zeros((2, 6), np.float32), feature_means=np.zeros(6, np.float32))  # fmt: skip
    path = write_checkpoint(tmp_path / "a.ckpt", arrays, hyper_parameters(use_hierarchical_loss=None))
    assert load_torch_checkpoint(path, side_files()).card.loss["use_hierarchical_loss"] is False
    arrays["feature_means"][2] = 0.1
    path = write_checkpoint(tmp_path / "a.ckpt", arrays, hyper_parameters(use_hierarchical_loss=None))
    assert "a.ckpt is of an older scTab, which subtracts feature_means from the expression" in refused(path)


# --- what does not fit


@pytest.mark.parametrize(
    ("changes", "fields", "says"),
    [
        ({"classifier.bias": None}, {}, "a.ckpt lacks classifier.bias, which a linear model of its hyper-parameters"),
        ({"classifier.extra": np.ones(2)}, {}, "a.ckpt has classifier.extra, which a linear model of its hyper-param"),
        ({"metric.counts": np.ones(2), "a": np.ones(1)}, {}, "a.ckpt has a and 1 more, which a linear model"),
        ({"classifier.weight": np.ones((4, 7))}, {}, "classifier.weight of a.ckpt has shape (4, 7); with its hyper-"
         "parameters, and 6 genes and 4 cell types, it should have (4, 6)"),
        ({"classifier.bias": np.ones(5)}, {}, "classifier.bias of a.ckpt has shape (5,)"),
        ({}, {"gene_dim": 7}, "the checkpoint a.ckpt has 7 genes, the store store has 6; name the store that it was"),
        ({}, {"type_dim": 5}, "the checkpoint a.ckpt has 5 cell types, the store store has 4; name the store that"),
        ({"child_lookup": np.eye(4, dtype=np.int64)}, {}, "has another hierarchy than the store store: whether 'T cell'"
         " belongs to 'leukocyte' differs (child_lookup)"),
        ({"child_lookup_transposed": REACH.astype(np.float32)}, {}, "differs (child_lookup_transposed)"),
        ({"child_lookup": np.eye(3, dtype=np.int64)}, {}, "child_lookup of a.ckpt is no hierarchy of 4 cell types"),
        ({"classifier.weight": None}, {}, "a.ckpt is not a checkpoint of the published models: it has none of"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, monkeypatch, changes, fields, says):
    monkeypatch.chdir(tmp_path)
    path = write_checkpoint(Path("a.ckpt"), arrays_of(**changes), hyper_parameters(**fields))
    assert says in refused(path)


@pytest.mark.parametrize(
    ("model", "fields", "says"),
    [
        ("mlp", {"n_hidden": 4}, "lacks classifier.encoder.12.bias and 6 more, which a mlp model"),
        ("mlp", {"n_hidden": 2}, "has classifier.encoder.8.bias and 6 more, which a mlp model"),
        ("mlp", {"hidden_size": 15}, "has shape (16,); with its hyper-parameters, and 60 genes and 9 cell types, it"),
        ("mlp", {"n_hidden": None}, "the hyper-parameters of a.ckpt lack n_hidden, which a mlp model needs"),
        ("mlp", {"n_hidden": "3"}, "the hyper-parameter n_hidden of a.ckpt is of type str; it must be of type int"),
        ("mlp", {"n_hidden": 3.0}, "the hyper-parameter n_hidden of a.ckpt is of type float; it must be of type"),
        ("mlp", {"dropout": 1.0}, "not usable: config.dropout is 1.0; it must be at least 0 and below 1"),
        ("tabnet", {"n_steps": 1}, "has classifier.encoder.att_transformers.1.bn.bn.bias and"),
        ("tabnet", {"n_shared": 3}, "lacks classifier.encoder.feat_transformers.0.shared.glu_layers.2.bn.bn.bias and"),
        ("tabnet", {"n_a": 5}, "has shape (60, 4); with its hyper-parameters, and 60 genes"),
        ("tabnet", {"mask_type": "softmax"}, "not usable: config.mask_type is 'softmax'; choose one of"),
    ],
)
def test_hyper_parameters_of_another_model_are_named(tmp_path, monkeypatch, model, fields, says):
    monkeypatch.chdir(tmp_path)
    arrays, saved, side = golden_pieces(model)
    changed = {name: value for name, value in {**saved, **fields}.items() if value is not None}
    assert says in refused(write_checkpoint(Path("a.ckpt"), arrays, changed), side)


def test_all_names_of_a_shared_weight_must_hold_the_same_numbers(tmp_path):
    arrays, fields, side = golden_pieces("tabnet")
    whole = write_checkpoint(tmp_path / "whole.ckpt", arrays, fields)  # each name has a storage of its own here
    expected = load_torch_checkpoint(golden_checkpoint("tabnet"), side)
    assert_same_weights(load_torch_checkpoint(whole, side), expected)
    shared = [f"classifier.encoder.{block}.shared.{kind}" for block in ("initial_splitter", "feat_transformers.0",
              "feat_transformers.1") for kind in ("shared_layers.1.weight", "glu_layers.1.fc.weight")]  # fmt: skip
    for name in shared[1:]:
        other = arrays[name].copy()
        other[3, 2] += 1e-3
        path = write_checkpoint(tmp_path / "a.ckpt", {**arrays, name: other}, fields)
        assert f"has two values for one shared weight: {shared[0]} and {name} differ" in refused(path, side)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([1, 2], "has no state_dict; it is not a checkpoint of PyTorch Lightning"),
        ({"epoch": 3}, "has no state_dict; it is not a checkpoint of PyTorch Lightning"),
        ({"state_dict": [1]}, "has no state_dict; it is not a checkpoint of PyTorch Lightning"),
        ({"state_dict": {"classifier.weight": 3}}, "classifier.weight in the state_dict of"),
        ({"state_dict": {4: tensor(storage("0", "FloatStorage", 1), 0, (), ())}}, "4 in the state_dict of"),
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, content, says):
    assert says in refused(write_torch_file(tmp_path / "a.ckpt", content))


def test_a_checkpoint_without_epoch_is_named(tmp_path):
    path = write_checkpoint(tmp_path / "a.ckpt", arrays_of(), hyper_parameters(), epoch=None)
    assert "a.ckpt does not say its epoch" in refused(path)


# --- hparams.yaml

HPARAMS = """\
gene_dim: 6
learning_rate: 0.0005
lr_scheduler: !!python/name:torch.optim.lr_scheduler.StepLR ''
made_by: !!python/object/apply:os.system [touch witness]
optimizer: !!python/name:torch.optim.adamw.AdamW ''
type_dim: 4
use_hierarchical_loss: true
"""


@pytest.mark.parametrize("place", ["checkpoints/hparams.yaml", "hparams.yaml", "elsewhere.yaml"])
def test_hyper_parameters_come_from_hparams_yaml_whose_python_tags_are_not_executed(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    Path("checkpoints").mkdir()
    path = write_checkpoint(Path("checkpoints/a.ckpt"), arrays_of())
    assert "has no hyper-parameters, and no hparams.yaml lies beside it" in refused(path)
    Path(place).write_text(HPARAMS)
    predictor = load_torch_checkpoint(path, side_files(), place if place == "elsewhere.yaml" else None)
    assert predictor.card.loss["use_hierarchical_loss"] is True
    assert not Path("witness").exists()
    Path(place).write_text(HPARAMS.replace("gene_dim: 6", "gene_dim: 8"))
    assert "has 8 genes" in refused(path, hparams_path=place if place == "elsewhere.yaml" else None)


@pytest.mark.golden("checkpoint", lightning_version="2.6.6")
def test_golden_hparams_yaml_agrees_with_its_checkpoint_and_suffices(golden, tmp_path):
    side, ckpt, hparams = (
        golden_side(golden),
        golden.path.with_name("model.ckpt"),
        golden.path.with_name("hparams.yaml"),
    )
    expected = load_torch_checkpoint(ckpt, side, hparams).card.config
    path = write_checkpoint(tmp_path / "a.ckpt", saved_by(ckpt)[0])
    assert load_torch_checkpoint(path, side, hparams).card.config == expected


def test_an_hparams_yaml_that_cannot_be_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_checkpoint(Path("a.ckpt"), arrays_of(), hyper_parameters())
    for text, says in (
        (
            HPARAMS.replace("0.0005", "0.001"),
            "h.yaml is of another model than a.ckpt: learning_rate is 0.001 in the one",
        ),
        ("a: [", "h.yaml is not readable YAML"),
        ("- a\n", "h.yaml has no fields; it is not the hparams.yaml of a run"),
    ):
        Path("h.yaml").write_text(text)
        assert says in refused(path, hparams_path="h.yaml")
    assert "no.yaml cannot be read: No such file" in refused(path, hparams_path="no.yaml")


# --- scores, runs

RUN = "tb_logs/cxg_2023_05_15_linear/default/version_0/checkpoints/"


def with_scores(path, epoch, kept):
    """Write a checkpoint whose callbacks kept the files of these names and scores."""
    storages = {}
    of_files = state_dict({f"{RUN}{name}": np.array(score, np.float32) for name, score in kept.items()}, storages)
    of_loss = state_dict({f"{RUN}val_loss_epoch={epoch}_val_loss=0.9.ckpt": np.array(0.9, np.float32)}, storages)
    callbacks = {"EarlyStopping": {"patience": 10}, "ModelCheckpoint 1": {"best_k_models": of_loss},
                 "ModelCheckpoint 2": {"best_k_models": of_files}}  # fmt: skip
    content = {"epoch": epoch, "global_step": 40, "callbacks": callbacks, "hyper_parameters": hyper_parameters(),
               "state_dict": state_dict(arrays_of(), storages)}  # fmt: skip
    return write_torch_file(path, content, storages)


def test_the_score_is_exact_where_a_callback_kept_it_and_of_the_name_otherwise(tmp_path):
    def scores(path):
        return load_torch_checkpoint(path, side_files()).card.scores

    kept = {checkpoint_name(1, 0.8): 0.75, checkpoint_name(2, 0.81): 0.8125}
    assert scores(with_scores(tmp_path / "a.ckpt", 2, kept)) == {"val_f1_macro": 0.8125}
    assert scores(with_scores(tmp_path / checkpoint_name(4, 0.83), 4, kept)) == {"val_f1_macro": 0.83}
    assert scores(with_scores(tmp_path / checkpoint_name(5, 0.83), 4, kept)) == {}  # renamed
    assert scores(with_scores(tmp_path / "a.ckpt", 4, kept)) == {}


def test_of_a_published_run_the_best_is_opened(tmp_path):
    folder = tmp_path / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    for epoch, score in enumerate((0.8006, 0.8012, 0.8009, 0.7)):
        with_scores(folder / checkpoint_name(epoch, score), epoch, {checkpoint_name(epoch, score): score})
    (folder / "last_epoch=4.ckpt").write_bytes(b"")
    assert open_model(tmp_path / "version_0", side_files()).card.epoch == 1
    assert open_model(folder / checkpoint_name(3, 0.7), side_files()).card.epoch == 3
    with pytest.raises(CheckpointError, match=r"0\.801\.ckpt is of the published PyTorch code and names neither"):
        open_model(tmp_path / "version_0")
    with pytest.raises(CheckpointError, match="version_1 does not exist"):
        open_model(tmp_path / "version_1")


def test_a_checkpoint_of_ours_is_opened_without_a_store(tmp_path):
    model = load_torch_checkpoint(write_checkpoint(tmp_path / "a.ckpt", arrays_of(), hyper_parameters()), side_files())
    ours = tmp_path / "version_0" / "checkpoints" / checkpoint_name(3, 0.5)
    save_model(ours, model.card, model.reachability, model.params, model.stats)
    for path in (ours, tmp_path / "version_0"):
        assert open_model(path).card == model.card


def test_a_checkpoint_in_the_run_folder_of_another_model_is_refused(tmp_path):
    folder = tmp_path / "cxg_2023_05_15_tabnet_hierarchical_loss" / "default" / "version_0" / "checkpoints"
    folder.mkdir(parents=True)
    path = write_checkpoint(folder / checkpoint_name(1, 0.8), arrays_of(), hyper_parameters())
    with pytest.raises(CheckpointError, match="is a linear model, but its run folder says tabnet"):
        open_model(path, side_files())


def test_a_checkpoint_of_another_class_is_refused_by_name(tmp_path):
    fields = hyper_parameters(lr_scheduler=named("torch.optim.lr_scheduler", "CyclicLR"))
    path = write_checkpoint(tmp_path / "a.ckpt", arrays_of(), fields)
    assert "its pickle asks for 'torch.optim.lr_scheduler.CyclicLR'" in refused(path)
    fields = hyper_parameters(optimizer=Opcodes(named("os", "system") + pickled(("touch witness",)) + b"R"))
    assert "asks for 'os.system'" in refused(write_checkpoint(path, arrays_of(), fields))
