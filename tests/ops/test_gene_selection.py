"""The kernels of hce_jax.ops.selection, interpreted, against the definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hce_jax.ops import selection
from hce_jax.ops.selection import Selection, select_genes


def numpy_mask(z, mask_type):
    """Give 1.5-entmax or sparsemax of one row by bisection, in float64."""
    y = (z - z.max()) * (0.5 if mask_type == "entmax" else 1.0)
    power = 2 if mask_type == "entmax" else 1
    low, high = -1.0, 0.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if (np.maximum(y - middle, 0) ** power).sum() > 1 else (low, middle)
    return np.maximum(y - low, 0) ** power


def definition(scores, score_scale, score_shift, x, scale, shift, mask_type):
    """Give what is selected and the negative entropies, in float64."""
    mask = np.stack([numpy_mask(row, mask_type) for row in scores * score_scale + score_shift])
    return mask * (x * scale + shift), (mask * np.log(mask + 1e-15)).sum(1)


def inputs(n_cells=5, n_genes=40, seed=0):
    rng = np.random.default_rng(seed)
    scores, x = rng.normal(size=(2, n_cells, n_genes))
    vectors = rng.normal(size=(4, n_genes))
    return scores, vectors[0], vectors[1], x, vectors[2], vectors[3]


def in_float32(arrays):
    return [jnp.asarray(each, jnp.float32) for each in arrays]


@pytest.mark.parametrize("mask_type", ["entmax", "sparsemax"])
@pytest.mark.parametrize("n_genes", [1, 2048, 2500])
def test_what_is_selected_is_that_of_the_definition(mask_type, n_genes):
    arrays = inputs(n_genes=n_genes)
    found = select_genes(*in_float32(arrays), mask_type, jnp.float32)
    for got, expected in zip(found, definition(*arrays, mask_type), strict=True):
        np.testing.assert_allclose(got, expected, atol=3e-6)


@pytest.mark.parametrize("mask_type", ["entmax", "sparsemax"])
def test_every_gradient_is_the_slope_of_the_definition(mask_type):
    """Central differences in float64, of 33 cells (more than are summed at once) and every gene's four parameters."""
    arrays, rng = inputs(33, 7, seed=1), np.random.default_rng(2)
    weights = rng.normal(size=(33, 7)), rng.normal(size=33)

    def objective(arrays):
        return sum((weight * each).sum() for weight, each in zip(weights, definition(*arrays, mask_type), strict=True))

    def loss(*arrays):
        found = select_genes(*arrays, mask_type, jnp.float32)
        return sum((weight * each).sum() for weight, each in zip(in_float32(weights), found, strict=True))

    gradients = jax.grad(loss, argnums=tuple(range(6)))(*in_float32(arrays))
    for number, gradient in enumerate(gradients):
        expected = np.zeros_like(arrays[number])
        for place in np.ndindex(expected.shape) if expected.ndim == 1 else [(row, 3) for row in range(33)]:
            moved = [[each.copy() for each in arrays] for _ in range(2)]
            moved[0][number][place] += 1e-6
            moved[1][number][place] -= 1e-6
            expected[place] = (objective(moved[0]) - objective(moved[1])) / 2e-6
        compared = np.s_[:] if expected.ndim == 1 else np.s_[:, 3]
        np.testing.assert_allclose(gradient[compared], expected[compared], atol=2e-4, err_msg=str(number))


def test_a_gene_that_is_kept_out_gets_nothing_and_gives_nothing():
    arrays = in_float32(inputs())
    arrays[2] = arrays[2].at[-3:].set(-1e30)

    def loss(*arrays):
        found = select_genes(*arrays, "entmax", jnp.float32)
        return found.selected.sum() + found.negative_entropy.sum(), found.selected

    gradients, selected = jax.grad(loss, argnums=tuple(range(6)), has_aux=True)(*arrays)
    assert (selected[:, -3:] == 0).all()
    assert all((gradient[..., -3:] == 0).all() for gradient in gradients)
    assert all(jnp.isfinite(gradient).all() for gradient in gradients)
    fewer = select_genes(*(each[..., :-3] for each in arrays), "entmax", jnp.float32)
    np.testing.assert_allclose(selected[:, :-3], fewer.selected, atol=1e-6)


def test_members_and_ghost_batches_are_mapped_over():
    """Scale and shift of the input are those of a member, the others those of a ghost batch of it."""
    n_members, n_parts = 2, 3
    drawn = [[inputs(4, 20, seed=10 * member + part) for part in range(n_parts)] for member in range(n_members)]
    by_part = [jnp.stack([jnp.stack(in_float32([p[i] for p in m])) for m in drawn]) for i in range(4)]
    by_member = [jnp.stack(in_float32([m[0][i] for m in drawn])) for i in (4, 5)]

    def select(*arrays):
        return select_genes(*arrays, "entmax", jnp.float32)

    def loss(*arrays):
        parts = jax.vmap(select, in_axes=(0, 0, 0, 0, None, None))
        found = jax.vmap(parts)(*arrays)
        return (found.selected**2).sum(), found

    alone = jax.jit(jax.value_and_grad(lambda *arrays: (select(*arrays).selected ** 2).sum(), argnums=(1, 4)))
    gradients, found = jax.grad(loss, argnums=(1, 4), has_aux=True)(*by_part, *by_member)
    assert [each.shape for each in gradients] == [(2, 3, 20), (2, 20)]
    for member in range(n_members):
        parts = [
            alone(*(each[member, part] for each in by_part), *(each[member] for each in by_member))
            for part in range(n_parts)
        ]
        np.testing.assert_allclose(sum(each[1][1] for each in parts), gradients[1][member], rtol=1e-4, atol=1e-4)
        for part, (loss_alone, by_argument) in enumerate(parts):
            np.testing.assert_allclose(by_argument[0], gradients[0][member, part], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(loss_alone, (found.selected[member, part] ** 2).sum(), rtol=1e-5)


def test_in_bfloat16_input_and_result_are_rounded_and_nothing_else():
    scores, score_scale, score_shift, x, scale, shift = in_float32(inputs())
    x = x.astype(jnp.bfloat16)
    rounded = select_genes(scores, score_scale, score_shift, x, scale, shift, "entmax", jnp.bfloat16)
    exact = select_genes(scores, score_scale, score_shift, x.astype(jnp.float32), scale, shift, "entmax", jnp.float32)
    assert rounded.selected.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded.selected, exact.selected.astype(jnp.bfloat16))
    np.testing.assert_array_equal(rounded.negative_entropy, exact.negative_entropy)


def test_a_row_with_nan_becomes_nan_and_spoils_no_other():
    arrays = in_float32(inputs())
    arrays[0] = arrays[0].at[1, 4].set(jnp.nan)
    found = select_genes(*arrays, "entmax", jnp.float32)
    assert isinstance(found, Selection)
    assert jnp.isnan(found.negative_entropy).tolist() == [False, True, False, False, False]
    assert jnp.isfinite(found.selected[jnp.asarray([0, 2, 3, 4])]).all()


def test_pieces_cover_rows_of_any_width(monkeypatch):
    """As wide as one piece less, equal, and more, with pieces so small that there are several."""
    monkeypatch.setattr(selection, "_PIECE", 16)
    for width in (15, 16, 48):
        arrays = inputs(2, width, seed=width)
        found = select_genes(*in_float32(arrays), "entmax", jnp.float32)
        np.testing.assert_allclose(found.selected, definition(*arrays, "entmax")[0], atol=2e-6)
