"""What a reader of a comparison must know, a sentence or two each."""

import itertools
from collections.abc import Iterator

from hce_jax.compare.alike import OF_LOSS, differences, grouped
from hce_jax.compare.trained import Comparison
from hce_jax.evaluation.reports import published_subset
from hce_jax.store import Store

#: Fewer studies than these make an interval over studies say little.
FEW_STUDIES = 5


def notes(comparison: Comparison, store: Store | None) -> Iterator[str]:
    """Say what the numbers of a comparison hang on.

    Parameters
    ----------
    comparison
        Its own notes are not looked at.
    store
        That of its training cells, if it is there.

    Examples
    --------
    >>> list(notes(comparison, None))[-1]  # doctest: +SKIP
    'The training store is not there, so that the numbers of training cells are not known.'
    """
    yield _note_on_data(comparison, store)
    yield (
        "Macro F1 in the id split is the mean over all types that occur among labels or predictions, in the ood split "
        "over those that occur among labels, as published; a prediction below the label counts as right."
    )
    yield from _notes_on_seeds(comparison)
    for split in comparison.splits:
        n_studies = len(comparison.runs[0].counts[split].studies)
        if n_studies == 1:
            yield f"The {split} cells are of one study, so that there is no interval over studies."
        elif n_studies < FEW_STUDIES:
            yield f"The {split} cells are of {n_studies} studies: an interval over so few says little."
    if comparison.n_train is None:
        where = comparison.runs[0].config["data_path"]
        yield f"The training store {where} is not there, so that the numbers of training cells are not known."
    elif len({run.config.get("sub_sample_frac", 1.0) for run in comparison.runs}) > 1:
        yield "Some of the runs saw fewer training cells (sub_sample_frac) than are given here."
    yield from _notes_on_fields(comparison)


def _note_on_data(comparison: Comparison, store: Store | None) -> str:
    is_simulated = store is not None and store.side.about.get("simulated")
    kind = "nothing here was measured on a cell; " if is_simulated else ""
    n_train = "" if comparison.n_train is None else f", {comparison.n_train.sum():,} training cells"
    theirs = "other data" if published_subset(comparison.labels) is None else "the same types"
    evaluated = []
    for split, name in zip(comparison.splits, ("held-out donors", "new studies"), strict=False):
        counts = comparison.runs[0].counts[split]
        n_types = int(counts.decoders["argmax"].by_study[:, 2].any(axis=0).sum())
        studies = f"{len(counts.studies)} {'study' if len(counts.studies) == 1 else 'studies'}"
        evaluated.append(f"{name} ({split}): {counts.n_cells:,} cells of {n_types} types from {studies}")
    return (
        f"Data: {comparison.store}; {kind}{len(comparison.labels)} cell types{n_train}; {'; '.join(evaluated)}. The "
        f"published figures are of {theirs}: CELLxGENE Census 2023-05-15 (164 types, 22.2 M cells), and 21 studies "
        "that were new in Census 2023-12-15 (2.6 M cells of 80 of the types)."
    )


def _notes_on_seeds(comparison: Comparison) -> Iterator[str]:
    groups = grouped(comparison.runs)
    if all(len(group) == 1 for group in groups.values()):
        yield "There is one seed: no spread over seeds, and no test of single cell types."
        return
    shared = [group for group in groups.values() if len({run.config.get("data_seed") for run in group}) < len(group)]
    if shared:
        yield (
            "Runs of several seeds saw the cells in the same order (one data_seed), as models that are trained in one "
            "stream do: the spread over seeds (sd) is that of initial weights, dropout and augmentation, and leaves "
            "out what shuffling would add."
        )


def _notes_on_fields(comparison: Comparison) -> Iterator[str]:
    """Say in which fields the losses of a model differ, beside those that say the loss."""
    baseline = comparison.losses[0]
    for model, loss in itertools.product(comparison.models, comparison.losses[1:]):
        pairs = zip(comparison.of(model, baseline), comparison.of(model, loss), strict=True)
        found = {name: values for pair in pairs for name, values in differences(*pair, OF_LOSS)}
        if found:
            listed = ", ".join(f"{name} ({a!r} and {b!r})" for name, (a, b) in found.items())
            yield (
                f"{model}: {baseline} and {loss} differ also in {listed}, so that not all of the difference is the "
                "loss."
            )
