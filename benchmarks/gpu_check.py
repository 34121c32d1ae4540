"""Every fast path against a plain one in higher precision, on inputs drawn anew: what benchmarks/gpu.py does first.

The kernels of TabNet, and the decoding of packed cells, against their definitions in float64, in numpy; and one whole
training step of TabNet through its kernels against the one without. The kernels run twice, with NaN left in the memory
in between, and must give the same bits: a race, or a place that nobody writes, shows as a difference. On a CPU, where
the kernels are interpreted, there are fewer cells, and for the step the kernels are asked for.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.sparse as sp
from flax import nnx

from benchmarks.gpu_report import Report
from benchmarks.simulated_cells import EXPRESSED, PlainBlock
from benchmarks.step import HYPER_PARAMETERS
from hce_jax.input import DenseBatch, dense_batch, row_width
from hce_jax.input.batch import Capacity, make_batch
from hce_jax.models import build_model, tabnet
from hce_jax.ops.gated_norm import gated_norm
from hce_jax.ops.selection import EPSILON, select_genes
from hce_jax.store import LABEL_COLUMN
from hce_jax.store.block import COUNTS, SCALE
from hce_jax.training.mesh import batch_sharding, data_mesh
from hce_jax.training.steps import Objective, init_state, make_train_step
from hce_jax.typing import PRECISIONS

#: Ghost batches that a case has. Two, for a sum of two is the same in either order.
N_PARTS = 2
#: Of results of single entries: some tens of roundings to 24 bits, 6e-8 each. Of gradients, of which many are sums over
#: cells and some differences of numbers that nearly agree, ten times that.
RESULTS, GRADIENTS = 1e-5, 1e-4
#: Where results are rounded to 8 bits, 2e-3 each at random and 4e-3 at worst.
BFLOAT16 = 1e-2
#: Of a whole step in float32: sums are taken in another order, and between the loss and the first gradients lie twenty
#: layers, each with a batch norm that takes differences. On a CPU, with 200 genes, up to 6e-6 was seen; more genes and
#: cells make longer sums. A product in TF32 by mistake rounds its operands by up to 5e-4 and would be seen.
STEP = 1e-3
#: A score so near the threshold of its row (in units of scores) may count as selected or not in float32.
_NEAR = 1e-5
#: Score of the columns that only fill a row up.
_NEVER = -1e30

Named = dict[str, Any]


class Sizes(NamedTuple):
    """Genes, cell types, cells of a ghost batch, and gated layers: each transformer's own, and the shared ones."""

    n_genes: int
    n_types: int
    n_cells: int = HYPER_PARAMETERS["virtual_batch_size"]
    n_independent: int = HYPER_PARAMETERS["n_independent"]
    n_shared: int = HYPER_PARAMETERS["n_shared"]


class Check(NamedTuple):
    """A result: norm of the difference over the norm of what is right, the most there may be, and where it is worst."""

    name: str
    error: float
    limit: float
    worst: str

    @property
    def ok(self) -> bool:
        """Whether it is right; what is not a number is not."""
        return self.error <= self.limit

    def __str__(self) -> str:
        verdict = "ok" if self.ok else f"WRONG, worst in {self.worst}"
        return f"{self.name}: {self.error:.1e}, limit {self.limit:.0e}, {verdict}"


def run(report: Report, sizes: Sizes, seed: int) -> None:
    """Print all checks; what is wrong is repeated at the end, and the run has failed.

    Examples
    --------
    >>> run(Report(minutes=8), Sizes(n_genes=19331, n_types=164), seed=0)  # doctest: +SKIP
    """
    report.say(f"fast paths beside plain ones, --seed {seed}: norm of the difference / norm of what is right")
    for name, case in cases(sizes, seed):
        with report.part("check", name, f"check {name}") as go:
            for result in case() if go else ():
                report.row("check", str(result), **result._asdict(), ok=result.ok)
                if not result.ok:
                    report.failed = True
                    report.notes.append(str(result))


def cases(sizes: Sizes, seed: int) -> Iterator[tuple[str, Callable[[], Iterator[Check]]]]:
    """Yield the name of each case, and what yields its checks. The inputs of a case follow from the seed alone.

    Examples
    --------
    >>> for name, case in cases(Sizes(n_genes=200, n_types=9, n_cells=16), seed=0):  # doctest: +SKIP
    ...     print(name, all(check.ok for check in case()))
    """
    drawn = functools.partial(np.random.default_rng, seed)
    yield "decoding", lambda: decoding(sizes, drawn())
    for mask_type in ("entmax", "sparsemax"):
        yield f"select_genes, {mask_type}", functools.partial(selection, sizes, mask_type, drawn())
    for n_fewer, has_residual, dtype in (
        (0, False, "float32"), (0, True, "bfloat16"), (6, False, "bfloat16"), (6, True, "float32")
    ):  # fmt: skip
        n_cells = sizes.n_cells - n_fewer
        name = f"gated_norm, {n_cells} rows, with{'' if has_residual else 'out'} residual, {dtype}"
        yield name, functools.partial(gating, name, n_cells, has_residual, dtype, drawn())
    yield "a step of TabNet", lambda: training_step(sizes, drawn())


def compare(name: str, limit: float, found: Named, expected: Named) -> Check:
    """Return the worst of some results.

    Examples
    --------
    >>> compare("two", 0.1, {"a": np.ones(4), "b": np.ones(1)}, {"a": np.ones(4), "b": np.full(1, 2.0)})
    Check(name='two', error=0.5, limit=0.1, worst='b')
    """
    errors = {key: _relative(found[key], expected[key]) for key in expected}
    worst = max(errors, key=lambda key: np.inf if np.isnan(errors[key]) else errors[key])
    return Check(name, errors[worst], limit, worst)


def _relative(found: Any, expected: Any) -> float:
    found, expected = (np.asarray(each).astype(np.float64) for each in (found, expected))
    if found.shape != expected.shape:
        return np.inf
    # What must be zero can only be zero.
    return float(np.linalg.norm(found - expected) / max(np.linalg.norm(expected), np.finfo(np.float64).tiny))


def run_twice(name: str, program: Callable[..., Any], *arguments: Any) -> tuple[Any, Check]:
    """Return what a program gives on the host, and whether it gives the same bits when it runs again."""
    first = jax.device_get(program(*arguments))
    # The results of the second run are likely to be given this memory.
    n_words = sum(leaf.nbytes for leaf in jax.tree.leaves(first)) // 4
    jax.block_until_ready(jnp.full(n_words, jnp.nan, jnp.float32))
    second = jax.device_get(program(*arguments))
    pairs = zip(jax.tree.leaves_with_path(first), jax.tree.leaves(second), strict=True)
    shares = {jax.tree_util.keystr(path): float(np.mean(one != other)) for (path, one), other in pairs}
    worst = max(shares, key=lambda key: shares[key])
    return first, Check(f"{name}, entries that differ in a second run", shares[worst], 0.0, worst)


# --- cells


def decoding(sizes: Sizes, rng: np.random.Generator) -> Iterator[Check]:
    """Decode packed cells: dense ones, one with a single gene (the last), one with a count that fills no byte."""
    shape = N_PARTS * sizes.n_cells, sizes.n_genes
    counts = rng.geometric(0.6, shape) * (rng.random(shape) < EXPRESSED)
    counts[:, 0] += 1  # no cell is empty
    counts[1], counts[2, sizes.n_genes // 2] = 0, 100_000
    counts[1, -1] = 3
    block = PlainBlock.of_counts(sp.csr_array(counts), {LABEL_COLUMN: rng.integers(sizes.n_types, size=shape[0])})
    room = -(-len(block.stream(COUNTS).gaps) // 128) * 128
    batch, sharding = make_batch([block], shape[0], [Capacity(room, 0)]), batch_sharding(data_mesh(), shape[0])
    found = dense_batch(jax.device_put(batch, sharding), sharding)
    expected = np.log1p(counts * block.column(SCALE).astype(np.float64)[:, None])
    n_more = row_width(sizes.n_genes) - sizes.n_genes
    yield compare("decoding", RESULTS, {"x": found.x}, {"x": np.pad(expected, [(0, 0), (0, n_more)])})


# --- the selection of genes


def selection(sizes: Sizes, mask_type: str, rng: np.random.Generator) -> Iterator[Check]:
    """Select genes of ghost batches by the kernels, in float32 and in bfloat16."""
    width = row_width(sizes.n_genes, "gpu")
    shape = N_PARTS, sizes.n_cells, width
    rows = {
        "scores": rng.standard_normal(shape, np.float32),
        "score_scale": rng.uniform(0.5, 2.0, (N_PARTS, width)),
        "score_shift": np.where(np.arange(width) < sizes.n_genes, rng.normal(size=(N_PARTS, width)), _NEVER),
        "x": rng.standard_gamma(1.0, shape, np.float32) * (rng.random(shape, np.float32) < EXPRESSED),
        "scale": rng.uniform(0.5, 2.0, width),
        "shift": rng.normal(size=width),
    }
    gradient = {
        "selected": rng.standard_normal(shape, np.float32),
        "negative_entropy": 0.1 * rng.standard_normal(shape[:2], np.float32),
    }
    rows, gradient = _in(np.float32, rows), _in(np.float32, gradient)
    scores, score_scale, score_shift, *_ = _in(np.float64, rows).values()
    mask, margin = masks(scores * score_scale[:, None] + score_shift[:, None], mask_type)
    unsure = margin < _NEAR  # sparsemax' gradient jumps there: such rows have no gradient
    for each in gradient.values():
        each[unsure] = 0
    for dtype in (jnp.float32, jnp.bfloat16):
        name = f"select_genes, {mask_type}, {jnp.dtype(dtype).name}"
        rows["x"], gradient["selected"] = (np.asarray(each, dtype) for each in (rows["x"], gradient["selected"]))
        program = functools.partial(_through_selection, mask_type, dtype)
        found, same = run_twice(name, program, tuple(rows.values()), tuple(gradient.values()))
        results, gradients = selected(_in(np.float64, rows), _in(np.float64, gradient), mask, mask_type)
        limits = (RESULTS, GRADIENTS) if dtype == jnp.float32 else (BFLOAT16, BFLOAT16)
        yield compare(f"{name}, results", limits[0], dict(zip(results, found[0], strict=True)), results)
        yield compare(f"{name}, gradients", limits[1], dict(zip(rows, found[1], strict=True)), gradients)
        yield same


@functools.partial(jax.jit, static_argnums=(0, 1))
def _through_selection(mask_type: str, dtype: Any, rows: tuple[Any, ...], gradient: tuple[Any, ...]) -> Any:
    def select(*rows: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(select_genes(*rows, mask_type, dtype))

    outputs, back = jax.vjp(jax.vmap(select, in_axes=(0, 0, 0, 0, None, None)), *rows)
    return outputs, back(gradient)


def masks(z: np.ndarray, mask_type: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the masks of rows of scores (..., w), by bisection, and how near a score comes to the threshold (...).

    Examples
    --------
    >>> mask, _ = masks(np.array([[2.0, 1.5, -5.0]]), "sparsemax")
    >>> mask.round(6).tolist()
    [[0.75, 0.25, 0.0]]
    """
    scale, power = (0.5, 2) if mask_type == "entmax" else (1.0, 1)
    y = (z - z.max(-1, keepdims=True)) * scale
    tau = np.empty(z.shape[:-1])
    for row in np.ndindex(tau.shape):
        above, low, high = y[row][y[row] > -1], -1.0, 0.0
        for _ in range(54):
            middle = (low + high) / 2
            more = (np.maximum(above - middle, 0) ** power).sum() > 1
            low, high = (middle, high) if more else (low, middle)
        tau[row] = low
    distance = y - tau[..., None]
    return np.maximum(distance, 0) ** power, np.abs(distance).min(-1) / scale


def selected(rows: Named, gradient: Named, mask: np.ndarray, mask_type: str) -> tuple[Named, Named]:
    """Return what masks let through, and the gradients of all that it follows from; all in float64."""
    scores, score_scale, _, x, scale, shift = rows.values()
    d_selected, d_entropy = gradient["selected"], gradient["negative_entropy"][..., None]
    logarithm, read = np.log(mask + EPSILON), x * scale + shift
    slope = np.sqrt(mask) if mask_type == "entmax" else (mask > 0).astype(np.float64)
    d_mask = d_selected * read + d_entropy * (logarithm + mask / (mask + EPSILON))
    d_z = slope * (d_mask - (slope * d_mask).sum(-1, keepdims=True) / slope.sum(-1, keepdims=True))
    through = d_selected * mask
    gradients = {
        "scores": d_z * score_scale[:, None],
        "score_scale": (d_z * scores).sum(1),
        "score_shift": d_z.sum(1),
        "x": through * scale,
        "scale": (through * x).sum((0, 1)),
        "shift": through.sum((0, 1)),
    }
    return {"selected": mask * read, "negative_entropy": (mask * logarithm).sum(-1)}, gradients


# --- the gated layers


def gating(name: str, n_cells: int, has_residual: bool, dtype: str, rng: np.random.Generator) -> Iterator[Check]:
    """Compute a gated layer of ghost batches by the kernels."""
    units = HYPER_PARAMETERS["n_d"] + HYPER_PARAMETERS["n_a"]
    shape = N_PARTS, n_cells, units
    h = rng.uniform(0.1, 3.0, 2 * units) * rng.normal(size=(N_PARTS, n_cells, 2 * units)) + rng.normal(size=2 * units)
    layer = {"h": h, "weight": rng.normal(size=2 * units), "bias": rng.normal(size=2 * units)}
    layer |= {"residual": rng.normal(size=shape)} if has_residual else {}
    layer = _in(np.float32, layer)
    gradient = rng.normal(size=shape).astype(dtype), rng.normal(size=shape).astype(np.float32)
    (rows, moments, gradients), same = run_twice(name, functools.partial(_through_gate, dtype), layer, gradient)
    results, expected = gated(_in(np.float64, layer), sum(each.astype(np.float64) for each in gradient))
    rounded = {"rows for the product": results["rows"]}
    limit = RESULTS if dtype == "float32" else BFLOAT16
    yield compare(f"{name}, for the product", limit, {"rows for the product": rows[0]}, rounded)
    found = {"rows": rows[1], "mean": moments.mean, "variance": moments.variance}
    yield compare(f"{name}, results", RESULTS, found, results)
    yield compare(f"{name}, gradients", GRADIENTS, gradients, expected)
    yield same


@functools.partial(jax.jit, static_argnums=0)
def _through_gate(dtype: str, layer: Named, gradient: tuple[Any, ...]) -> Any:
    def gate(layer: Named) -> Any:
        return gated_norm(layer["h"], layer["weight"], layer["bias"], layer.get("residual"), jnp.dtype(dtype))

    rows, back, moments = jax.vjp(gate, layer, has_aux=True)
    return rows, moments, back(gradient)[0]


def gated(layer: Named, gradient: np.ndarray) -> tuple[Named, Named]:
    """Return the rows and moments of a gated layer, and the gradients of what they follow from; all in float64."""
    h, weight, factor = layer["h"], layer["weight"], np.sqrt(0.5) if "residual" in layer else 1.0
    mean, variance = h.mean(1, keepdims=True), h.var(1, keepdims=True)
    inverse = 1 / np.sqrt(variance + 1e-5)
    normalised = (h - mean) * inverse
    value, gate = np.split(normalised * weight + layer["bias"], 2, axis=-1)
    open_ = 1 / (1 + np.exp(-gate))
    rows = factor * (value * open_ + layer.get("residual", 0.0))
    d_gated = factor * gradient
    d_z = np.concatenate([d_gated * open_, d_gated * value * open_ * (1 - open_)], -1)
    d_n = d_z * weight
    d_h = inverse * (d_n - d_n.mean(1, keepdims=True) - normalised * (d_n * normalised).mean(1, keepdims=True))
    gradients = {"h": d_h, "weight": (d_z * normalised).sum((0, 1)), "bias": d_z.sum((0, 1))}
    gradients |= {"residual": d_gated} if "residual" in layer else {}
    return {"rows": rows, "mean": mean[:, 0], "variance": variance[:, 0]}, gradients


# --- a step


def training_step(sizes: Sizes, rng: np.random.Generator) -> Iterator[Check]:
    """Train two members one step through the kernels, and without them: on this device, and on the CPU beside it."""
    layers = {"n_independent": sizes.n_independent, "n_shared": sizes.n_shared}
    config = {"model_type": "tabnet", **HYPER_PARAMETERS, **layers, "virtual_batch_size": sizes.n_cells}
    models = [
        build_model(config, sizes.n_genes, sizes.n_types, nnx.Rngs(int(seed)), precision=PRECISIONS["float32"])
        for seed in rng.integers(2**31, size=2)
    ]
    graphdef, state = init_state(models, _keeping_gradients())
    shape, n_more = (N_PARTS * sizes.n_cells, sizes.n_genes), row_width(sizes.n_genes) - sizes.n_genes
    x = rng.gamma(2.0, 1.0, shape) * (rng.random(shape) < EXPRESSED)
    batch = DenseBatch(
        np.pad(x, [(0, 0), (0, n_more)]).astype(np.float32),
        rng.integers(sizes.n_types, size=shape[0]).astype(np.int32),
        np.ones(shape[0], bool),
    )
    vectors = np.pad(0.1 * rng.normal(size=(64, sizes.n_genes)), [(0, 0), (0, n_more)]).astype(np.float32)
    data = jax.device_get((state, batch, vectors)), int(rng.integers(2**31))
    device = jax.devices()[0]
    found = _trained(graphdef, sizes.n_types, *data, True, device)
    for beside in (device, *_cpu()):
        where = "" if beside == device else ", on the CPU"
        expected = _trained(graphdef, sizes.n_types, *data, False, beside)
        for what in expected:
            name = f"a step of TabNet beside the plain one{where}, {what}"
            yield compare(name, STEP, *(_leaves(each[what]) for each in (found, expected)))


def _cpu() -> Sequence[jax.Device]:
    """Return a CPU beside an accelerator, where JAX has been allowed one."""
    if jax.default_backend() == "cpu":
        return []
    try:
        return jax.devices("cpu")[:1]
    except RuntimeError:
        return []


def _keeping_gradients() -> optax.GradientTransformation:
    """Return an optimiser whose state is the last gradients: the first step of AdamW is little more than their sign."""

    def update(gradients: Any, _: Any, params: Any = None) -> tuple[Any, Any]:
        return gradients, gradients

    return optax.GradientTransformation(functools.partial(jax.tree.map, jnp.zeros_like), update)


def _trained(graphdef: Any, n_types: int, arrays: Any, seed: int, one_pass: bool, device: jax.Device) -> Named:
    """Return what comes of a step on a device, on the host."""
    with mock.patch.object(tabnet, "_in_one_pass", return_value=one_pass), jax.default_device(device):
        state, batch, vectors = jax.tree.map(jnp.array, arrays)  # copies: a step consumes its state
        objective = Objective(jnp.tri(n_types), jnp.ones(n_types), True, 1e-6)
        keys = jax.random.split(jax.random.key(seed), 2)
        step = make_train_step(graphdef, [objective] * 2, _keeping_gradients(), keys, vectors)
        state, metrics = jax.device_get(step(state, batch))
    result = {"loss": metrics.loss, "norm of the gradients": metrics.grad_norm}
    return {**result, "gradients": state.opt_state, "running statistics": state.stats}


def _leaves(tree: Any) -> Named:
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _in(dtype: Any, arrays: Named) -> Named:
    return {name: np.asarray(each).astype(dtype) for name, each in arrays.items()}  # in their order, unlike a tree_map
