"""The models: each a file with its config dataclass and its Flax NNX module.

A model is called as ``model(x, train=..., key=...)`` and returns the logits (b, c) and an auxiliary loss (b,), one
value per cell, whose mean the objective adds (TabNet's mask sparsity; zero elsewhere). ``train=True`` uses and updates
batch statistics and needs the random ``key`` where the model draws numbers.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from hce_jax.errors import ConfigError
from hce_jax.models.linear import Linear, LinearConfig
from hce_jax.models.mlp import MLP, MLPConfig
from hce_jax.models.tabnet import TabNet, TabNetConfig
from hce_jax.typing import Precision, Variables

__all__ = [
    "MLP",
    "MODELS",
    "Linear",
    "LinearConfig",
    "MLPConfig",
    "TabNet",
    "TabNetConfig",
    "build_model",
    "model_config",
    "split_model",
]

#: model_type -> (its config, its module). To add a model: one file, one line here, one config file, one test.
MODELS: dict[str, tuple[type, Callable[..., nnx.Module]]] = {
    "linear": (LinearConfig, Linear),
    "mlp": (MLPConfig, MLP),
    "tabnet": (TabNetConfig, TabNet),
}


def model_config(config: Mapping[str, Any]) -> Any:
    """Pick the hyper-parameters of ``config["model_type"]`` out of a run's configuration.

    Raises
    ------
    ConfigError
        If there is no such model, or a hyper-parameter is missing.

    Examples
    --------
    >>> model_config({"model_type": "linear", "learning_rate": 5e-4})
    LinearConfig()
    """
    model_type = config["model_type"]
    if model_type not in MODELS:
        raise ConfigError(f"config.model_type is {model_type!r}; choose one of {', '.join(MODELS)}")
    config_class, _ = MODELS[model_type]
    names = [field.name for field in dataclasses.fields(config_class)]
    missing = [name for name in names if name not in config]
    if missing:
        raise ConfigError(f"config lacks {', '.join(missing)}, which the {model_type} model needs")
    return config_class(**{name: config[name] for name in names})


def build_model(
    config: Mapping[str, Any], n_genes: int, n_types: int, rngs: nnx.Rngs, *, precision: Precision
) -> nnx.Module:
    """Build the model that a configuration names.

    Parameters
    ----------
    config
        A run's configuration, or the model part of a checkpoint: ``model_type`` and the model's hyper-parameters.
    n_genes, n_types
        Sizes of the input and of the output.
    rngs
        Source of the initial weights, stream ``params``.
    precision
        How matrix products are computed.

    Raises
    ------
    ConfigError
        As :func:`model_config`.

    Examples
    --------
    >>> from hce_jax.typing import PRECISIONS
    >>> build_model({"model_type": "linear"}, 5, 3, nnx.Rngs(0), precision=PRECISIONS["float32"]).linear.kernel.shape
    (5, 3)
    """
    settings = model_config(config)
    _, model_class = MODELS[config["model_type"]]
    return model_class(settings, n_genes, n_types, precision=precision, rngs=rngs)


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, Variables, Variables]:
    """Take a model apart: its structure, its parameters, and its other variables (running statistics).

    ``nnx.merge`` puts it together again.

    Examples
    --------
    >>> from hce_jax.typing import PRECISIONS
    >>> model = build_model({"model_type": "linear"}, 5, 3, nnx.Rngs(0), precision=PRECISIONS["float32"])
    >>> graphdef, params, stats = split_model(model)
    >>> params["linear"]["kernel"].shape, stats
    ((5, 3), {})
    """
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)
    return graphdef, nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
