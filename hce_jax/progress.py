"""A progress bar over a dataset."""

from collections.abc import Iterator
from contextlib import closing, contextmanager

import grain
import jax
from tqdm import tqdm


@contextmanager
def progress(dataset: grain.IterDataset, n_batches: int, title: str, first: int = 0) -> Iterator[tqdm]:
    """Iterate over the batches of a dataset under a progress bar; the dataset is closed however the block is left.

    The bar is shown only on a terminal, by the first host, and wiped at its end: logs stay readable.

    Parameters
    ----------
    dataset
        Of the input pipeline.
    n_batches
        How many it has.
    title
        What the bar is called.
    first
        Number of the batch to begin with.

    Examples
    --------
    >>> with progress(evaluation_batches(split, 2048), 10, "val") as bar:  # doctest: +SKIP
    ...     for batch in bar: ...
    """
    hidden = None if jax.process_index() == 0 else True  # None: on a terminal only
    with closing(iter(dataset)) as batches:
        if first:
            batches.set_state({"next_index": first})
        with tqdm(batches, title, n_batches, initial=first, unit="batch", leave=False, disable=hidden) as bar:
            yield bar
