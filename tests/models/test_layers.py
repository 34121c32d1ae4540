import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hce_jax.models.layers import widened


def test_a_kernel_goes_on_with_rows_of_zeros_and_a_vector_with_zeros():
    np.testing.assert_array_equal(widened(jnp.array([[1.0, 2.0], [3.0, 4.0]]), 4), [[1, 2], [3, 4], [0, 0], [0, 0]])
    np.testing.assert_array_equal(widened(jnp.array([1.0, 2.0]), 3), [1, 2, 0])
    kernel = jnp.ones((3, 2))
    assert widened(kernel, 3) is kernel


def test_the_gradient_of_a_widened_kernel_is_that_of_its_own_rows():
    weights = np.arange(10.0, dtype=np.float32).reshape(5, 2)
    gradient = jax.grad(lambda kernel: jnp.sum(weights * widened(kernel, 5)))(jnp.ones((3, 2)))
    np.testing.assert_array_equal(gradient, weights[:3])


def test_a_kernel_is_never_cut():
    with pytest.raises(ValueError, match="negative"):
        widened(jnp.ones((3, 2)), 2)
