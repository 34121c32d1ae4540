"""A progress bar over a dataset."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

import grain
from tqdm import tqdm


@contextmanager
def progress(dataset: grain.IterDataset, n_batches: int, title: str) -> Iterator[tqdm]:
    """Iterate over the batches of a dataset under a progress bar; the dataset is closed however the block is left.

    The bar is shown only on a terminal, and wiped at its end: logs stay readable.

    Examples
    --------
    >>> with progress(evaluation_batches(split, 2048), 10, "val") as bar:  # doctest: +SKIP
    ...     for batch in bar: ...
    """
    with closing(iter(dataset)) as batches:
        with tqdm(batches, total=n_batches, desc=title, unit="batch", leave=False, disable=None) as bar:
            yield bar
