"""Cross entropy beside the hierarchical cross entropy, on a toy that trains in seconds.

    python examples/ce_vs_hce.py [--plot ce_vs_hce.png]

Thirteen types in a hierarchy, five of them leaves (8 to 12); each type is a cluster of points in the plane. Of the
labels of the leaves 80 % are moved to an ancestor, each as likely as the other, as some studies of an atlas write
"T cell" where others name the kind. One MLP is trained on them with each loss, and then asked about new points.

After the toy of the HCE paper's repository (Cultrera di Montesano et al., Nat Comput Sci 2026;
example_ce_vs_hce.ipynb); hierarchy, clusters and network are our own. Its run printed an accuracy of 0.589 for cross
entropy and 0.994 for HCE; here it is 0.62 and 0.99. An answer counts as in the paper: right if it is the point's type
or below it. So the eight types above the leaves, whose labels are as they should be, are right with either loss (8/13 =
0.615), and the losses differ on the leaves. There cross entropy names what is labelled most: of a leaf with k ancestors
20 % are labelled as the leaf and 80 % / k as each ancestor, so that it finds no leaf with k < 4; on the leaves alone it
scores near 0.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from hce_jax.hierarchy import correct_predictions, depths, reachability_from_edges
from hce_jax.losses import cross_entropy, hierarchical_cross_entropy

# (parent, child): two trees, below 0 and 1, that share the leaf 10.
EDGES = [(0, 2), (0, 3), (1, 4), (1, 5), (2, 6), (4, 7), (6, 8), (3, 9), (3, 10), (4, 10), (7, 11), (5, 12)]
N_TYPES = 13
LEAVES = np.arange(8, 13)
REACHABILITY = reachability_from_edges(N_TYPES, EDGES)
MOVED = 0.8  # share of the leaves' labels that are moved to an ancestor
SPACING, SPREAD = 3.0, 0.5  # of the centres, and standard deviation of a cluster: they overlap by a little
COLOURS = [str(grey) for grey in np.linspace(0.45, 0.9, 8)] + ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"]

Loss = Callable[[jax.Array, jax.Array], jax.Array]
Predict = Callable[[np.ndarray], np.ndarray]
Outcomes = dict[str, tuple[Predict, dict[str, float]]]


def draw_points(per_type: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Draw points (n, 2) of every type's cluster, and the type (n,) of each. Relatives need not be neighbours."""
    rows = [(np.arange(4) + 0.5, 0), (np.arange(5), 1), (np.arange(4) + 0.5, 2)]
    lattice = [(x, y * np.sqrt(3) / 2) for columns, y in rows for x in columns]
    centres = SPACING * np.array(lattice)[np.random.default_rng(0).permutation(N_TYPES)]
    types = np.repeat(np.arange(N_TYPES), per_type)
    points = centres[types] + SPREAD * rng.standard_normal((len(types), 2))
    return points.astype(np.float32), types


def training_data() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw points (n, 2), their types (n,), and labels (n,) of which a share is moved from leaves to ancestors."""
    rng = np.random.default_rng(1)
    points, types = draw_points(300, rng)
    labels = types.copy()
    for i in np.flatnonzero(np.isin(types, LEAVES) & (rng.random(len(types)) < MOVED)):
        labels[i] = rng.choice(np.flatnonzero(REACHABILITY[:8, types[i]]))
    return points, types, labels


class Network(nnx.Module):
    """Two hidden layers of 64 units."""

    def __init__(self, rngs: nnx.Rngs):
        self.hidden = nnx.List([nnx.Linear(2, 64, rngs=rngs), nnx.Linear(64, 64, rngs=rngs)])
        self.last = nnx.Linear(64, N_TYPES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Give the logits (n, types) of points (n, 2)."""
        for layer in self.hidden:
            x = jax.nn.relu(layer(x))
        return self.last(x)


def train(loss: Loss, points: np.ndarray, labels: np.ndarray, steps: int) -> Predict:
    """Train the network with Adam, on all points in each step; give what predicts the types (n,) of points (n, 2)."""
    graph, weights = nnx.split(Network(nnx.Rngs(0)))
    optimiser = optax.adam(3e-3)
    x, targets = jnp.asarray(points), jnp.asarray(labels)

    def step(_: int, state: tuple[Any, Any]) -> tuple[Any, Any]:
        weights, moments = state
        gradient = jax.grad(lambda weights: loss(nnx.merge(graph, weights)(x), targets))(weights)
        updates, moments = optimiser.update(gradient, moments)
        return optax.apply_updates(weights, updates), moments

    weights, _ = jax.jit(lambda state: jax.lax.fori_loop(0, steps, step, state))((weights, optimiser.init(weights)))
    return lambda points: np.asarray(nnx.merge(graph, weights)(jnp.asarray(points)).argmax(axis=1))


def compare(steps: int = 500) -> Outcomes:
    """Train with each loss; of each, what predicts, and how new points are answered, as shares of 1."""
    points, _, labels = training_data()
    new_points, new_types = draw_points(300, np.random.default_rng(2))
    leaf = np.isin(new_types, LEAVES)
    reach = jnp.asarray(REACHABILITY)
    losses: dict[str, Loss] = {"CE": cross_entropy, "HCE": lambda z, y: hierarchical_cross_entropy(z, y, reach)}
    outcomes = {}
    for name, loss in losses.items():
        predict = train(loss, points, labels, steps)
        answers = predict(new_points)
        right = correct_predictions(new_types, answers, REACHABILITY) == new_types
        too_high = (REACHABILITY[answers, new_types] > 0) & (answers != new_types)
        shares = {"right": right, "leaf, right": right[leaf], "leaf, ancestor named": too_high[leaf]}
        shares["above, named below"] = (right & (answers != new_types))[~leaf]
        outcomes[name] = predict, {text: float(share.mean()) for text, share in shares.items()}
    return outcomes


def plot(outcomes: Outcomes, path: Path) -> None:
    """Draw the hierarchy, the labelled points, and what is predicted where with each loss."""
    figure = Figure(figsize=(10.5, 7), layout="constrained")
    hierarchy, *maps = figure.subplots(2, 2).flat
    points, types, labels = training_data()
    colours: dict[str, Any] = {"cmap": ListedColormap(COLOURS), "vmin": 0, "vmax": N_TYPES - 1}
    draw_hierarchy(hierarchy)
    maps[0].scatter(*points.T, s=1.5, c=labels, **colours)
    maps[0].set_title("labels to learn from: 80 % of the leaves' are an ancestor")
    (left, low), (right, high) = points.min(axis=0), points.max(axis=0)
    grid = np.stack(np.meshgrid(np.linspace(left, right, 400), np.linspace(low, high, 250)), axis=-1)
    for axes, (name, (predict, shares)) in zip(maps[1:], outcomes.items(), strict=True):
        answers = predict(grid.reshape(-1, 2)).reshape(grid.shape[:2])
        axes.imshow(answers, extent=(left, right, low, high), origin="lower", **colours)
        axes.set_title(f"predicted with {name}: {shares['right']:.3f} right")
    for axes in maps:
        axes.set_aspect("equal")
        axes.set_axis_off()
        for type_ in range(N_TYPES):
            place = points[types == type_].mean(axis=0)
            axes.annotate(str(type_), place, ha="center", va="center", weight="bold")
    figure.savefig(path, dpi=150)


def draw_hierarchy(axes: Axes) -> None:
    """Draw types as discs, by depth from the top, and an arrow from each parent to its child."""
    order = [6, 2, 8, 0, 9, 3, 10, 4, 7, 11, 1, 5, 12]  # from the left to the right, so that few arrows cross
    place = {t: (order.index(t), -depth) for t, depth in enumerate(depths(REACHABILITY))}
    for parent, child in EDGES:
        arrow = {"arrowstyle": "->", "shrinkA": 9, "shrinkB": 9}
        axes.annotate("", place[child], place[parent], arrowprops=arrow)
    for t, (x, y) in place.items():
        axes.scatter(x, y, s=330, color=COLOURS[t], zorder=2)
        axes.annotate(str(t), (x, y), ha="center", va="center", weight="bold", zorder=3)
    axes.margins(0.1)
    axes.set_axis_off()
    axes.set_title("the hierarchy: leaves in colour, types above them grey")


def main() -> None:
    """Train, print, and draw."""
    parser = argparse.ArgumentParser(description="Cross entropy beside the hierarchical cross entropy, on a toy.")
    parser.add_argument("--plot", type=Path, help="where to write a picture")
    path = parser.parse_args().plot
    outcomes = compare()
    for name, (_, shares) in outcomes.items():
        print(f"{name:4} accuracy {shares['right']:.3f}; on the leaves {shares['leaf, right']:.3f}")
    ce, hce = ({text: f"{share:.0%}" for text, share in shares.items()} for _, shares in outcomes.values())
    print(f"""
Of the points of leaves cross entropy names {ce["leaf, ancestor named"]} an ancestor: that is the label which most of
their neighbours have, and naming the leaf is punished. HCE does so for {hce["leaf, ancestor named"]}: the leaf is right
by the ancestors' labels too, so that the few labels which name the leaf decide.
What HCE does not do: stop. Of the points whose type is above the leaves it gives {hce["above, named below"]} a finer
name that nobody has labelled (cross entropy: {ce["above, named below"]}). That counts as right.""")
    if path:
        plot(outcomes, path)
        print(f"\nwritten {path}")


if __name__ == "__main__":
    main()
