import importlib
from pathlib import Path

import pytest

from configs import common, linear_hce
from hce_jax.errors import ConfigError
from hce_jax.models import model_config
from hce_jax.training import config as training_config
from hce_jax.training.config import check_config, resolve_config

NAMES = sorted(path.stem for path in Path(common.__file__).parent.glob("*_*.py") if path.stem != "__init__")
# Learning rate, weight decay, augmentation of the published scripts.
PUBLISHED = {"linear": (5e-4, 0.01, False), "mlp": (2e-3, 0.05, True), "tabnet": (5e-3, 0.05, True)}


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_configuration_is_valid_and_has_the_published_recipe(name):
    config = importlib.import_module(f"configs.{name}").get_config()
    check_config(config.to_dict())
    model_config(config.to_dict())
    model, loss = name.split("_")
    assert (config.model_type, config.model_name, config.use_hierarchical_loss) == (model, model, loss == "hce")
    assert (config.learning_rate, config.weight_decay, config.augment_training_data) == PUBLISHED[model]
    assert (config.batch_size, config.max_epochs, config.early_stopping_patience) == (2048, 50, 10)
    assert (config.lr_scheduler_step_size, config.lr_scheduler_gamma, config.gradient_clip_val) == (1, 0.9, 1.0)


def test_there_are_two_configurations_of_each_model():
    assert NAMES == sorted(f"{model}_{loss}" for model in PUBLISHED for loss in ("ce", "hce"))


def with_field(**changes):
    return {**common.get_config().to_dict(), **changes}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (with_field(learning_rat=1.0), "has a field 'learning_rat' that nothing reads"),
        ({k: v for k, v in with_field().items() if k != "seed"}, "lacks the field 'seed'"),
        (with_field(learning_rate=None), "config.learning_rate is None; it must be of type float"),
        (with_field(max_epochs=1.5), "config.max_epochs is 1.5; it must be of type int"),
        (with_field(max_epochs=True), "config.max_epochs is True; it must be of type int"),
        (with_field(seed=2**32), "config.seed is 4294967296; it must be 0 or more and below"),
        (with_field(model_name="../../up"), "config.model_name is '../../up'; it must be a plain name"),
    ],
)
def test_a_field_that_is_unknown_missing_or_of_another_type_is_named(config, says):
    with pytest.raises(ConfigError, match=says):
        check_config(config)


def test_on_the_built_in_atlas_the_published_batch_and_epochs_become_small_and_this_is_said(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(training_config, "builtin_atlas", lambda: tmp_path)
    config = linear_hce.get_config()
    config.data_path = ""
    config.max_epochs = 3
    resolved = resolve_config(config)
    assert (resolved.data_path, resolved.batch_size, resolved.max_epochs) == (str(tmp_path), 256, 3)
    assert "batch_size is 256, not the published 2,048" in capsys.readouterr().out
    config.data_path = "store"
    assert resolve_config(config).batch_size == 2048


def test_what_is_no_configuration_is_refused():
    with pytest.raises(ConfigError, match="a configuration is a ConfigDict, not dict"):
        resolve_config({"seed": 1})
