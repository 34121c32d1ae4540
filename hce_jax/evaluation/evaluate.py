"""An evaluation from end to end: cells are read once, classified by all models, counted, and the results written."""

import dataclasses
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hce_jax.errors import StoreError
from hce_jax.evaluation.calibration import Calibration
from hce_jax.evaluation.cells import Cells
from hce_jax.evaluation.counts import Counts, DecoderCounts, counts_path
from hce_jax.evaluation.decoders import DECODERS, Decoded, Decoders
from hce_jax.evaluation.detailed import DetailedResults
from hce_jax.evaluation.hierarchical import coverage_curve, expected_calibration_error
from hce_jax.evaluation.plots import calibration_plot, confusion_plot, performance_plot
from hce_jax.evaluation.predict import Classifier, classified
from hce_jax.evaluation.reports import RULES, Reports, decoder_name, make_reports, write_reports
from hce_jax.evaluation.tally import GROUP_COLUMNS, Tally
from hce_jax.files import written_together
from hce_jax.store import LABEL_COLUMN, Block
from hce_jax.store.work_folder import named_in_errors

#: Column of the studies, whose cells resemble each other.
STUDY = "dataset_id"
DETAILED_FILE = "{}_detailed_results.parquet"


@dataclasses.dataclass(frozen=True)
class Settings:
    """How models are evaluated.

    Attributes
    ----------
    split
        "id" or "ood": one of the :data:`hce_jax.evaluation.reports.RULES`.
    decoder
        Whose predictions the files are about; the table of the decoders has all of them.
    confidence
        Mass that back-off asks for, of a job without a calibration.
    max_error
        Error that back-off promises, of a job with one; None: it goes by ``confidence`` there too, and only the
        temperature of the calibration is used.
    batch_size
        Cells computed at a time.
    detailed
        Whether every cell's prediction and probabilities are written.
    subset_labels
        Codes of the types of the subset table (k,), or None.
    """

    split: str
    decoder: str = DECODERS[0]
    confidence: float = 0.5
    max_error: float | None = 0.05
    batch_size: int = 2048
    detailed: bool = False
    subset_labels: np.ndarray | None = None


class Job(NamedTuple):
    """A classifier, the folder of its results, and its calibration, if it has one: thresholds and temperature."""

    classifier: Classifier
    folder: Path
    calibration: Calibration | None = None

    @property
    def temperature(self) -> float | None:
        """T of the calibration."""
        return None if self.calibration is None else self.calibration.temperature


class Result(NamedTuple):
    """What came of a job.

    Attributes
    ----------
    tallies
        What was counted for each decoder.
    reports
        The tables, as they were written.
    """

    tallies: dict[str, Tally]
    reports: Reports


def evaluate(cells: Cells, jobs: Sequence[Job], settings: Settings) -> list[Result]:
    """Evaluate models on the same cells, which are read once, and write the files of each into its folder.

    Memory does not depend on the number of cells. The files appear together; an evaluation that ends early leaves what
    was there before.

    Parameters
    ----------
    cells
        The cells.
    jobs
        Classifiers of the genes and types of the cells.
    settings
        How.

    Returns
    -------
    One for each job.

    Raises
    ------
    StoreError, SourceError
        If cells cannot be read, there are none, or the results cannot be written.
    ConfigError
        If back-off's confidence, or the promised error, is out of range.

    Examples
    --------
    >>> cells = StoreCells(open_store("store").split("test"))  # doctest: +SKIP
    >>> [result] = evaluate(cells, [Job(load_model(run), Path("results"))], Settings("id"))  # doctest: +SKIP
    >>> result.reports.overall.loc["macro avg", "f1-score"]  # doctest: +SKIP
    0.81
    """
    if not cells.n_cells:
        raise StoreError(f"{cells.title} holds no cells, so there is nothing to report on; choose another")
    decoders = [_decoders(cells, job, settings) for job in jobs]
    n_groups = {column: len(cells.lookups[column]) for column in GROUP_COLUMNS}
    tallies = [{name: Tally(cells.side.reachability, n_groups) for name in each.names} for each in decoders]
    with ExitStack() as stack:
        # A place that cannot be written is found before the work; all files appear together, after it.
        asides = [job._replace(folder=stack.enter_context(written_together(job.folder))) for job in jobs]
        for block, decoded in _decoded(cells, asides, decoders, settings):
            labels = block.column(LABEL_COLUMN)
            groups = {column: block.column(column) for column in GROUP_COLUMNS}
            for counts, of_decoder in zip(tallies, decoded, strict=True):
                for name, (codes, confidence) in of_decoder.items():
                    counts[name].add(labels, codes, confidence, groups)
        results = [
            Result(counts, _reports(counts, cells, job, settings)) for counts, job in zip(tallies, jobs, strict=True)
        ]
        for aside, result in zip(asides, results, strict=True):
            _write(aside, result, cells, settings)
            _write_counts(aside, result.tallies, cells, settings)
        written = [{path.name for path in aside.folder.iterdir()} for aside in asides]
    for job, result, names in zip(jobs, results, written, strict=True):
        _remove_older(job, result, names)
    return results


def _decoders(cells: Cells, job: Job, settings: Settings) -> Decoders:
    threshold: float | np.ndarray = settings.confidence
    if job.calibration is not None and settings.max_error is not None:
        threshold = job.calibration.thresholds_at(settings.max_error)
    return Decoders(cells.side.reachability, threshold, job.temperature)


def _reports(tallies: dict[str, Tally], cells: Cells, job: Job, settings: Settings) -> Reports:
    rule = RULES[settings.split]
    return make_reports(
        tallies,
        settings.decoder,
        rule,
        cells.lookups,
        settings.subset_labels,
        backoff=_asks_for(job, settings),
        temperature=job.temperature,
    )


def _asks_for(job: Job, settings: Settings) -> dict[str, float]:
    """Return what back-off asks for, by the name of its column."""
    if job.calibration is None or settings.max_error is None:
        return {"confidence": settings.confidence}
    return {"max_error": settings.max_error}


def _decoded(
    cells: Cells, jobs: Sequence[Job], decoders: Sequence[Decoders], settings: Settings
) -> Iterator[tuple[Block, list[dict[str, Decoded]]]]:
    """Give the predictions of each job, block by block, while every cell's are written."""
    with ExitStack() as stack:
        files = [
            stack.enter_context(DetailedResults(_detailed(job), cells.side.labels, cells.lookups))
            for job in jobs
            if settings.detailed
        ]
        for block, probabilities in classified(cells, [job.classifier for job in jobs], settings.batch_size):
            decoded = [of_job.decode_all(each) for of_job, each in zip(decoders, probabilities, strict=True)]
            for file, of_decoder, each in zip(files, decoded, probabilities, strict=settings.detailed):
                file.add(block, of_decoder[settings.decoder].codes, each)
            yield block, decoded


def _detailed(job: Job) -> Path:
    return job.folder / DETAILED_FILE.format(job.classifier.model_type)


def _write(job: Job, result: Result, cells: Cells, settings: Settings) -> None:
    """Write tables and pictures."""
    name, labels = job.classifier.model_type, cells.side.labels
    reports, tally = result.reports, result.tallies[settings.decoder]
    write_reports(job.folder, name, reports)
    decoder = decoder_name(settings.decoder, **_asks_for(job, settings))
    by_decoder = "" if settings.decoder == DECODERS[0] else f", {decoder}"
    title = (
        f"{job.classifier.title}{by_decoder}: {{}}, {'held-out donors' if settings.split == 'id' else 'new studies'}"
    )
    performance_plot(
        reports.per_type, labels, job.folder / f"{name}_performance_plot.png", title.format("F1 per cell type")
    )
    confusion_plot(
        tally.confusion,
        labels,
        cells.side.reachability,
        job.folder / f"{name}_confusion_ontology.png",
        title.format("predictions by label"),
    )
    calibration_plot(
        reports.calibration,
        *coverage_curve(tally.calibration),
        expected_calibration_error(tally.calibration),
        job.folder / f"{name}_calibration.png",
        title.format("confidence and accuracy"),
    )


def _write_counts(job: Job, tallies: dict[str, Tally], cells: Cells, settings: Settings) -> None:
    side, with_cells = cells.side, np.flatnonzero(tallies[DECODERS[0]].groups[STUDY][:, 2].sum(axis=1))
    counts = Counts(
        split=settings.split,
        title=cells.title,
        labels=side.labels,
        cl_ids=side.cl_ids or (None,) * side.n_types,
        reachability=side.reachability,
        studies=tuple(cells.lookups[STUDY][code] for code in with_cells),
        decoders={
            name: DecoderCounts(each.confusion, each.groups[STUDY][with_cells], each.calibration)
            for name, each in tallies.items()
        },
        backoff=_asks_for(job, settings),
        temperature=job.temperature,
    )
    with named_in_errors(counts_path(job.folder, job.classifier.model_type)) as path:
        counts.write(path)


def _remove_older(job: Job, result: Result, written: Collection[str]) -> None:
    """Remove what an older evaluation wrote and this one did not: it must not lie beside the new tables."""
    for path in (_detailed(job), *(job.folder / name for name in result.reports.files(job.classifier.model_type))):
        if path.name not in written and path.exists():
            path.unlink()
            print(f"{path} was of an older evaluation and is removed", file=sys.stderr)
