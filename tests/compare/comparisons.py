"""Small comparisons in memory: counts of random predictions, those of the later losses more often right."""

from pathlib import Path

import numpy as np

from hce_jax.compare.trained import Comparison, TrainedRun
from hce_jax.evaluation.counts import Counts, DecoderCounts
from hce_jax.hierarchy import reachability_from_edges

#: Four depths; type 5 has two parents, 8 and later types have no relatives.
EDGES = ((0, 1), (0, 2), (1, 3), (1, 4), (1, 5), (2, 5), (5, 6), (5, 7))
N_BINS = 1500
N_STUDIES = {"id": 6, "ood": 5}
DECODERS = ("argmax", "backoff", "min-distance", "temperature")


def reachability(n_types):
    return reachability_from_edges(n_types, [edge for edge in EDGES if max(edge) < n_types])


def random_cells(rng, reach, split, cells, rightness):
    """Study and label of each cell, the same for all models, and a prediction: the label, one below it, or any."""
    n_types, n_studies = len(reach), N_STUDIES[split]
    # The same cells whatever the model; the last type of many occurs among predictions only, in ood the first neither.
    drawn = np.random.default_rng([n_types, len(split)])
    studies = np.sort(drawn.integers(n_studies, size=cells))
    first = int(split == "ood" and n_types > 2)
    last = n_types - (n_types > 2)
    labels = first + drawn.integers(last - first, size=cells)
    hard_s = drawn.uniform(-0.2, 0.2, n_studies)
    right = rng.random(cells) < rightness + hard_s[studies] + 0.1 * np.sin(labels)
    below = np.array([rng.choice(np.flatnonzero(reach[label])) for label in labels])
    return studies, labels, np.where(right, below, rng.integers(n_types, size=cells))


def decoder_counts(reach, n_studies, studies, labels, predictions, confidence):
    """Counts as :class:`hce_jax.evaluation.tally.Tally` has them; -1: unassigned."""
    n_types = len(reach)
    confusion = np.zeros((n_types, n_types + 1), np.int64)
    np.add.at(confusion, (labels, predictions), 1)
    right = (predictions >= 0) & (reach[labels, predictions] > 0)
    corrected = np.where(right, labels, predictions)
    by_study = np.zeros((n_studies, 3, n_types), np.int64)
    np.add.at(by_study, (studies[right], 0, labels[right]), 1)
    np.add.at(by_study, (studies[predictions >= 0], 1, corrected[predictions >= 0]), 1)
    np.add.at(by_study, (studies, 2, labels), 1)
    calibration = np.zeros((N_BINS, 3))
    bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    assigned = predictions >= 0
    np.add.at(calibration, bins[assigned], np.stack([np.ones_like(confidence), confidence, right], axis=1)[assigned])
    return DecoderCounts(confusion, by_study, calibration)


def make_counts(split="id", n_types=10, seed=0, rightness=0.5, cells=400, temperature=1.5):
    """Counts of one evaluation; without a temperature there is no decoder of that name."""
    rng = np.random.default_rng([seed, len(split), n_types])
    reach = reachability(n_types)
    studies, labels, predictions = random_cells(rng, reach, split, cells, rightness)
    sure = rng.uniform(0.2, 1, cells)
    n_studies = N_STUDIES[split]
    made = {
        "argmax": (predictions, sure),
        "backoff": (np.where(sure > 0.4, predictions, -1), sure),
        "min-distance": (np.where(sure > 0.3, predictions, labels), sure),
        "temperature": (predictions, sure**2),
    }
    return Counts(
        split=split,
        title=f"{split} cells",
        labels=tuple(f"type {code}" for code in range(n_types)),
        cl_ids=tuple(f"CL:{code:07d}" if code else None for code in range(n_types)),
        reachability=reach,
        studies=tuple(f"{split} study {number}" for number in range(n_studies)),
        decoders={
            name: decoder_counts(reach, n_studies, studies, labels, *made[name])
            for name in DECODERS
            if name != "temperature" or temperature is not None
        },
        backoff={"confidence": 0.5},
        temperature=temperature,
    )


def make_run(model, loss, seed, split_counts, **changes):
    """A run as if it lay in tb_logs."""
    hierarchical = loss != "CE"
    config = {
        "model_name": model,
        "model_type": model if model in ("linear", "mlp", "tabnet") else "linear",
        "use_hierarchical_loss": hierarchical,
        "epsilon": 0.0 if loss == "HCE exact" else 1e-6,
        "seed": seed,
        "data_seed": 0,
        "data_path": "store",
        "batch_size": 256,
        "max_epochs": 3,
        "learning_rate": 5e-4,
        **changes,
    }
    name = f"{model}{'_hierarchical_loss' if hierarchical else ''}/default/version_{seed}"
    return TrainedRun(Path("tb_logs") / name, model, loss, seed, config, split_counts)


def make_comparison(
    models=("linear", "mlp"),
    losses=("CE", "HCE"),
    seeds=(1, 2, 3, 4),
    splits=("id", "ood"),
    n_types=10,
    *,
    temperature=1.5,
    n_train=True,
    cells=400,
    gain=0.2,
):
    """A comparison of random predictions: right half of the time, of each later loss ``gain`` more often."""
    runs = []
    for number, model in enumerate(models):
        for place, loss in enumerate(losses):
            for seed in seeds:
                rightness = 0.45 + 0.05 * number + gain * place
                counts = {
                    split: make_counts(split, n_types, 100 * number + 10 * place + seed, rightness, cells, temperature)
                    for split in splits
                }
                runs.append(make_run(model, loss, seed, counts))
    first = runs[0].counts["id"]
    return Comparison(
        runs=tuple(runs),
        models=tuple(models),
        losses=tuple(losses),
        seeds=tuple(seeds),
        splits=tuple(splits),
        labels=first.labels,
        cl_ids=first.cl_ids,
        reachability=first.reachability,
        n_train=np.arange(1, n_types + 1) ** 2 * 100 if n_train else None,
        store="a store in memory",
        ontology_release=None,
        notes=("The cells are made up.",),
    )
