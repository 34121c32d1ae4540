"""Weights of the published PyTorch models, brought into this package's modules. No torch needed."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hce_jax.models import MLPConfig, TabNetConfig

_Tree = dict[Any, Any]


def params_from_state_dict(model_name: str, state_dict: Mapping[str, np.ndarray], config: Any) -> _Tree:
    """Return the variables of a model as a nested dictionary, from a published network's state dict.

    Parameters
    ----------
    model_name
        ``linear``, ``mlp`` or ``tabnet``.
    state_dict
        Arrays under torch's names, without the prefix ``classifier.``. Several names of one shared weight may be there.
    config
        The model's config dataclass.

    Returns
    -------
    dict
        Parameters and batch statistics, to be set with ``nnx.replace_by_pure_dict(state, ...)``; layers are counted by
        integers. Kernels are (in, out), where torch stores (out, in).

    Raises
    ------
    KeyError
        If an array of the network is missing.

    Examples
    --------
    >>> from hce_jax.models import LinearConfig
    >>> arrays = {"weight": np.zeros((3, 5)), "bias": np.zeros(3)}
    >>> params_from_state_dict("linear", arrays, LinearConfig())["linear"]["kernel"].shape
    (5, 3)
    """
    return {"linear": _linear, "mlp": _mlp, "tabnet": _tabnet}[model_name](state_dict, config)


def _linear(state_dict: Mapping[str, np.ndarray], config: Any) -> _Tree:
    return {"linear": {"kernel": state_dict["weight"].T, "bias": state_dict["bias"]}}


def _mlp(state_dict: Mapping[str, np.ndarray], config: MLPConfig) -> _Tree:
    # Torch counts linear, batch norm, SiLU and dropout as one sequence.
    return {
        "layers": {i: _dense(state_dict, f"encoder.{4 * i}") for i in range(config.n_hidden)},
        "norms": {i: _norm(state_dict, f"encoder.{4 * i + 1}") for i in range(config.n_hidden)},
        "linear": _dense(state_dict, "linear"),
    }


def _tabnet(state_dict: Mapping[str, np.ndarray], config: TabNetConfig) -> _Tree:
    steps = range(config.n_steps)
    return {
        "input_norm": _norm(state_dict, "encoder.initial_bn"),
        "shared_kernels": {
            i: state_dict[f"encoder.initial_splitter.shared.shared_layers.{i}.weight"].T for i in range(config.n_shared)
        },
        "splitter": _transformer(state_dict, "encoder.initial_splitter", config),
        "transformers": {s: _transformer(state_dict, f"encoder.feat_transformers.{s}", config) for s in steps},
        "attentions": {
            s: {
                "kernel": state_dict[f"encoder.att_transformers.{s}.fc.weight"].T,
                "norm": _norm(state_dict, f"encoder.att_transformers.{s}.bn.bn"),
            }
            for s in steps
        },
        "head": state_dict["final_mapping.weight"].T,
    }


def _transformer(state_dict: Mapping[str, np.ndarray], name: str, config: TabNetConfig) -> _Tree:
    own = [f"{name}.specifics.glu_layers.{i}" for i in range(config.n_independent)]
    layers = [f"{name}.shared.glu_layers.{i}" for i in range(config.n_shared)] + own
    return {
        "kernels": {i: state_dict[f"{layer}.fc.weight"].T for i, layer in enumerate(own)},
        "norms": {i: _norm(state_dict, f"{layer}.bn.bn") for i, layer in enumerate(layers)},
    }


def _dense(state_dict: Mapping[str, np.ndarray], name: str) -> _Tree:
    return {"kernel": state_dict[f"{name}.weight"].T, "bias": state_dict[f"{name}.bias"]}


def _norm(state_dict: Mapping[str, np.ndarray], name: str) -> _Tree:
    return {
        "weight": state_dict[f"{name}.weight"],
        "bias": state_dict[f"{name}.bias"],
        "running_mean": state_dict[f"{name}.running_mean"],
        "running_variance": state_dict[f"{name}.running_var"],
        "n_updates": np.asarray(state_dict[f"{name}.num_batches_tracked"], np.int32),
    }
