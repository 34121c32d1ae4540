import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hce_jax.training.augment import apply_augmentations, augment, widened_vectors


@pytest.mark.golden("augment")
def test_golden_augment(golden):
    x, vectors, indices, signs = (jnp.asarray(golden.arrays[key]) for key in ("x", "augmentations", "indices", "signs"))
    found = apply_augmentations(x, vectors, indices.astype(jnp.int32), signs)
    np.testing.assert_array_equal(found, golden.arrays["result"])


def drawn(n_cells=20_000, n_vectors=4, seed=0):
    """Give the moves of cells at 4.5, whose vectors are told apart by their length: sign * (1 + index) / 2."""
    vectors = jnp.asarray(np.repeat((1 + np.arange(n_vectors, dtype=np.float32))[:, None] / 2, 3, axis=1))
    moved = np.asarray(augment(jnp.full((n_cells, 3), 4.5), vectors, jax.random.key(seed))) - 4.5
    assert (moved == moved[:, :1]).all()  # one vector and one sign for all genes of a cell
    return moved[:, 0]


def test_vectors_and_signs_are_drawn_uniformly_and_independently_for_each_cell():
    moves, counts = np.unique(drawn(), return_counts=True)
    np.testing.assert_array_equal(moves, [-2, -1.5, -1, -0.5, 0.5, 1, 1.5, 2])
    np.testing.assert_allclose(counts / counts.sum(), 1 / 8, atol=0.01)


def test_the_key_decides():
    np.testing.assert_array_equal(drawn(50, seed=3), drawn(50, seed=3))
    assert not np.array_equal(drawn(50, seed=3), drawn(50, seed=4))


def test_wide_cells_are_moved_as_narrow_ones_and_their_last_columns_stay_zero():
    rng = np.random.default_rng(0)
    x, vectors = rng.gamma(1, 1, (40, 5)).astype(np.float32), rng.normal(0, 3, (6, 5)).astype(np.float32)
    wide_x, wide_vectors = np.zeros((40, 8), np.float32), widened_vectors(vectors, 8)
    wide_x[:, :5] = x
    np.testing.assert_array_equal(wide_vectors[:, :5], vectors)
    moved = augment(jnp.asarray(wide_x), jnp.asarray(wide_vectors), jax.random.key(2))
    np.testing.assert_array_equal(moved[:, :5], augment(jnp.asarray(x), jnp.asarray(vectors), jax.random.key(2)))
    np.testing.assert_array_equal(moved[:, 5:], np.zeros((40, 3)))
    assert widened_vectors(vectors, 5) is vectors


def test_values_stay_between_zero_and_nine():
    x = jnp.asarray([[0.1, 8.9]])
    vectors = jnp.asarray([[5.0, 5.0]])
    for sign, expected in ((1.0, [[5.1, 9.0]]), (-1.0, [[0.0, 3.9]])):
        found = apply_augmentations(x, vectors, jnp.array([0]), jnp.array([sign]))
        np.testing.assert_allclose(found, expected, atol=1e-6)
