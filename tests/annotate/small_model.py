"""A linear model of 40 genes and 6 types, and cells whose labels can be worked out without the package."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pandas as pd
from anndata import AnnData
from flax import nnx
from scipy import sparse

from hce_jax.checkpoint import save_model
from hce_jax.evaluation.calibration import Calibration, _types_of, calibration_path
from hce_jax.models import build_model, split_model
from hce_jax.predictor import ModelCard
from hce_jax.store import SideFiles
from hce_jax.typing import PRECISIONS

N_GENES, N_OTHERS = 40, 12
GENE_IDS = tuple(f"ENSG{number:011}" for number in range(1, N_GENES + 1))
GENE_NAMES = tuple(f"GENE{number}" for number in range(1, N_GENES + 1))
# lymphocyte > T cell > {CD4, CD8}; lymphocyte > B cell; neuron
LABELS = ("lymphocyte", "T cell", "CD4-positive T cell", "CD8-positive T cell", "B cell", "neuron")
CL_IDS = ("CL:0000542", "CL:0000084", "CL:0000624", "CL:0000625", "CL:0000236", "CL:0000540")
ABOVE = {0: {0}, 1: {0, 1}, 2: {0, 1, 2}, 3: {0, 1, 3}, 4: {0, 4}, 5: {5}}  # each type and those above it
REACH = np.array([[float(i in ABOVE[j]) for j in range(6)] for i in range(6)], np.float32)
KERNEL = np.random.default_rng(5).normal(scale=0.12, size=(N_GENES, 6)).astype(np.float32)
BIAS = np.array([-1, -1, 0, 0, 0, 0], np.float32)
CURVES = ((0.0, 1.0), (-0.5, 1.0), (0.0, 0.5))  # by depth: log-odds of the confidence = a + b * those of the mass
CONFIDENCE = 0.75  # that a label must have; odds of 3, so of the mass 3, 3 exp(0.5) and 9
N_CANDIDATES, N_TOLD = (400, 300, 100, 41, 120, 90), (400, 290, 90, 20, 120, 90)  # too few of CD8-positive T cells
THRESHOLDS = (3 / 4, 3 * np.exp(0.5) / (1 + 3 * np.exp(0.5)), 9 / 10)


def save_small_model(path: Path) -> Path:
    config = {"model_type": "linear", "precision": "float32"}
    model = build_model(config, N_GENES, 6, nnx.Rngs(0), precision=PRECISIONS["float32"])
    model.linear.kernel[...], model.linear.bias[...] = jnp.asarray(KERNEL), jnp.asarray(BIAS)
    loss = {"use_hierarchical_loss": True, "epsilon": 1e-6}
    card = ModelCard(config, GENE_IDS, GENE_NAMES, LABELS, CL_IDS, "v2026-03-26", "sf-log1p", loss, "none", 0, 0, {})
    _, params, stats = split_model(model)
    save_model(path, card, REACH, params, stats)
    side = SideFiles(path, GENE_IDS, GENE_NAMES, LABELS, CL_IDS, reachability=REACH, about={})
    calibration = Calibration(
        title="val split of store",
        n_cells=900,
        unit="donor",
        n_units=4,
        studies=(),
        types=_types_of(side),
        max_errors=np.array([0.05]),
        confidences=np.array([CONFIDENCE]),
        curves=np.array(CURVES),
        n_candidates=np.array(N_CANDIDATES),
        n_told=np.array(N_TOLD),
        temperature=1.0,
    )
    calibration.write(calibration_path(path))
    return path


def raw_counts(n_cells: int = 60) -> AnnData:
    """Cells with raw counts of the model's genes and others, in an order of their own; the last one has none."""
    rng = np.random.default_rng(3)
    ids = [*GENE_IDS, *(f"ENSG{number:011}" for number in range(9001, 9001 + N_OTHERS))]
    names = [*GENE_NAMES, *(f"OTHER{number}" for number in range(N_OTHERS))]
    counts = rng.poisson(rng.gamma(0.4, 6, size=(n_cells, len(ids)))).astype(np.float32)
    counts[:, 0] += 1  # every cell has some
    counts[-1, :N_GENES] = 0
    order = rng.permutation(len(ids))
    var = pd.DataFrame({"feature_name": names}, index=ids).iloc[order]
    obs = pd.DataFrame(
        {"leiden": rng.choice(["a", "b"], n_cells)}, index=[f"cell-{number}" for number in range(n_cells)]
    )
    return AnnData(sparse.csr_matrix(counts[:, order]), obs, var)


def expected_labels(cells: AnnData) -> list[tuple[str, float, str]]:
    """Label, mass and most probable type of each cell, with loops and float64."""
    counts = cells[:, list(GENE_IDS)].X.toarray().astype(np.float64)
    result = []
    for row in counts:
        if not row.any():
            result.append(("unassigned", 0.0, "unassigned"))
            continue
        logits = np.log1p(row * 1e4 / row.sum()) @ KERNEL.astype(np.float64) + BIAS
        p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
        mass = [sum(p[j] for j in range(6) if i in ABOVE[j]) for i in range(6)]
        passing = [i for i in range(6) if mass[i] >= THRESHOLDS[len(ABOVE[i]) - 1]]
        best = max(passing, key=lambda i: (len(ABOVE[i]), mass[i]), default=None)
        label, held = ("unassigned", 0.0) if best is None else (LABELS[best], mass[best])
        result.append((label, held, LABELS[int(np.argmax(p))]))
    return result
