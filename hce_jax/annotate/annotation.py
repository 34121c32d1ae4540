"""A user's cells annotated, from end to end."""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import jax
import numpy as np
import pandas as pd
from anndata import AnnData

from hce_jax.annotate.contrast import contrast_table, sample_rows, sentences
from hce_jax.annotate.labels import Labeller, Labels
from hce_jax.annotate.output import Output, check_suffix, check_target, open_output
from hce_jax.annotate.prepared import EXPRESSED, PreparedCells
from hce_jax.annotate.query import Query, open_query
from hce_jax.annotate.report import ReportInput, write_report
from hce_jax.errors import CheckpointError, ConfigError, SourceError
from hce_jax.evaluation.calibration import MOST_HARDLY_JUDGED, calibration_of
from hce_jax.evaluation.decoders import UNASSIGNED
from hce_jax.evaluation.predict import computed
from hce_jax.files import written_aside
from hce_jax.hierarchy import CellOntology
from hce_jax.open_model import open_model, published_checkpoint
from hce_jax.predictor import Ensemble
from hce_jax.store import SideFiles
from hce_jax.store.type_matching import TypeMatcher
from hce_jax.typing import Int

#: Keys of obsm: the embedding, and the mass of every type's subtree.
EMBEDDING, PROBABILITIES = "X_hce", "hce_probabilities"
#: The promise where nothing else is asked for.
MAX_ERROR = 0.05
#: Types that a warning names.
_MOST_TYPES = 3


@dataclasses.dataclass(frozen=True)
class Settings:
    """How cells are annotated.

    Attributes
    ----------
    max_error
        Share of the labels that may be wrong on cells like those of the calibration; None: see ``confidence``.
    confidence
        Mass that the subtree of a label must hold, in (0, 1], instead of a promise; None: see ``max_error``. Where both
        are None, ``max_error`` is 0.05.
    counts
        Name of the matrix; None: it is looked for.
    gene_column
        Column of var with ids or names of the genes; None: whichever finds most.
    group_by
        Column of obs with clusters, each of which gets a label too; None: none.
    probabilities
        Whether the mass of every type's subtree is written for each cell.
    explain
        Whether the genes that drove each label are written.
    batch_size
        Cells computed at a time.

    Raises
    ------
    ConfigError
        If both ``max_error`` and ``confidence`` are given, or one is out of its range.

    Examples
    --------
    >>> Settings().promise
    0.05
    """

    max_error: float | None = None
    confidence: float | None = None
    counts: str | None = None
    gene_column: str | None = None
    group_by: str | None = None
    probabilities: bool = False
    explain: bool = False
    batch_size: int = 2048

    def __post_init__(self) -> None:
        if self.max_error is not None and self.confidence is not None:
            raise ConfigError("--max-error and --confidence exclude each other: a promise, or a threshold; give one")
        if self.confidence is not None and not 0 < self.confidence <= 1:
            raise ConfigError(f"--confidence={self.confidence}: it lies above 0 and is at most 1; 0.9 for example")
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size={self.batch_size}: at least one cell is computed at a time")

    @property
    def promise(self) -> float:
        """The error that is promised, where no ``confidence`` is given."""
        return MAX_ERROR if self.max_error is None else self.max_error


_DEFAULT = Settings()


@dataclasses.dataclass(frozen=True, eq=False)
class Annotation:
    """What came of it.

    Attributes
    ----------
    labels
        What is said of each cell.
    obs
        The same as columns of obs, with the cells' barcodes.
    about
        What was done, as written to ``uns["hce_jax"]``.
    groups
        The labels of clusters, as :meth:`Labeller.consensus` gives them; None without ``group_by``.
    explanation
        As :func:`hce_jax.annotate.contrast.contrast_table` gives it; None without ``explain``.
    """

    labels: Labels
    obs: pd.DataFrame
    about: dict[str, Any]
    groups: pd.DataFrame | None
    explanation: pd.DataFrame | None


@dataclasses.dataclass(frozen=True, eq=False)
class Annotator:
    """A model, and how it is used; see :meth:`open`.

    Attributes
    ----------
    model
        One model, or several together.
    side
        Its genes and types, the latter with Cell Ontology ids.
    labeller
        Gives the labels.
    settings
        How.
    """

    model: Ensemble
    side: SideFiles
    labeller: Labeller
    settings: Settings

    @classmethod
    def open(cls, checkpoint: str | Path | Sequence[str | Path], settings: Settings) -> "Annotator":
        """Load a model or several, and what turns a promised error into thresholds.

        Parameters
        ----------
        checkpoint
            A checkpoint, a run folder (its best), or several: the mean of their probabilities.
        settings
            How cells are annotated.

        Raises
        ------
        CheckpointError
            If it cannot be read, or there is no calibration and none can be made.
        ConfigError
            If the promised error is out of range.

        Examples
        --------
        >>> Annotator.open("tb_logs/linear/default/version_0", Settings(confidence=0.9))  # doctest: +SKIP
        """
        model = Ensemble([_open(Path(each)) for each in _several(checkpoint)])
        side = model.side
        cl_ids = side.cl_ids or TypeMatcher(side.labels, None, CellOntology.open()).cl_ids
        side = dataclasses.replace(side, cl_ids=cl_ids)
        if settings.confidence is not None:
            labeller = Labeller(side.labels, cl_ids, side.reachability, settings.confidence)
        else:
            calibration = calibration_of(model)
            thresholds = calibration.thresholds_at(settings.promise)
            labeller = Labeller(side.labels, cl_ids, side.reachability, thresholds, calibration)
        return cls(model, side, labeller, settings)

    def prepare(self, query: Query) -> PreparedCells:
        """Look at the cells, before anything is computed; errors as of :meth:`PreparedCells.of`."""
        if self.settings.group_by is not None:
            _clusters(query, self.settings.group_by)  # they must be there
        return PreparedCells.of(query, self.side, self.settings.counts, self.settings.gene_column)

    def annotate(self, query: Query, cells: PreparedCells, output: Output) -> Annotation:
        """Annotate the cells and write the result.

        Raises
        ------
        SourceError
            If cells cannot be read.
        """
        labels = self._label(cells, output)
        obs, groups = self.labeller.table(labels, query.barcodes), None
        if self.settings.group_by is not None:
            clusters = _clusters(query, self.settings.group_by)
            groups = self.labeller.consensus(labels.codes, clusters)
            obs = pd.concat([obs, _of_groups(groups, clusters, obs.index)], axis=1)
        explanation = None
        if self.settings.explain:
            rows = sample_rows(labels.codes)
            x, codes = cells.read_rows(rows).x, labels.codes[rows]
            explanation = contrast_table(self.model.predictors[0], x, codes, cl_ids=self.labeller.cl_ids)
        about = self._about(cells, labels)
        uns = about | {"groups": groups, "explanation": explanation}
        output.finish(obs, _storable(uns))
        return Annotation(labels, obs, about, groups, explanation)

    def _label(self, cells: PreparedCells, output: Output) -> Labels:
        """Go through the cells, and write what is large."""
        settings, parts, start = self.settings, [], 0
        sizes = {
            EMBEDDING: self.model.embedding_size,
            PROBABILITIES: self.side.n_types if settings.probabilities else None,
        }
        arrays = {name: output.array(name, (cells.n_cells, size)) for name, size in sizes.items() if size is not None}
        passes = computed(cells, self.model.predict_and_embed, self.model.reads_sparse, settings.batch_size)
        for block, predictions in passes:
            probabilities = np.concatenate([each.probabilities for each in predictions])
            parts.append(self.labeller.label(probabilities, block.column(EXPRESSED) > 0))
            rows = slice(start, start + len(block))
            if EMBEDDING in arrays:
                arrays[EMBEDDING][rows] = np.concatenate([each.embedding for each in predictions])
            if PROBABILITIES in arrays:
                arrays[PROBABILITIES][rows] = self.labeller.masses(probabilities)
            start += len(block)
        return Labels.concatenate(parts)

    def _about(self, cells: PreparedCells, labels: Labels) -> dict[str, Any]:
        card = self.model.card
        n_empty = int(np.count_nonzero(labels.leaf_codes == UNASSIGNED))
        empty = [f"{n_empty:,} cells have no counts in the model's genes and get no label"] if n_empty else []
        doubtful_c = self._doubtful(labels)
        hardly_judged = float(doubtful_c.sum() / max(np.count_nonzero(labels.codes != UNASSIGNED), 1))
        warnings = [*cells.about["warnings"], *empty, *self._warnings(doubtful_c, hardly_judged)]
        return {
            "versions": {name: _version(name) for name in ("hce_jax", "jax", "anndata")},
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "checkpoint": [str(predictor.path) for predictor in self.model.predictors],
            "model": self.model.title,
            "ontology_release": card.ontology_release,
            "normalisation": card.normalisation,
            "device": jax.default_backend(),
            "types": list(self.side.labels),
            "input": cells.about | {"warnings": warnings},
            **self._rule(hardly_judged),
        }

    def _rule(self, hardly_judged: float) -> dict[str, Any]:
        """Say when a type is given as a label: the confidence that it must have, and the promise that it comes from."""
        calibration = self.labeller.calibration
        if calibration is None:
            return {"confidence": self.settings.confidence}
        return {
            "max_error": self.settings.promise,
            "confidence": calibration.confidence_at(self.settings.promise),
            "thresholds": [float(each) for each in np.ravel(self.labeller.threshold)],
            "calibration": calibration.about,
            "hardly_judged": hardly_judged,
        }

    def _doubtful(self, labels: Labels) -> Int[np.ndarray, " c"]:
        """Count the labels of each type of which the calibration says little; of the other types none."""
        cells_c = np.bincount(labels.codes[labels.codes != UNASSIGNED], minlength=self.side.n_types)
        calibration = self.labeller.calibration
        return np.zeros_like(cells_c) if calibration is None else np.where(calibration.hardly_judged, cells_c, 0)

    def _warnings(self, doubtful_c: Int[np.ndarray, " c"], hardly_judged: float) -> list[str]:
        """Warn of labels of which the calibration says little, if they are a notable share."""
        calibration = self.labeller.calibration
        if calibration is None or hardly_judged <= MOST_HARDLY_JUDGED:
            return []
        largest = [code for code in np.argsort(-doubtful_c, kind="stable").tolist() if doubtful_c[code]]
        named = "; ".join(
            f"{self.side.labels[code]}: {calibration.n_told[code]:,} of {calibration.n_candidates[code]:,}"
            for code in largest[:_MOST_TYPES]
        )
        more = f"; and {len(largest) - _MOST_TYPES} more types" if len(largest) > _MOST_TYPES else ""
        return [
            f"{doubtful_c.sum():,} labels ({100 * hardly_judged:.0f} %) are of types of which few cells of the "
            f"calibration could tell whether they are right ({named}{more}): they may be too fine, or wrong, whatever "
            "their confidence"
        ]


def annotate(adata: AnnData, checkpoint: str | Path | Sequence[str | Path], **settings: Any) -> AnnData:
    """Annotate the cells of an AnnData; the file version is :func:`annotate_file`.

    Parameters
    ----------
    adata
        Cells x genes: raw counts, or values that can be brought back to them, in X, raw or a layer. Its X stays as it
        is; a view is copied first.
    checkpoint
        A checkpoint, a run folder (its best), or several: the mean of their probabilities.
    **settings
        Fields of :class:`Settings`.

    Returns
    -------
    The same object with new columns of obs (``hce_label``, ``hce_label_ontology_term_id``, ``hce_confidence``,
    ``hce_leaf_label``, ``hce_leaf_confidence``, ``hce_next_label``, ``hce_path``), ``obsm["X_hce"]`` (if the model has
    an embedding) and ``uns["hce_jax"]``.

    Raises
    ------
    UserError
        If the cells cannot be annotated as they are, or the checkpoint cannot be used; says what to do.

    Examples
    --------
    >>> adata = annotate(adata, "tb_logs/tabnet_hierarchical_loss/default/version_0", max_error=0.05)  # doctest: +SKIP
    >>> adata.obs["hce_label"].value_counts()  # doctest: +SKIP
    """
    annotator = Annotator.open(checkpoint, Settings(**settings))
    if adata.is_view:
        adata = adata.to_memory() if adata.isbacked else adata.copy()
    with open_query(adata) as query, open_output(query) as output:
        annotator.annotate(query, annotator.prepare(query), output)
    return adata


def annotate_file(
    source: str | Path,
    destination: str | Path,
    checkpoint: str | Path | Sequence[str | Path],
    settings: Settings = _DEFAULT,
    *,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Annotation:
    """Annotate the cells of a file into a copy of it, which appears when it is complete, with its :func:`files_of`.

    Parameters
    ----------
    source
        The cells: .h5ad, .zarr, a 10x .h5 file or a 10x folder with matrix.mtx; only read, some cells at a time.
    destination
        The copy, .h5ad or .zarr.
    checkpoint
        As of :func:`annotate`.
    settings
        How.
    overwrite
        Whether files that are there already are replaced.
    say
        Is told, in lines for a person, what was understood of the input before the work begins, and warnings that are
        known only when it is done.

    Raises
    ------
    UserError
        If the cells cannot be annotated as they are, the checkpoint cannot be used, or the copy cannot be written; says
        what to do. Nothing is left then.

    Examples
    --------
    >>> annotate_file("cells.h5ad", "annotated.h5ad", run, Settings(max_error=0.02)).obs  # doctest: +SKIP
    """
    destination = Path(destination)
    check_suffix(destination)
    files = files_of(destination, settings)
    if not overwrite and (there := next((path for path in files.values() if path.exists()), None)):
        raise ConfigError(f"{there} exists already; name another file (-o), or pass --overwrite")
    with open_query(source) as query:
        check_target(query, destination, overwrite)
        annotator = Annotator.open(checkpoint, settings)
        cells = annotator.prepare(query)
        say(f"model       {annotator.model.title}, {annotator.side.n_types} types\n{cells.report()}")
        with ExitStack() as stack:
            aside = {name: stack.enter_context(written_aside(files[name])) for name in files if name != "cells"}
            output = stack.enter_context(open_output(query, destination, overwrite=overwrite))
            annotation = annotator.annotate(query, cells, output)
            write_report(aside["report"], _report(annotator, query, annotation))
            if annotation.explanation is not None:
                annotation.explanation.to_csv(aside["explanation"], index=False)
        for warning in annotation.about["input"]["warnings"][len(cells.warnings) :]:
            say(f"WARNING     {warning}")
    return annotation


def files_of(destination: Path, settings: Settings) -> dict[str, Path]:
    """Name the files of an annotation: the copy (``cells``), the ``report``, and perhaps the ``explanation``.

    Examples
    --------
    >>> files_of(Path("annotated.h5ad"), Settings())["report"].name
    'annotated_report.html'
    """
    beside = {"report": "_report.html"} | ({"explanation": "_explanation.csv"} if settings.explain else {})
    named = {what: destination.with_name(f"{destination.stem}{ending}") for what, ending in beside.items()}
    return {"cells": destination} | named


def _report(annotator: Annotator, query: Query, annotation: Annotation) -> ReportInput:
    labels, side = annotation.labels, annotator.side
    return ReportInput(
        title=query.title,
        about=annotation.about,
        labels=side.labels,
        cl_ids=annotator.labeller.cl_ids,
        reachability=side.reachability,
        codes=labels.codes,
        confidence=labels.confidence,
        leaf_codes=labels.leaf_codes,
        leaf_confidence=labels.leaf_confidence,
        barcodes=query.barcodes,
        picture=query.picture(),
        groups=annotation.groups,
        explanation=[] if annotation.explanation is None else sentences(annotation.explanation),
    )


def _several(checkpoint: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    named = [checkpoint] if isinstance(checkpoint, str | Path) else checkpoint
    if not named:
        raise CheckpointError("no checkpoint is named; name a run folder (version_N) or a checkpoint (*.ckpt)")
    return named


def _open(path: Path) -> Any:
    if (published := published_checkpoint(path)) is not None:
        if not is_zipfile(published):
            raise CheckpointError(f"{path} is no checkpoint; name a run folder (version_N) or a checkpoint (*.ckpt)")
        raise CheckpointError(
            f"{published} is of the published PyTorch code and names neither its genes nor its cell types; make a "
            "checkpoint of ours of it first: python -m hce_jax import-torch"
        )
    return open_model(path)


def _clusters(query: Query, name: str) -> pd.Categorical:
    """Return the cluster of each cell; those without cells are none."""
    column = query.obs_column(name)
    if column.dtype.kind == "f" and (column.dropna() % 1 != 0).any():
        raise SourceError(f"{query.title}: the column {name!r} of obs holds measurements, not clusters (--group-by)")
    return pd.Categorical(column).remove_unused_categories()


def _of_groups(groups: pd.DataFrame, clusters: pd.Categorical, barcodes: pd.Index) -> pd.DataFrame:
    """Say of each cell what is said of its group; nothing of cells of none."""
    place_n = clusters.codes
    columns = {f"hce_group_{name}": groups[name] for name in ("label", "label_ontology_term_id", "agreement")}
    frame = pd.DataFrame({name: values.reindex(place_n).to_numpy() for name, values in columns.items()}, index=barcodes)
    return frame.astype(dict.fromkeys([*columns][:2], "category"))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # run from its folder
        return "not installed"


def _storable(value: Any) -> Any:
    """Return what h5ad and zarr can hold of nested dictionaries: without None, lists as arrays."""
    if isinstance(value, dict):
        return {key: _storable(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return np.array(value, dtype=None if value else object)
    return value
