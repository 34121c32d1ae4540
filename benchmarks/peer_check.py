"""Does PyTorch's TabNet of benchmarks/peers.py compute what ours computes? It needs torch: no test of the suite.

    python -m benchmarks.peer_check

prints the largest differences, in training and in evaluation; the exit code is 1 if one is too large.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from benchmarks.peers import TabNet
from benchmarks.step import HYPER_PARAMETERS
from hce_jax.models import build_model
from hce_jax.typing import PRECISIONS

N_GENES, N_TYPES, N_CELLS = 60, 9, 70
#: Of logits of a size of about one, after eight gated layers in float32.
LIMIT = 2e-4


def carry_over(model: nnx.Module, peer: torch.nn.Module) -> None:
    """Give the peer our weights: its modules are named as ours, its matrices are transposed."""
    weights = peer.state_dict()
    for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        array, name = torch.from_numpy(np.array(value[...])), ".".join(map(str, path))
        if array.ndim == 2:
            name += ".weight"
        elif path[0] != "input_norm":
            name = name.replace(f".{path[-1]}", f".norm.{path[-1]}")
        weights[name].copy_(array.T if array.ndim == 2 else array)


def main() -> int:
    """Compare logits and entropies."""
    hyper = {**HYPER_PARAMETERS, "virtual_batch_size": 16, "n_steps": 2, "n_d": 8, "n_a": 6}
    config = {"model_type": "tabnet", **hyper}
    ours = build_model(config, N_GENES, N_TYPES, nnx.Rngs(0), precision=PRECISIONS["float32"])
    theirs = TabNet(N_GENES, N_TYPES, hyper)
    carry_over(ours, theirs)
    x = np.random.default_rng(0).gamma(0.3, 2, (N_CELLS, N_GENES)).astype(np.float32)
    worst = 0.0
    for training in (True, False):
        logits, auxiliary = ours(jnp.asarray(x), train=training, key=jax.random.key(0))
        expected, entropy = theirs.train(training)(torch.from_numpy(x))
        of_logits = float(np.abs(logits - expected.detach().numpy()).max())
        of_entropy = abs(float(auxiliary.mean()) / -hyper["lambda_sparse"] / entropy.item() - 1)
        print(
            f"{'training' if training else 'evaluation':12} logits {of_logits:.1e}  entropy {of_entropy:.1e} (relative)"
        )
        worst = max(worst, of_logits, of_entropy)
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
