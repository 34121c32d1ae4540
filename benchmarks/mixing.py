"""How well an epoch's batches are mixed, for a store whose cells lie sorted.

    python benchmarks/mixing.py

Entropy of the labels and of the studies in a batch, in bits, mean over the batches of an epoch, against the ideal:
batches drawn without replacement from the whole split. It needs no store, only the plan of the epoch. The split has
1,000,000 cells of 100 studies and 160 labels, both with frequencies 1 / rank, and each study has label frequencies of
its own. Its cells lie

- sorted by study, then by label: the worst case;
- study after study, shuffled within each: how atlases are assembled;
- wholly shuffled.

"Ghost" are the batches of 256 consecutive rows over which TabNet normalises. About 20 s and 1 GB of memory.
"""

import numpy as np

from hce_jax.input import Shuffle
from hce_jax.input.source import cells_of_batches

N_CELLS, N_LABELS, N_STUDIES = 1_000_000, 160, 100
BATCH_SIZE, GHOST_SIZE = 2048, 256
BLOCK_SIZES = (256, 512, 1024)
WINDOWS = (16_384, 32_768, 65_536, 131_072, 262_144)
#: Of a packed cell in memory, at 2,190 expressed genes.
BYTES_PER_CELL = 4400
#: How much label frequencies differ between studies: shape of the gamma distribution of their weights.
_SPREAD = 0.2


def arrangements(rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return label and study of each cell, by how the cells lie in the store.

    Examples
    --------
    >>> [len(labels) for labels, _ in arrangements(np.random.default_rng(0)).values()]
    [1000000, 1000000, 1000000]
    """
    sizes = rng.multinomial(N_CELLS, _normalised(1 / np.arange(1, N_STUDIES + 1)))
    rng.shuffle(sizes)
    studies = np.repeat(np.arange(N_STUDIES), sizes)
    frequencies = 1 / np.arange(1, N_LABELS + 1) * rng.gamma(_SPREAD, size=(N_STUDIES, N_LABELS))
    labels = np.concatenate(
        [rng.choice(N_LABELS, size, p=_normalised(each)) for size, each in zip(sizes, frequencies, strict=True)]
    )
    by_label, anyhow = np.lexsort((labels, studies)), rng.permutation(N_CELLS)
    return {
        "by study, then label": (labels[by_label], studies),
        "by study": (labels, studies),
        "shuffled": (labels[anyhow], studies[anyhow]),
    }


def _normalised(weights: np.ndarray) -> np.ndarray:
    return weights / weights.sum()


def mean_entropy(codes: np.ndarray, n_rows: int) -> float:
    """Return the entropy of the codes in each n_rows of them that follow each other, in bits, mean over all.

    Examples
    --------
    >>> mean_entropy(np.array([0, 1, 2, 3, 5, 5, 5, 5]), 4)
    1.0
    """
    sets = codes.reshape(-1, n_rows)
    n_codes = int(codes.max()) + 1
    places = np.arange(len(sets))[:, None] * n_codes + sets
    p = np.bincount(places.ravel(), minlength=len(sets) * n_codes).reshape(len(sets), n_codes) / n_rows
    return float(-(p * np.log2(p, where=p > 0, out=np.zeros_like(p))).sum(axis=1).mean())


def entropies(order: np.ndarray, labels: np.ndarray, studies: np.ndarray) -> str:
    """Return four cells of the table: labels and studies, in batches and in ghost batches.

    Examples
    --------
    >>> entropies(np.arange(2048), np.zeros(2048, int), np.arange(2048) % 2)
    '0.00 | 0.00 | 1.00 | 1.00'
    """
    found = [mean_entropy(codes[order.ravel()], n) for codes in (labels, studies) for n in (BATCH_SIZE, GHOST_SIZE)]
    return " | ".join(f"{entropy:.2f}" for entropy in found)


def main() -> None:
    """Print the table."""
    rng = np.random.default_rng(0)
    stores = arrangements(rng)
    print("| cells lie | block | window | MB | labels, batch | labels, ghost | studies, batch | studies, ghost |")
    print("|---|---|---|---|---|---|---|---|")
    ideal = rng.permutation(N_CELLS)[: N_CELLS // BATCH_SIZE * BATCH_SIZE]
    print(f"| ideal | | | | {entropies(ideal, *stores['shuffled'])} |")
    rows: dict[str, list[str]] = {name: [] for name in stores}
    for block_size in BLOCK_SIZES:
        blocks = np.diff(np.append(np.arange(0, N_CELLS, block_size), N_CELLS))
        for window in WINDOWS:
            order = cells_of_batches(blocks, BATCH_SIZE, window, Shuffle(data_seed=0, epoch=0))
            for name, (labels, studies) in stores.items():
                size = f"{block_size:,} | {window:,} | {window * BYTES_PER_CELL / 1e6:,.0f}"
                rows[name].append(f"| {name} | {size} | {entropies(order, labels, studies)} |")
    for lines in rows.values():
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
