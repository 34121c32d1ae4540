"""The published optimiser: clipped AdamW whose learning rate falls after each epoch."""

import jax
import jax.numpy as jnp
import optax

from hce_jax.ops.common_operand import common_operand
from hce_jax.typing import Array, Float

#: PyTorch's clip_grad_norm_ adds this to the norm before it divides.
_CLIP_EPSILON = 1e-6
#: Elements up to which an array is read in less time than a kernel of its own takes to start.
_SMALL = 2**17


def step_schedule(learning_rate: float, gamma: float, step_size: int, steps_per_epoch: int) -> optax.Schedule:
    """Return the learning rate as a function of the step: times ``gamma`` after every ``step_size`` epochs.

    PyTorch's ``StepLR``, called once per epoch after its last step (golden README, surprise 5). Asked for a step that
    is a number, it computes on the host: whoever logs the rate does not wait for the devices.

    Examples
    --------
    >>> schedule = step_schedule(1.0, gamma=0.5, step_size=1, steps_per_epoch=10)
    >>> [schedule(step) for step in (0, 9, 10)]
    [1.0, 1.0, 0.5]
    """
    # More steps than int32 holds are never taken.
    steps = min(step_size * steps_per_epoch, 2**31 - 1)
    return lambda step: learning_rate * gamma ** (step // steps)


def global_norm(tree: optax.Updates) -> Float[Array, ""]:
    """Return the Euclidean norm over all arrays of a tree together, sqrt(sum x^2).

    ``optax.tree.norm`` but for rounding. That sums each array in a kernel or two of its own; here the small ones are
    joined first and summed as one.

    Examples
    --------
    >>> float(global_norm({"bias": jnp.array([3.0]), "kernel": jnp.array([[4.0]])}))
    5.0
    """
    leaves = jax.tree.leaves(tree)
    parts = [leaf for leaf in leaves if leaf.size > _SMALL]
    small = [leaf.ravel() for leaf in leaves if leaf.size <= _SMALL]
    if small:
        parts.append(jnp.concatenate(small))
    return jnp.sqrt(sum(jnp.sum(jnp.square(part)) for part in parts))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Multiply all gradients by min(1, max_norm / (norm + 1e-6)), the norm over all of them together.

    PyTorch's ``clip_grad_norm_`` (golden README, surprise 3); optax's own has no 1e-6.

    Examples
    --------
    >>> clip = clip_by_global_norm(1.0)
    >>> clipped, _ = clip.update(jnp.array([3.0, 4.0]), clip.init(None))
    >>> [round(float(value), 4) for value in clipped]
    [0.6, 0.8]
    """

    def clip(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        scale = common_operand(jnp.minimum(1.0, max_norm / (global_norm(updates) + _CLIP_EPSILON)))
        return jax.tree.map(lambda update: update * scale, updates)

    return optax.stateless(clip)


def published_optimizer(
    schedule: optax.Schedule, weight_decay: float, gradient_clip_val: float
) -> optax.GradientTransformation:
    """Return AdamW (betas 0.9 and 0.999, eps 1e-8) with decoupled decay on every parameter, after clipping.

    Parameters
    ----------
    schedule
        Learning rate by step.
    weight_decay
        Each parameter is multiplied by 1 - learning rate x decay; biases and batch norms too (surprise 2).
    gradient_clip_val
        Largest global norm of the gradients; 0 turns clipping off.

    Examples
    --------
    >>> optimizer = published_optimizer(lambda step: 1e-3, weight_decay=0.01, gradient_clip_val=1.0)
    """
    adamw = optax.adamw(schedule, b1=0.9, b2=0.999, eps=1e-8, weight_decay=weight_decay)
    return optax.chain(clip_by_global_norm(gradient_clip_val), adamw) if gradient_clip_val else adamw
