import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hce_jax.ops import entmax, entmax15, sparsemax

SELECTORS = {"entmax15": entmax15, "sparsemax": sparsemax}
EDGE_ROW = 11  # lies on the edge of the support of entmax15, where its derivative jumps


def entmax15_by_bisection(z):
    """Give 1.5-entmax in float64, from nothing but the definition: p = max(z/2 - tau, 0)^2 sums to one."""
    half = np.asarray(z, np.float64) / 2
    low, high = half.max(-1, keepdims=True) - 1, half.max(-1, keepdims=True)
    for _ in range(200):
        middle = (low + high) / 2
        above = (np.maximum(half - middle, 0) ** 2).sum(-1, keepdims=True) >= 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.maximum(half - low, 0) ** 2


def sparsemax_by_optax(z):
    z = z - z.max(-1, keepdims=True)  # optax's own answer loses digits far from zero; the shift changes nothing else
    return np.stack([optax.projections.projection_simplex(jnp.asarray(row)) for row in z])


ORACLES = {"entmax15": entmax15_by_bisection, "sparsemax": sparsemax_by_optax}


def hard_rows(n):
    """Give rows on which a search for the threshold may go astray, by name."""
    rng = np.random.default_rng(0)
    rows = {
        "normal": rng.normal(size=n),
        "ties at the maximum and below": np.round(rng.normal(size=n)),
        "all equal": np.full(n, 3.25),
        "one huge value": np.where(np.arange(n) == n // 2, 1e4, rng.normal(size=n)),
        "all but equal": 1e-3 * rng.normal(size=n),
        "far from zero": 1000 + rng.normal(size=n),
        "falling geometrically towards the maximum": -(2.0 ** -(np.arange(n) % 24)),
        "one large value and a crowd at the edge of the support": np.where(np.arange(n) == 0, 0.0, -0.999),
        "maximum in the very last entry": np.where(np.arange(n) == n - 1, 1.0, 0.0),
        "rising evenly": np.linspace(0, 1, n),
    }
    return {name: row.astype(np.float32) for name, row in rows.items()}


def check_golden(golden, function):
    arrays = golden.arrays
    output, vjp = jax.vjp(function, jnp.asarray(arrays["x"]))
    edge = golden.kind == "entmax15"
    tolerance = np.full((len(output), 1), 2e-6)
    tolerance[EDGE_ROW] = 1e-4 if edge else 2e-6
    assert (np.abs(np.asarray(output) - arrays["output"]) <= tolerance).all()
    compared = np.array([row for row in range(len(output)) if not (edge and row == EDGE_ROW)])
    gradient = np.asarray(vjp(jnp.asarray(arrays["cotangent"]))[0])
    np.testing.assert_allclose(gradient[compared], arrays["vjp"][compared], atol=5e-6, rtol=0)


@pytest.mark.golden("entmax15")
def test_golden_entmax15(golden):
    check_golden(golden, entmax15)


@pytest.mark.golden("sparsemax")
def test_golden_sparsemax(golden):
    check_golden(golden, sparsemax)


@pytest.mark.parametrize("n", [2, 127, 128, 1000, 100_000])
@pytest.mark.parametrize("name", SELECTORS)
def test_hard_rows_agree_with_an_oracle(name, n):
    rows = np.stack(list(hard_rows(n).values()))
    found, expected = np.asarray(SELECTORS[name](jnp.asarray(rows))), ORACLES[name](rows)
    for row, (label, _) in enumerate(hard_rows(n).items()):
        np.testing.assert_allclose(found[row], expected[row], atol=2e-6, err_msg=f"{label}, {n} entries")
    # The threshold is a float32 in [-1, 0): each entry may be off by its rounding.
    np.testing.assert_allclose(found.sum(-1, dtype=np.float64), 1, atol=1e-6 + 6e-8 * n)


@pytest.mark.parametrize(("step", "scale"), [(entmax._entmax15_step, 0.5), (entmax._sparsemax_step, 1.0)])
def test_newton_reaches_the_threshold_from_its_worst_start_within_the_proven_number_of_steps(step, scale):
    n = 100_000
    rows = jnp.asarray(np.stack(list(hard_rows(n).values())))
    shifted = (rows - rows.max(-1, keepdims=True)) * scale
    tau, last = -jnp.ones((len(rows), 1)), jnp.ones((len(rows), 1))
    for _ in range(29):  # log4(D^2 / 1e-7), the bound of the module's docstring
        last = jnp.maximum(step(shifted, tau), 0)
        tau = tau + last
    assert float(last.max()) <= entmax.TOLERANCE


@pytest.mark.parametrize("name", SELECTORS)
def test_gradient_is_that_of_the_definition_and_zero_outside_the_support(name):
    rng = np.random.default_rng(1)
    z, cotangent = rng.normal(size=(2, 40)), rng.normal(size=40)
    oracle = ORACLES[name] if name == "entmax15" else lambda z: np.maximum(z - sparsemax_tau(z), 0)
    gradient = jax.grad(lambda z: jnp.sum(SELECTORS[name](z) @ jnp.asarray(cotangent, jnp.float32)))(
        jnp.asarray(z, jnp.float32)
    )
    for row in range(2):
        for column in range(40):
            shift = np.zeros_like(z[row])
            shift[column] = 1e-6
            slope = (oracle(z[row] + shift) - oracle(z[row] - shift)) @ cotangent / 2e-6
            assert abs(slope - float(gradient[row, column])) < 1e-4
    support = np.asarray(SELECTORS[name](jnp.asarray(z, jnp.float32))) > 0
    assert (np.asarray(gradient)[~support] == 0).all()
    assert not support.all()


def sparsemax_tau(z):
    """Give the threshold of one row in float64, by the textbook's sort."""
    ordered = np.sort(z)[::-1]
    size = np.flatnonzero(1 + np.arange(1, len(z) + 1) * ordered > np.cumsum(ordered))[-1] + 1
    return (ordered[:size].sum() - 1) / size


@pytest.mark.parametrize("name", SELECTORS)
def test_any_axis_and_transformation_gives_the_same(name):
    function = SELECTORS[name]
    z = jnp.asarray(np.random.default_rng(2).normal(size=(3, 200, 4)), jnp.float32)
    along = jnp.moveaxis(jax.jit(function)(jnp.moveaxis(z, 1, -1)), -1, 1)
    np.testing.assert_allclose(function(z, axis=1), along, atol=1e-7)
    np.testing.assert_allclose(jax.vmap(lambda z: function(z, axis=0))(z), along, atol=1e-6)


@pytest.mark.parametrize("name", SELECTORS)
def test_minus_infinity_gets_nothing_and_a_row_with_nan_spoils_no_other(name):
    z = np.zeros((3, 300), np.float32)
    z[0, 1:] = -np.inf
    z[1, 5] = np.nan
    found = np.asarray(SELECTORS[name](jnp.asarray(z)))
    np.testing.assert_array_equal(found[0], np.eye(300, dtype=np.float32)[0])
    assert np.isnan(found[1]).any()
    np.testing.assert_allclose(found[2], 1 / 300, rtol=1e-4)


@pytest.mark.parametrize("select", [entmax15, sparsemax])
@pytest.mark.parametrize("width", [5, 128, 131, 135, 2314])
@pytest.mark.parametrize("height", [1.9, 2.0, 5.0, 1e4])
def test_the_largest_score_may_lie_anywhere(select, width, height):
    """Also where the row's width does not divide by the number of slices and the largest score is in the rest."""
    places = jnp.asarray(sorted({0, width // 2, *range(max(width - 8, 0), width)}))
    rows = jnp.zeros((len(places), width)).at[jnp.arange(len(places)), places].set(height)
    found = np.asarray(select(rows))
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    np.testing.assert_array_equal(found.argmax(axis=1), places)
    np.testing.assert_allclose(np.sort(found, axis=1), np.sort(found[:1], axis=1).repeat(len(places), 0), atol=1e-6)
