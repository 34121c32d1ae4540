"""Many small kernels as one."""

import jax
import jax.numpy as jnp

from hce_jax.typing import Array, Float, Int


def common_operand(value: Float[Array, "..."] | Int[Array, "..."]) -> Float[Array, "..."] | Int[Array, "..."]:
    """Return a value as it is, for many small updates that all read it.

    On a GPU each would be a kernel of its own, of 2 us for a few hundred numbers. XLA joins those of one shape that
    have an operand in common, if that is an array (for a lone number it joins nothing) and no constant: hence two of
    it, behind a barrier. In a TabNet step for an H200, AdamW's 50 kernels become 8.

    Examples
    --------
    >>> float(common_operand(jnp.float32(0.5)))
    0.5
    """
    return jax.lax.optimization_barrier(jnp.stack([value, value]))[0]
