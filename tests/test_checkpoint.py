import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from flax import nnx
from stores import write_tiny_store

from hce_jax import checkpoint as checkpoints
from hce_jax.checkpoint import (
    FORMAT_VERSION,
    ModelCard,
    delete_checkpoint,
    load_model,
    load_state,
    recover_states,
    save_model,
    save_state,
    state_about,
)
from hce_jax.errors import CheckpointError
from hce_jax.models import build_model, split_model
from hce_jax.runs import checkpoint_name
from hce_jax.store import open_store
from hce_jax.typing import PRECISIONS

CARD = ModelCard(
    config={"model_type": "linear", "precision": "float32"},
    gene_ids=("ENSG1", "ENSG2", "ENSG3", "ENSG4"),
    gene_names=("A", "B", "C", "D"),
    labels=("T cell", "CD4-positive T cell", "B cell"),
    cl_ids=("CL:0000084", "CL:0000624", "CL:0000236"),
    ontology_release="2022-12-15",
    normalisation="sf-log1p",
    loss={"use_hierarchical_loss": True, "epsilon": 1e-6},
    data_path="store",
    epoch=3,
    step=400,
    scores={"val_loss": 0.5, "val_f1_macro": 0.8, "val_f1_micro": 0.9},
)
REACH = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]], np.float32)


@pytest.fixture
def model():
    return build_model(CARD.config, 4, 3, nnx.Rngs(5), precision=PRECISIONS["float32"])


@pytest.fixture
def checkpoint(tmp_path, model):
    _, params, stats = split_model(model)
    path = tmp_path / "val_f1_macro_epoch=3_val_f1_macro=0.800.ckpt"
    save_model(path, CARD, REACH, params, stats)
    return path


def test_a_checkpoint_gives_back_weights_card_and_hierarchy(checkpoint, model):
    predictor = load_model(checkpoint)
    assert predictor.card == CARD
    assert predictor.model_type == "linear"
    np.testing.assert_array_equal(predictor.reachability, REACH)
    restored = nnx.merge(predictor.graphdef, predictor.params, predictor.stats)
    np.testing.assert_array_equal(restored.linear.kernel, model.linear.kernel)
    np.testing.assert_array_equal(restored.linear.bias, model.linear.bias)


def test_a_saved_checkpoint_needs_nothing_else(checkpoint, tmp_path):
    moved = tmp_path / "elsewhere"
    checkpoint.rename(moved)
    assert load_model(moved).card == CARD


@pytest.mark.parametrize("kind", [np.asarray, sp.csr_array, sp.csr_matrix, sp.csc_array, pd.DataFrame, jnp.asarray])
@pytest.mark.parametrize("batch_size", [1, 4, 2048])
def test_probabilities_are_the_softmax_whatever_the_input_s_kind_and_the_batch(checkpoint, model, kind, batch_size):
    x = np.random.default_rng(0).poisson(1, (10, 4)).astype(np.float32)
    logits = x.astype(np.float64) @ np.asarray(model.linear.kernel, np.float64) + np.asarray(model.linear.bias)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = load_model(checkpoint).predict_proba(kind(x), batch_size)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_no_cells_give_no_probabilities(checkpoint):
    assert load_model(checkpoint).predict_proba(np.empty((0, 4), np.float32)).shape == (0, 3)


def test_cells_of_another_number_of_genes_are_refused(checkpoint):
    with pytest.raises(CheckpointError, match=r"x has shape \(2, 5\), but the model .* expects \(cells, 4 genes\)"):
        load_model(checkpoint).predict_proba(np.zeros((2, 5)))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_of_no_cells_is_refused(checkpoint, batch_size):
    with pytest.raises(CheckpointError, match=f"batch_size is {batch_size}; it must be 1 or more"):
        load_model(checkpoint).predict_proba(np.zeros((2, 4)), batch_size)


def test_an_existing_checkpoint_is_not_overwritten(checkpoint, model):
    _, params, stats = split_model(model)
    with pytest.raises(CheckpointError, match="exists already"):
        save_model(checkpoint, CARD, REACH, jax.tree.map(jnp.zeros_like, params), stats)
    restored = load_model(checkpoint)
    assert np.asarray(restored.params["linear"]["kernel"][...]).any()


def test_a_deleted_checkpoint_leaves_nothing(checkpoint):
    delete_checkpoint(checkpoint)
    assert not list(checkpoint.parent.iterdir())


def truncate_weights(path):
    largest = max((path / "model").rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
    largest.write_bytes(largest.read_bytes()[:-50])


def remove_weights(path):
    for file in (path / "model" / "d").iterdir():
        file.unlink()


def newer(path):
    file = path / "_CHECKPOINT_METADATA"
    described = json.loads(file.read_text())
    described["custom_metadata"]["format_version"] = FORMAT_VERSION + 1
    file.write_text(json.dumps(described))


def not_ours(path):
    file = path / "_CHECKPOINT_METADATA"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"custom_metadata": {"a": 1}}))


def broken_card(path):
    (path / "_CHECKPOINT_METADATA").write_text("{")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate_weights, "is damaged"),
        (remove_weights, "is damaged"),
        (newer, f"has format version {FORMAT_VERSION + 1}, this hce_jax reads up to {FORMAT_VERSION}; install a newer"),
        (not_ours, "is not a checkpoint of hce_jax"),
        (broken_card, "is not a (readable )?checkpoint"),
    ],
)
def test_a_damaged_checkpoint_is_named_in_one_line(checkpoint, damage, says):
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=says) as raised:
        load_model(checkpoint)
    assert str(checkpoint) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "empty.ckpt").mkdir()
    (tmp_path / "file.ckpt").write_text("text")
    for name in ("empty.ckpt", "file.ckpt"):
        with pytest.raises(CheckpointError, match=rf"{name} is not a .*checkpoint"):
            load_model(tmp_path / name)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gene_ids": ("g1",)}, "has 4 genes, the store .* has 1"),
        ({"gene_ids": ("ENSG1", "ENSG3", "ENSG2", "ENSG4")}, "number 1 is 'ENSG2' in the one and 'ENSG3' in the other"),
        (
            {"labels": ("T cell", "CD4-positive T cell", "NK cell")},
            "other cell types: number 2 is 'B cell' .* 'NK cell'",
        ),
        ({"labels": ("T cell",)}, "has 3 cell types, the store .* has 1"),
    ],
)
def test_a_store_of_other_genes_or_labels_is_refused_with_the_first_difference(checkpoint, tmp_path, changes, says):
    side = open_store(write_tiny_store(tmp_path / "store")).side
    fitting = dataclasses.replace(side, gene_ids=CARD.gene_ids, labels=CARD.labels)
    predictor = load_model(checkpoint)
    predictor.check_store(fitting)
    with pytest.raises(CheckpointError, match=says):
        predictor.check_store(dataclasses.replace(fitting, **changes))


def test_the_best_of_a_run_is_the_best_also_where_three_digits_are_equal(tmp_path, model):
    _, params, stats = split_model(model)
    for epoch, score in enumerate((0.9006, 0.9012, 0.9009)):
        card = dataclasses.replace(CARD, epoch=epoch, scores=CARD.scores | {"val_f1_macro": score})
        save_model(tmp_path / "checkpoints" / checkpoint_name(epoch, score), card, REACH, params, stats)
    assert load_model(tmp_path).card.epoch == 1


# --- states


def test_a_state_comes_back_as_it_was_and_replaces_the_one_before(tmp_path):
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "step": np.array(7, np.int32)}
    save_state(tmp_path / "7", {"w": np.zeros(1)}, {"epoch": 0})
    save_state(tmp_path / "7", arrays, {"epoch": 1, "score": 1 / 3})
    found, about = load_state(tmp_path / "7")
    assert about == {"epoch": 1, "score": 1 / 3} == state_about(tmp_path / "7")
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert [path.name for path in tmp_path.iterdir()] == ["7"]


def test_a_state_with_other_numbers_than_were_written_is_damaged(tmp_path, monkeypatch):
    save_state(tmp_path / "7", {"v": np.zeros(2), "w": np.ones(3)}, {})
    other = {"state": {"v": np.zeros(2), "w": np.array([1.0, 1.0, 2.0])}}
    monkeypatch.setattr(checkpoints.ocp, "load_checkpointables", lambda path: other)
    with pytest.raises(CheckpointError, match="7 is damaged: w is not what was written"):
        load_state(tmp_path / "7")


def test_after_a_kill_what_was_replaced_comes_back_and_what_was_not_finished_goes(tmp_path):
    for name in ("7.replaced", "8", "8.replaced", "9.new", "9.new.orbax-checkpoint-tmp", ".deleted-5", "6"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "of").write_text(name)
    recover_states(tmp_path)
    assert {path.name: (path / "of").read_text() for path in tmp_path.iterdir()} == {
        "6": "6",
        "7": "7.replaced",
        "8": "8",
    }
