"""Networks that carry the weights of a golden file."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from hce_jax.models import build_model, model_config
from hce_jax.torch_import import params_from_state_dict
from hce_jax.typing import PRECISIONS

# What the golden files leave out, with the published values.
DEFAULTS = {"lambda_sparse": 1e-5}


def golden_config(golden, model_type):
    return {**DEFAULTS, **golden.config, "model_type": model_type}


def under(arrays, prefix):
    """Give the arrays whose key begins with the prefix, without it."""
    return {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}


def set_state(model, model_type, config, state_dict):
    state = nnx.state(model)
    variables = params_from_state_dict(model_type, state_dict, model_config(config))
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, variables))
    nnx.update(model, state)


def golden_model(golden, model_type, prefix="params/"):
    config = golden_config(golden, model_type)
    n_genes, n_types = (config.get(a) or config[b] for a, b in (("input_dim", "gene_dim"), ("output_dim", "type_dim")))
    model = build_model(config, n_genes, n_types, nnx.Rngs(0), precision=PRECISIONS["float32"])
    set_state(model, model_type, config, under(golden.arrays, prefix))
    return model


def assert_within_noise(golden, key, values, base):
    """Compare with the golden array at the base tolerance plus ten times its measured noise."""
    tolerance = base + 10 * golden.arrays.get(f"noise/{key}", np.float32(0))
    np.testing.assert_allclose(values, golden.arrays[key], atol=tolerance, rtol=0, err_msg=key)


def assert_running_statistics(golden, model, model_type, base):
    """Compare all running statistics after a training step; the counters must be exact."""
    after = under(golden.arrays, "params_after_train_forward/")
    config = model_config(golden_config(golden, model_type))

    def arranged(arrays):
        tree = params_from_state_dict(model_type, {**under(golden.arrays, "params/"), **arrays}, config)
        return nnx.traversals.flatten_mapping(tree)

    expected = arranged(after)
    noise = arranged({key: np.broadcast_to(golden.arrays.get(f"noise/params_after_train_forward/{key}", 0), array.shape)
                      for key, array in after.items()})  # fmt: skip
    found = nnx.traversals.flatten_mapping(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))
    assert found
    for path, values in found.items():
        error = np.abs(np.asarray(values, np.float64) - expected[path])
        tolerance = 0 if path[-1] == "n_updates" else base + 10 * noise[path]
        assert (error <= tolerance).all(), (path, error.max())


def compiled(model, method="__call__", **options):
    """Give a method of the model, compiled. Training mode updates the model's statistics."""
    call = nnx.jit(lambda model, x, key: getattr(model, method)(x, **options, **({} if key is None else {"key": key})))
    return lambda x, key=None: call(model, x, key)
