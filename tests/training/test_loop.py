import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from fits import fit_one as fit
from sklearn.metrics import f1_score
from stores import FIRST_CELL, LABELS, N_GENES, N_TYPES, SIZES, expression, label_of, write_tiny_store
from tensorboardX.proto.event_pb2 import Event

from configs import linear_ce, linear_hce
from hce_jax import evaluation
from hce_jax.checkpoint import load_model
from hce_jax.errors import ConfigError, TrainingError
from hce_jax.hierarchy import correct_predictions
from hce_jax.store import open_store
from hce_jax.training import trainer


@pytest.fixture(scope="module")
def store_path(tmp_path_factory):
    return write_tiny_store(tmp_path_factory.mktemp("fit") / "store")


def small(module, store_path, **changes):
    config = module.get_config()
    with config.unlocked():
        config.update(data_path=str(store_path), batch_size=30, max_epochs=3, learning_rate=0.05, log_every_n_steps=2)
        config.update(changes)
    return config


@pytest.fixture(scope="module")
def result(store_path):
    return fit(small(linear_hce, store_path))


def events(run):
    """Read TensorBoard's record file: length, its checksum, an event, its checksum."""
    (path,) = run.glob("events.out.tfevents.*")
    data, scalars = path.read_bytes(), {}
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        for value in event.summary.value:
            scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
        data = data[16 + length :]
    return scalars


def split_cells(name):
    cells = FIRST_CELL[name] + np.arange(SIZES[name])
    return expression(cells), label_of(cells)


def test_the_run_lies_where_the_published_code_puts_it(store_path, result):
    assert result.run == store_path / "tb_logs" / "linear_hierarchical_loss" / "default" / "version_0"
    names = {path.name for path in result.run.iterdir() if not path.name.startswith("events.out.tfevents.")}
    assert names == {"hparams.yaml", "parameters.json", "config.json", "result.json", "checkpoints"}
    assert {path.name for path in (result.run / "checkpoints").iterdir()} == {result.checkpoint.name, "last"}
    hparams = yaml.safe_load((result.run / "hparams.yaml").read_text())
    assert (hparams["gene_dim"], hparams["type_dim"], hparams["train_set_size"]) == (N_GENES, N_TYPES, 90)
    assert json.loads((result.run / "parameters.json").read_text())["learning_rate"] == 0.05
    described = json.loads((result.run / "config.json").read_text())
    assert described["config"]["use_hierarchical_loss"] is True
    assert described["versions"]["jax"] == jax.__version__


def test_tensorboard_has_the_published_tags_at_the_right_steps(result):
    scalars = events(result.run)
    steps = {tag: [step for step, _ in points] for tag, points in scalars.items()}
    per_epoch = ("train_f1_macro_epoch", "train_f1_micro_epoch", "val_loss", "val_f1_macro", "val_f1_micro", "epoch")
    for tag in per_epoch:
        assert steps[tag] == [2, 5, 8]
    for tag in ("train_loss", "train_f1_macro_step", "train_f1_micro_step", "lr-AdamW"):
        assert steps[tag] == [1, 3, 5, 7]  # every second step, the ends of epochs included
    np.testing.assert_allclose([v for _, v in scalars["lr-AdamW"]], [0.05, 0.045, 0.045, 0.0405], rtol=1e-6)
    for tag in ("hp_metric", "test_loss", "test_f1_macro", "test_f1_micro"):
        assert steps[tag] == [8]
    assert set(scalars) == {*per_epoch, "train_loss", "train_f1_macro_step", "train_f1_micro_step", "lr-AdamW",
                            "hp_metric", "test_loss", "test_f1_macro", "test_f1_micro"}  # fmt: skip
    assert scalars["hp_metric"][0][1] == pytest.approx(max(value for _, value in scalars["val_f1_macro"]))


@pytest.mark.parametrize("module", [linear_ce, linear_hce])
def test_scores_equal_sklearn_s_of_the_checkpoint_s_own_probabilities(store_path, module):
    result = fit(small(module, store_path, max_epochs=2, learning_rate=0.01))
    predictor = load_model(result.checkpoint)
    for name, found in (
        ("val", evaluation.validate(result.run)),
        ("test", evaluation.test(result.checkpoint)),
        ("test", result.test),
    ):
        x, targets = split_cells(name)
        p = predictor.predict_proba(x).astype(np.float64)
        predictions = p.argmax(axis=1)
        corrected = correct_predictions(targets, predictions, predictor.reachability)
        present = np.union1d(targets, corrected)
        macro = f1_score(targets, corrected, labels=present, average="macro", zero_division=0)
        assert found.f1_macro == pytest.approx(macro, abs=1e-9)
        assert found.f1_micro == pytest.approx((corrected == targets).mean(), abs=1e-9)
        loss_targets = np.where(corrected == targets, predictions, targets)
        if module is linear_hce:
            mass = (p * predictor.reachability[loss_targets]).sum(axis=1) + 1e-6
        else:
            mass = p[np.arange(len(p)), loss_targets]
        assert found.loss == pytest.approx(-np.log(mass).mean(), abs=1e-5)
    assert result.val_f1_macro == evaluation.validate(result.run).f1_macro


def test_predict_gives_the_split_in_the_order_of_the_store(result):
    expected = load_model(result.run).predict_proba(split_cells("test")[0])
    np.testing.assert_allclose(evaluation.predict(result.run, batch_size=5), expected, atol=1e-6)


def test_training_lowers_the_loss_and_learns_this_easy_store(result):
    assert result.test.f1_micro > 0.9


def weights(result):
    return np.asarray(load_model(result.checkpoint).params["linear"]["kernel"][...])


def test_the_same_configuration_gives_the_same_bits_and_each_seed_changes_what_it_should(store_path, result, tmp_path):
    once = {"log_dir": str(tmp_path), "max_epochs": 1}
    base, same, seed, data_seed = (
        weights(fit(small(linear_hce, store_path, **once, **changes)))
        for changes in ({}, {}, {"seed": 2}, {"data_seed": 1})
    )
    np.testing.assert_array_equal(base, same)
    assert not np.array_equal(base, seed)
    assert not np.array_equal(base, data_seed)


@pytest.mark.parametrize("place", ["host", "device"])
def test_where_the_cells_lie_changes_no_bit(store_path, result, tmp_path, place):
    elsewhere = fit(small(linear_hce, store_path, log_dir=str(tmp_path), cells_in=place))
    np.testing.assert_array_equal(weights(elsewhere), weights(result))
    assert elsewhere.val_f1_macro == result.val_f1_macro


def test_it_stops_after_patience_epochs_without_a_better_score(store_path, tmp_path):
    config = small(linear_hce, store_path, log_dir=str(tmp_path), max_epochs=9, early_stopping_patience=2,
                   learning_rate=1e-12)  # fmt: skip
    result = fit(config)  # nothing moves, so the first epoch stays the best
    assert result.epochs == 3
    assert "epoch=0_" in result.checkpoint.name


def test_a_profile_of_some_steps_lies_where_tensorboard_looks(store_path, tmp_path, capsys):
    result = fit(small(linear_ce, store_path, log_dir=str(tmp_path), profile_steps=1))
    assert len(list(result.run.glob("plugins/profile/*/*.xplane.pb"))) == 1
    assert f"profile     {result.run} " in capsys.readouterr().out


def test_a_sub_sample_uses_the_first_parts_of_train_and_val_only(store_path, tmp_path):
    result = fit(small(linear_ce, store_path, log_dir=str(tmp_path), sub_sample_frac=0.5, max_epochs=1))
    hparams = yaml.safe_load((result.run / "hparams.yaml").read_text())
    assert (hparams["train_set_size"], hparams["val_set_size"]) == (64, 23)  # 2 of 3 parts, 1 of 1
    assert result.test == evaluation.test(result.checkpoint, batch_size=30)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"batch_size": 91}, "config.batch_size is 91, but the train split has 90 cells"),
        ({"max_epochs": 0}, "config.max_epochs is 0; it must be 1 or more"),
        ({"sub_sample_frac": 0.0}, "config.sub_sample_frac is 0.0; it must be above 0 and at most 1"),
        ({"precision": "fp8"}, "config.precision is 'fp8'; it must be one of auto, float32, tf32, bf16"),
        ({"epsilon": -1e-6}, "config.epsilon is -1e-06; it must be 0 or more and finite"),
        ({"learning_rate": float("inf")}, "config.learning_rate is inf; it must be above 0 and finite"),
        ({"weight_decay": float("nan")}, "config.weight_decay is nan; it must be 0 or more and finite"),
        ({"model_type": "forest"}, "config.model_type is 'forest'; choose one of linear"),
    ],
)
def test_a_bad_value_is_named_before_a_run_folder_is_made(store_path, tmp_path, changes, says):
    with pytest.raises(ConfigError, match=says):
        fit(small(linear_ce, store_path, log_dir=str(tmp_path), **changes))
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_stops_training_and_keeps_the_last_checkpoint(store_path, tmp_path, monkeypatch):
    made = trainer.make_train_step

    def poisoned(*arguments):
        step = made(*arguments)

        def train_step(state, batch):
            state, metrics = step(state, batch)
            loss = jnp.where(state.step == 6, jnp.nan, metrics.loss)  # the last step of the second epoch
            return state, metrics._replace(loss=loss)

        return train_step

    monkeypatch.setattr(trainer, "make_train_step", poisoned)
    with pytest.raises(
        TrainingError,
        match="the training loss became nan at step 5; the step before it was well, and the last save is that of step",
    ):
        fit(small(linear_ce, store_path, log_dir=str(tmp_path)))
    assert load_model(tmp_path / "linear" / "default" / "version_0").card.epoch == 0


def test_epsilon_zero_is_the_exact_loss(store_path, tmp_path):
    result = fit(small(linear_hce, store_path, log_dir=str(tmp_path), epsilon=0.0, max_epochs=1))
    x, targets = split_cells("test")
    p = load_model(result.run).predict_proba(x).astype(np.float64)
    reach = open_store(store_path).side.reachability
    corrected = correct_predictions(targets, p.argmax(axis=1), reach)
    mass = (p * reach[np.where(corrected == targets, p.argmax(axis=1), targets)]).sum(axis=1)
    assert evaluation.test(result.run).loss == pytest.approx(-np.log(mass).mean(), abs=1e-6)


def test_labels_and_cl_ids_travel_with_the_checkpoint(result):
    card = load_model(result.checkpoint).card
    assert card.labels == LABELS
    assert card.cl_ids is None
    assert card.scores["val_f1_macro"] == result.val_f1_macro
