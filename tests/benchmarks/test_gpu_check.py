"""benchmarks/gpu_check.py: its definitions in float64, and that it finds what is wrong."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import gpu_check
from benchmarks.gpu_check import Check, Sizes, compare
from benchmarks.gpu_report import Report, summary
from hce_jax.ops.batch_norm import Moments

SIZES = Sizes(n_genes=150, n_types=5, n_cells=8)


def central_differences(function, arrays):
    """Give the slopes of a function of named arrays."""
    slopes = {name: np.zeros_like(each) for name, each in arrays.items()}
    for name, slope in slopes.items():
        for place in np.ndindex(slope.shape):
            moved = [{key: each.copy() for key, each in arrays.items()} for _ in range(2)]
            moved[0][name][place] += 1e-6
            moved[1][name][place] -= 1e-6
            slope[place] = (function(moved[0]) - function(moved[1])) / 2e-6
    return slopes


# --- the definitions


def test_sparsemax_is_the_projection_on_the_simplex_and_entmax_sums_to_one():
    z = np.random.default_rng(0).normal(size=(2, 3, 40))
    mask, near = gpu_check.masks(z, "sparsemax")
    expected = jax.vmap(jax.vmap(optax.projections.projection_simplex))(jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(mask, expected, atol=1e-6)
    row, tau = z[1, 2], (z[1, 2] - mask[1, 2])[mask[1, 2].argmax()]
    assert near[1, 2] == pytest.approx(abs(row - tau).min())
    entmax, near = gpu_check.masks(z, "entmax")
    np.testing.assert_allclose(entmax.sum(-1), 1, atol=1e-12)
    # 1.5-entmax: the roots of the mask are the halved scores less a number, cut at zero.
    tau = (z / 2 - np.sqrt(entmax)).max(-1, keepdims=True, where=entmax > 0, initial=-np.inf)
    np.testing.assert_allclose(np.maximum(z / 2 - tau, 0) ** 2, entmax, atol=1e-12)
    np.testing.assert_allclose(near, abs(z - 2 * tau).min(-1), atol=1e-12)


@pytest.mark.parametrize("mask_type", ["entmax", "sparsemax"])
def test_gradients_of_a_selection_are_its_slopes(mask_type):
    rng = np.random.default_rng(1)
    shape = 2, 3, 6
    names = ("scores", "score_scale", "score_shift", "x", "scale", "shift")
    rows = dict(zip(names, (rng.normal(size=each) for each in (shape, (2, 6), (2, 6), shape, 6, 6)), strict=True))
    gradient = {"selected": rng.normal(size=shape), "negative_entropy": rng.normal(size=(2, 3))}

    def results(rows):
        z = rows["scores"] * rows["score_scale"][:, None] + rows["score_shift"][:, None]
        return gpu_check.selected(rows, gradient, gpu_check.masks(z, mask_type)[0], mask_type)

    def objective(rows):
        found = results(rows)[0]
        return sum((found[name] * each).sum() for name, each in gradient.items())

    for name, slope in central_differences(objective, rows).items():
        np.testing.assert_allclose(results(rows)[1][name], slope, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("has_residual", [False, True])
def test_gradients_of_a_gated_layer_are_its_slopes(has_residual):
    rng = np.random.default_rng(2)
    layer = {"h": rng.normal(size=(2, 4, 6)), "weight": rng.normal(size=6), "bias": rng.normal(size=6)}
    layer |= {"residual": rng.normal(size=(2, 4, 3))} if has_residual else {}
    gradient = rng.normal(size=(2, 4, 3))
    slopes = central_differences(lambda layer: (gpu_check.gated(layer, gradient)[0]["rows"] * gradient).sum(), layer)
    gradients = gpu_check.gated(layer, gradient)[1]
    assert {*gradients} == {*layer}
    for name, slope in slopes.items():
        np.testing.assert_allclose(gradients[name], slope, atol=1e-7, err_msg=name)


# --- what is found


def plain_gate(h, weight, bias, residual, dtype):
    """Give a gated layer, one operation after the other."""
    mean, variance = h.mean(1), h.var(1)
    z = (h - mean[:, None]) / jnp.sqrt(variance[:, None] + 1e-5) * weight[None, None, :] + bias[None, None, :]
    value, gate = jnp.split(z, 2, axis=2)
    y = value * jax.nn.sigmoid(gate)
    y = y if residual is None else (residual + y) * np.float32(np.sqrt(0.5))
    return (y.astype(dtype), y), Moments(mean, variance)


@pytest.mark.parametrize(
    ("wrong", "found_in"),
    [
        pytest.param(lambda rows, moments: (rows, moments), [], id="right"),
        pytest.param(lambda rows, moments: ((rows[0], rows[1] * 1.01), moments), ["results", "gradients"],
                     id="the rows in float32 large"),
        pytest.param(lambda rows, moments: ((rows[0] * 1.05, rows[1]), moments), ["for the product", "gradients"],
                     id="the rounded rows large"),
        pytest.param(lambda rows, moments: (rows, Moments(moments.mean, moments.variance * 16 / 15)), ["results"],
                     id="an unbiased variance"),
        pytest.param(lambda rows, moments: (jax.lax.stop_gradient(rows), moments), ["gradients"], id="no gradient"),
        pytest.param(lambda rows, moments: ((rows[0], rows[1].at[1, 2, 3].set(jnp.nan)), moments),
                     ["results", "gradients", "entries that differ in a second run"], id="a place nobody writes"),
    ],
)  # fmt: skip
def test_a_gated_layer_that_is_wrong_is_found(wrong, found_in, monkeypatch):
    jax.clear_caches()
    monkeypatch.setattr(gpu_check, "gated_norm", lambda *arguments: wrong(*plain_gate(*arguments)))
    checks = [*gpu_check.gating("gate", 16, True, "bfloat16", np.random.default_rng(3))]
    assert len(checks) == 4
    assert [check.name for check in checks if not check.ok] == [f"gate, {what}" for what in found_in]


def test_what_differs_in_a_second_run_is_found():
    runs = iter([np.zeros((2, 4)), np.array([[0, 0, 0, 0], [0, 1, 0, 0]])])
    first, check = gpu_check.run_twice("it", lambda: {"a": np.ones(3), "b": next(runs)})
    assert not first["b"].any()
    assert check == Check("it, entries that differ in a second run", 1 / 8, 0.0, "['b']")
    assert not check.ok


def test_what_is_no_number_or_of_another_shape_is_wrong():
    three = np.ones(3, np.float32)
    right = {"a": three, "b": three}
    assert compare("", 0.0, right, right).ok
    assert compare("", 0.5, {**right, "b": three * 1.25}, right) == ("", 0.25, 0.5, "b")
    for other in (np.array([1, np.nan, 1]), np.ones((1, 3)), three * np.inf):
        check = compare("it", 1.0, {"a": three * 1.25, "b": other}, right)
        assert (check.ok, check.worst) == (False, "b")
        assert str(check).endswith("limit 1e+00, WRONG, worst in b")
    zero = {"a": np.zeros(3)}
    assert compare("", 0.0, zero, zero).ok
    assert not compare("", 1.0, {"a": np.array([0, 1e-9, 0])}, zero).ok


def test_decoded_cells_are_those_that_were_packed(monkeypatch):
    def checked():
        return next(gpu_check.decoding(SIZES, np.random.default_rng(4)))

    assert checked().ok
    decode = gpu_check.dense_batch
    monkeypatch.setattr(gpu_check, "dense_batch", lambda *given: decode(*given)._replace(x=decode(*given).x[::-1]))
    assert not checked().ok


def test_the_optimiser_of_a_step_keeps_the_gradients_as_they_are():
    optimizer, gradients = gpu_check._keeping_gradients(), {"a": jnp.array([1e-20, 3.0])}
    assert optimizer.update(gradients, optimizer.init(gradients), None)[1] is gradients


def test_all_fast_paths_are_checked_with_inputs_of_the_seed():
    names = [name for name, _ in gpu_check.cases(SIZES, 0)]
    assert names == [
        "decoding", "select_genes, entmax", "select_genes, sparsemax", "gated_norm, 8 rows, without residual, float32",
        "gated_norm, 8 rows, with residual, bfloat16", "gated_norm, 2 rows, without residual, bfloat16",
        "gated_norm, 2 rows, with residual, float32", "a step of TabNet",
    ]  # fmt: skip
    errors = [[next(dict(gpu_check.cases(SIZES, seed))["decoding"]()).error for _ in range(2)] for seed in (5, 6)]
    assert errors[0][0] == errors[0][1] != errors[1][0]


def test_what_is_wrong_or_fails_fails_the_run_and_is_told_at_the_end(monkeypatch, capsys):
    def breaks():
        yield Check("first", 1e-6, 1e-5, "a")
        raise ValueError("no such kernel")

    others = iter([Check("second", np.nan, 1e-5, "b"), Check("third", 0.0, 0.0, "c")])
    monkeypatch.setattr(gpu_check, "cases", lambda *_: [("broken", breaks), ("others", lambda: others)])
    report = Report(minutes=1)
    gpu_check.run(report, SIZES, 77)
    assert report.failed
    assert report.notes == ["FAILED check: broken: ValueError: no such kernel",
                            "second: nan, limit 1e-05, WRONG, worst in b"]  # fmt: skip
    told = capsys.readouterr().out
    assert "--seed 77" in told
    assert "first: 1.0e-06, limit 1e-05, ok" in told
    assert "- 3 results checked against plain ones: 1 WRONG" in [*summary(report)]
    for error, failed, told in ((0.0, False, "none"), (2.0, True, "1")):
        monkeypatch.setattr(gpu_check, "cases", lambda *_, e=error: [("one", lambda: [Check("one", e, 1.0, "")])])
        report = Report(minutes=1)
        gpu_check.run(report, SIZES, 1)
        assert report.failed == failed
        assert len(report.notes) == failed
        assert f"- 1 results checked against plain ones: {told} WRONG" in [*summary(report)]
