"""Checks of a run's configuration; ``configs/common.py`` has the fields with their meanings and units."""

import math
from collections.abc import Mapping
from typing import Any

from hce_jax.errors import ConfigError
from hce_jax.typing import PRECISIONS

_POSITIVE = ("learning_rate", "lr_scheduler_gamma")
_NOT_NEGATIVE = ("weight_decay", "gradient_clip_val", "seed", "data_seed", "epsilon")
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


def check_config(config: Mapping[str, Any]) -> None:
    """Check the values of a configuration before anything is read or written.

    Raises
    ------
    ConfigError
        Naming the field, its value, and what it may be.

    Examples
    --------
    >>> check_config({"learning_rate": -1.0})
    Traceback (most recent call last):
    hce_jax.errors.ConfigError: config.learning_rate is -1.0; it must be above 0 and finite
    """
    for names, accepts, rule in (
        (_POSITIVE, lambda value: 0 < value < math.inf, "above 0 and finite"),
        (_NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "0 or more and finite"),
        (_AT_LEAST_ONE, lambda value: value >= 1, "1 or more"),
        (("sub_sample_frac",), lambda value: 0 < value <= 1, "above 0 and at most 1"),
        (("precision",), lambda value: value in ("auto", *PRECISIONS), f"auto, {', '.join(PRECISIONS)}"),
    ):
        for name in names:
            if name in config and not accepts(config[name]):
                raise ConfigError(f"config.{name} is {config[name]!r}; it must be {rule}")
