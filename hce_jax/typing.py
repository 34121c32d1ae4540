"""The alphabet of axes and the array types of the whole package.

Shapes in signatures are jaxtyping strings; the tests execute them, normal runs do not. Names of arrays end in one
letter per axis:

=======  =============================================
letter   axis
=======  =============================================
b        cells of a batch
n        cells of a split
g        genes
c        cell types (a second cell-type axis: d)
h        hidden units
s        decision steps
v        ghost ("virtual") batches
w        columns of a dense batch: the genes, then zeros
=======  =============================================

Matrix products never run at the backend's default precision (bfloat16 on a TPU): every model is built with a
:class:`Precision`.
"""

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Key, Num, UInt8

__all__ = [
    "PRECISIONS",
    "AnyArray",
    "Array",
    "Bool",
    "Float",
    "Int",
    "Key",
    "Num",
    "Precision",
    "UInt8",
    "Variables",
    "resolve_precision",
]

Array = jax.Array
AnyArray = jax.Array | np.ndarray
#: A model's variables: nested dictionaries of arrays by the names of modules and variables, by numbers in lists.
Variables: TypeAlias = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Precision:
    """How matrix products are computed. Parameters, statistics and losses are float32 in all of them.

    Attributes
    ----------
    name
        The name in the configuration.
    dtype
        Type of the operands of the large matrix products.
    matmul
        What XLA may do with them: ``HIGHEST`` is float32, ``HIGH`` is TF32 on a GPU, three bfloat16 passes on a TPU
        and float32 on a CPU.
    """

    name: str
    dtype: Any
    matmul: jax.lax.Precision

    def product(self, x: Array, kernel: Array) -> Array:
        """Return the matrix product in float32, computed in this precision.

        Examples
        --------
        >>> PRECISIONS["bf16"].product(jnp.ones((2, 3)), jnp.ones((3, 1))).tolist()
        [[3.0], [3.0]]
        """
        operands = x.astype(self.dtype), kernel.astype(self.dtype)
        return jnp.matmul(*operands, precision=self.matmul, preferred_element_type=jnp.float32)


PRECISIONS = {
    "float32": Precision("float32", jnp.float32, jax.lax.Precision.HIGHEST),
    "tf32": Precision("tf32", jnp.float32, jax.lax.Precision.HIGH),
    "bf16": Precision("bf16", jnp.bfloat16, jax.lax.Precision.DEFAULT),
}


def resolve_precision(name: str, backend: str | None = None) -> Precision:
    """Return the precision of that name; ``"auto"`` is float32 on a CPU and TF32, as published, elsewhere.

    Parameters
    ----------
    name
        ``auto``, ``float32``, ``tf32`` or ``bf16``.
    backend
        ``cpu``, ``gpu`` or ``tpu``; JAX's own default backend if not given.

    Raises
    ------
    KeyError
        If there is no precision of that name (the configuration has checked it before).

    Examples
    --------
    >>> resolve_precision("auto", backend="cpu").name
    'float32'
    """
    if name == "auto":
        name = "float32" if (backend or jax.default_backend()) == "cpu" else "tf32"
    return PRECISIONS[name]
