"""Checks of a run's configuration; ``configs/common.py`` has the fields with their meanings and units."""

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from hce_jax.errors import ConfigError
from hce_jax.input import PLACES
from hce_jax.store.builtin import builtin_atlas
from hce_jax.typing import PRECISIONS

#: Every field and its type: those of ``configs/common.py``.
_TYPES: dict[str, type] = {
    **dict.fromkeys(("data_path", "class_weights_filename", "cells_in", "model_type", "precision", "mask_type",
                     "log_dir", "model_name"), str),
    **dict.fromkeys(("sub_sample_frac", "dropout", "gamma", "momentum", "lambda_sparse", "epsilon", "learning_rate",
                     "weight_decay", "lr_scheduler_gamma", "gradient_clip_val", "checkpoint_every_minutes"), float),
    **dict.fromkeys(("use_hierarchical_loss", "augment_training_data"), bool),
    **dict.fromkeys(("data_seed", "shuffle_window", "hidden_size", "n_hidden", "n_d", "n_a", "n_steps", "n_independent",
                     "n_shared", "virtual_batch_size", "lr_scheduler_step_size", "batch_size", "max_epochs",
                     "early_stopping_patience", "seed", "save_top_k", "checkpoint_interval", "log_every_n_steps",
                     "profile_steps"), int),
    **dict.fromkeys(("seeds", "losses"), tuple),
}  # fmt: skip
_POSITIVE = ("learning_rate", "lr_scheduler_gamma")
_NOT_NEGATIVE = ("weight_decay", "gradient_clip_val", "epsilon", "checkpoint_every_minutes", "profile_steps")
#: The losses that can be trained together, and what each is in the configuration of a single model.
_LOSSES: dict[str, dict[str, Any]] = {
    "ce": {"use_hierarchical_loss": False},
    "hce": {"use_hierarchical_loss": True},
    "exact": {"use_hierarchical_loss": True, "epsilon": 0.0},
}
_SEEDS = ("seed", "data_seed")
_AT_LEAST_ONE = (
    "batch_size",
    "max_epochs",
    "lr_scheduler_step_size",
    "save_top_k",
    "checkpoint_interval",
    "early_stopping_patience",
    "shuffle_window",
    "log_every_n_steps",
)
#: On the small built-in atlas these stand for the published values, which would leave 11 steps an epoch.
_BUILTIN_RECIPE = {"batch_size": (2048, 256), "max_epochs": (50, 20)}


def resolve_config(config: Any) -> ConfigDict:
    """Do as :func:`resolve_configs` for a single one.

    Examples
    --------
    >>> resolve_config(linear_hce.get_config()).data_path  # doctest: +SKIP
    'data/simulated_v1'
    """
    return resolve_configs([config])[0]


def resolve_configs(configs: Sequence[Any]) -> list[ConfigDict]:
    """Check configurations and return copies that say where the cells are.

    Without a ``data_path`` that is the built-in simulated atlas, made when it is not there yet; on it the published
    batch of 2,048 cells and 50 epochs become 256 and 20, and this is said, once for all of them.

    Raises
    ------
    ConfigError
        As :func:`check_config`.
    StoreError
        If the atlas cannot be made.

    Examples
    --------
    >>> [config.batch_size for config in resolve_configs([linear_hce.get_config()])]  # doctest: +SKIP
    [256]
    """
    for config in configs:
        if not isinstance(config, ConfigDict):
            raise ConfigError(
                f"a configuration is a ConfigDict, not {type(config).__name__}; see configs/linear_hce.py"
            )
        check_config(config.to_dict())
    resolved = [ConfigDict(config.to_dict()) for config in configs]
    for config in resolved:
        for name in ("data_path", "log_dir"):  # a run is known by its configuration, wherever the command is given
            if config[name]:
                config[name] = str(Path(config[name]).expanduser().absolute())
    on_builtin = [config for config in resolved if not config.data_path]
    atlas = str(builtin_atlas().absolute()) if on_builtin else ""
    for name, (published, small) in _BUILTIN_RECIPE.items():
        if any(config[name] == published for config in on_builtin):
            print(f"on the simulated atlas {name} is {small}, not the published {published:,}")
    for config in on_builtin:
        config.data_path = atlas
        config.update(
            {name: small for name, (published, small) in _BUILTIN_RECIPE.items() if config[name] == published}
        )
    return resolved


def member_configs(config: ConfigDict) -> list[ConfigDict]:
    """Return the configuration of each model that is trained: as if it were trained alone.

    Without ``seeds`` and ``losses`` that is one; with them, one for each loss and seed.

    Examples
    --------
    >>> from configs import common
    >>> config = common.get_config()
    >>> config.seeds, config.losses = (3, 4), ("ce", "hce")
    >>> [(member.use_hierarchical_loss, member.seed) for member in member_configs(config)]
    [(False, 3), (False, 4), (True, 3), (True, 4)]
    """
    members = []
    for loss, seed in itertools.product(
        [_LOSSES[name] for name in config.losses] or [{}], config.seeds or (config.seed,)
    ):
        member = ConfigDict(config.to_dict())
        member.update(seeds=(), losses=(), seed=seed, **loss)
        members.append(member)
    return members


def loss_name(config: ConfigDict) -> str:
    """Return the name of a single model's loss: ce, hce, or exact (hce without its epsilon).

    Examples
    --------
    >>> loss_name(ConfigDict({"use_hierarchical_loss": True, "epsilon": 0.0}))
    'exact'
    """
    if not config.use_hierarchical_loss:
        return "ce"
    return "hce" if config.epsilon else "exact"


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32


def _differ(values: tuple[Any, ...]) -> bool:
    return len(set(values)) == len(values)


def check_config(config: Mapping[str, Any]) -> None:
    """Check fields, types and values of a configuration before anything is read or written.

    Raises
    ------
    ConfigError
        Naming the field, its value, and what it may be.

    Examples
    --------
    >>> from configs import common
    >>> check_config({**common.get_config().to_dict(), "learning_rate": -1.0})
    Traceback (most recent call last):
    hce_jax.errors.ConfigError: config.learning_rate is -1.0; it must be above 0 and finite
    """
    for name in (*config, *_TYPES):
        if name not in _TYPES:
            raise ConfigError(
                f"the configuration has a field {name!r} that nothing reads; configs/common.py lists them"
            )
        if name not in config:
            raise ConfigError(f"the configuration lacks the field {name!r}; begin with configs.common.get_config()")
        kind, value = _TYPES[name], config[name]
        accepted = (int, float) if kind is float else kind
        if not isinstance(value, accepted) or (kind is not bool and isinstance(value, bool)):
            raise ConfigError(f"config.{name} is {value!r}; it must be of type {kind.__name__}")
    for names, accepts, rule in (
        (_POSITIVE, lambda value: 0 < value < math.inf, "above 0 and finite"),
        (_NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "0 or more and finite"),
        (_SEEDS, _is_seed, "0 or more and below 2^32"),
        (
            ("seeds",),
            lambda value: all(map(_is_seed, value)) and _differ(value),
            "different whole numbers, each 0 or more and below 2^32",
        ),
        (
            ("losses",),
            lambda value: set(value) <= {*_LOSSES} and _differ(value),
            f"different ones out of {', '.join(_LOSSES)}, such as ('ce', 'hce')",
        ),
        (_AT_LEAST_ONE, lambda value: 1 <= value < 2**31, "1 or more and below 2^31"),
        (("sub_sample_frac",), lambda value: 0 < value <= 1, "above 0 and at most 1"),
        (("precision",), lambda value: value in ("auto", *PRECISIONS), f"one of auto, {', '.join(PRECISIONS)}"),
        (("cells_in",), lambda value: value in PLACES, f"one of {', '.join(PLACES)}"),
        (("model_name",), lambda value: re.fullmatch(r"[\w.-]*\w[\w.-]*", value), "a plain name of letters and digits"),
    ):
        for name in names:
            if not accepts(config[name]):
                raise ConfigError(f"config.{name} is {config[name]!r}; it must be {rule}")
    if {"hce", "exact"} <= {*config["losses"]} and not config["epsilon"]:
        raise ConfigError("with config.epsilon=0.0 the losses hce and exact are the same; leave one out")
