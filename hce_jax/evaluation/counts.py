"""What an evaluation counted, kept beside its tables, so that runs can be compared without their models or cells.

``{model}_counts.npz`` holds the names of types and studies and the hierarchy as JSON and an array, and for each decoder
three arrays of counts. They are whole numbers (but for the sums of confidence), so that those of several runs, studies
or types can be added up, and every score can be had from them: a macro F1 over other types, resampled studies, a
reliability diagram.
"""

import dataclasses
import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from hce_jax.errors import CheckpointError, HierarchyError
from hce_jax.evaluation.decoders import DECODERS, ROUNDING, TEMPERATURE
from hce_jax.evaluation.tally import CONFIDENCE_BINS, corrected_confusion
from hce_jax.files import written_aside
from hce_jax.hierarchy import validate_reachability

_FORMAT_VERSION = 1
#: What a damaged file makes zipfile, numpy or the checks raise.
_UNSOUND = (ValueError, KeyError, EOFError, RuntimeError, OverflowError, HierarchyError, zipfile.BadZipFile, zlib.error)


class DecoderCounts(NamedTuple):
    """What was counted of one decoder.

    Attributes
    ----------
    confusion
        Cells by label and prediction, not corrected (c, c + 1); the last column counts the unassigned.
    by_study
        Of each study the cells rightly predicted, predicted, and labelled as each type (s, 3, c), after a prediction
        below the label has been counted as the label.
    calibration
        Of each of 1,500 bins of confidence: assigned cells, sum of their confidence, cells predicted rightly (k, 3).
    """

    confusion: Int[np.ndarray, "c d"]
    by_study: Int[np.ndarray, "s 3 c"]
    calibration: Float[np.ndarray, "k 3"]


@dataclasses.dataclass(frozen=True, eq=False)
class Counts:
    """What was counted in an evaluation.

    Attributes
    ----------
    split
        "id" or "ood".
    title
        Of the cells, e.g. "test split of STORE".
    labels
        Names of the c types.
    cl_ids
        Their Cell Ontology ids, None where there is none.
    reachability
        R (c, c).
    studies
        Names of the s studies; all of them have cells.
    decoders
        For each of the :data:`hce_jax.evaluation.decoders.DECODERS` its counts; where there is a temperature also those
        of "temperature", the types of argmax with another confidence.
    backoff
        What back-off asked for: ``confidence`` or ``max_error``.
    temperature
        T, fitted on validation data, or None.

    Examples
    --------
    >>> cells = np.array([[3, 1, 0], [0, 4, 0]])  # one of 8 cells is predicted wrongly; confidence 0.9
    >>> bins = np.zeros((1500, 3))
    >>> bins[1350] = 8, 7.2, 7
    >>> decoders = dict.fromkeys(DECODERS, DecoderCounts(cells, np.array([[[3, 4], [3, 5], [4, 4]]]), bins))
    >>> about = {"split": "id", "title": "cells", "backoff": {"confidence": 0.5}, "temperature": None}
    >>> types = {"labels": ("a", "b"), "cl_ids": (None, None), "reachability": np.eye(2), "studies": ("s",)}
    >>> Counts(decoders=decoders, **about, **types).n_cells
    8
    """

    split: str
    title: str
    labels: tuple[str, ...]
    cl_ids: tuple[str | None, ...]
    reachability: Float[np.ndarray, "c d"]
    studies: tuple[str, ...]
    decoders: dict[str, DecoderCounts]
    backoff: dict[str, float]
    temperature: float | None

    @property
    def n_cells(self) -> int:
        """Cells counted."""
        return int(self.decoders[DECODERS[0]].confusion.sum())

    def write(self, path: Path) -> None:
        """Write a compressed npz file; what is there is replaced as a whole.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del fields["reachability"]
        about = json.dumps({"format_version": _FORMAT_VERSION} | fields | {"decoders": [*self.decoders]})
        arrays = {f"{name}/{part}": each for name, of in self.decoders.items() for part, each in of._asdict().items()}
        with written_aside(path) as aside, aside.open("wb") as file:
            np.savez_compressed(file, about=np.array(about), reachability=self.reachability.astype(bool), **arrays)

    @classmethod
    def read(cls, path: Path) -> "Counts":
        """Read what an evaluation counted.

        Raises
        ------
        CheckpointError
            If it is not there, cannot be read, is damaged, or is of another version of this format.

        Examples
        --------
        >>> Counts.read(counts_path(Path("sctab_test/best"), "linear")).n_cells  # doctest: +SKIP
        4008
        """
        remedy = "evaluate it again: python evaluate.py --split id --run RUN"
        try:
            with path.open("rb") as file:
                if not zipfile.is_zipfile(file):
                    raise ValueError("it is no npz file")
                file.seek(0)
                with np.load(file, allow_pickle=False) as archive:
                    if broken := archive.zip.testzip():  # reading an array does not always get to its checksum
                        raise ValueError(f"its {broken} has another checksum")
                    fields = _fields_of(archive)
                    if (version := fields.get("format_version")) != _FORMAT_VERSION:
                        found = f"{path} is of format version {json.dumps(version):.20}, not {_FORMAT_VERSION}"
                        raise CheckpointError(f"{found}; {remedy}")
                    return cls._of(fields, archive)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror or error}); {remedy}") from error
        except _UNSOUND as error:
            raise CheckpointError(f"{path} is damaged ({error}); {remedy}") from error

    @classmethod
    def _of(cls, fields: Mapping[str, Any], archive: Mapping[str, Any]) -> "Counts":
        """Make it of what stands in a file; one of _UNSOUND says what is wrong with that."""
        unsound = next((name for name, is_it in _sound(fields) if not is_it), None)
        if unsound:
            raise ValueError(f"its {unsound} cannot be {json.dumps(fields.get(unsound)):.60}")
        reachability = validate_reachability(_numbers(archive, "reachability"), fields["labels"], "its hierarchy")
        decoders: dict[str, DecoderCounts] = {}
        for name in fields["decoders"]:
            counts = DecoderCounts(*(_numbers(archive, f"{name}/{part}") for part in DecoderCounts._fields))
            first = next(iter(decoders.values()), counts)
            for what, is_it in _agree(counts, first, reachability, len(fields["studies"])):
                if not is_it:
                    raise ValueError(f"its {what} of {name} cannot be so")
            decoders[name] = counts
        given: dict[str, Any] = {name: fields[name] for name in ("split", "title", "backoff", "temperature")}
        given |= {name: tuple(fields[name]) for name in ("labels", "cl_ids", "studies")}
        return cls(**given, reachability=reachability, decoders=decoders)


def _fields_of(archive: Mapping[str, Any]) -> dict[str, Any]:
    fields = json.loads(str(archive["about"]))
    if not isinstance(fields, dict):
        raise ValueError("it holds no fields")
    return fields


def _numbers(archive: Mapping[str, Any], name: str) -> np.ndarray:
    array = archive[name]
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise ValueError(f"its {name} holds no numbers")
    return array


def _sound(fields: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Say of each field of a file whether it can be so; of one after the other, for they build on each other."""
    backoff, temperature = fields.get("backoff"), fields.get("temperature")
    yield "split", fields.get("split") in ("id", "ood")
    yield "title", isinstance(fields.get("title"), str)
    yield "labels", _are(fields.get("labels"), str)
    yield "cl_ids", _are(fields.get("cl_ids"), str, type(None)) and len(fields["cl_ids"]) == len(fields["labels"])
    yield "studies", _are(fields.get("studies"), str)
    yield "backoff", isinstance(backoff, dict) and [*backoff] in (["confidence"], ["max_error"])
    yield "backoff", all(type(each) in (int, float) and 0 < each <= 1 for each in fields["backoff"].values())
    yield "temperature", temperature is None or (type(temperature) in (int, float) and 0 < temperature < math.inf)
    yield "decoders", fields.get("decoders") == [*DECODERS, *([] if temperature is None else [TEMPERATURE])]


def _are(values: Any, *types: type) -> bool:
    return isinstance(values, list) and len(values) > 0 and all(type(each) in types for each in values)


def _agree(
    counts: DecoderCounts, first: DecoderCounts, reachability: np.ndarray, n_studies: int
) -> Iterator[tuple[str, bool]]:
    """Say of each array whether it can be so, beside those before it and the decoder before it."""
    confusion, by_study, bins = counts
    n_types = len(reachability)
    yield "confusion", confusion.shape == (n_types, n_types + 1) and _is_whole(confusion)
    yield "confusion", bool((confusion.sum(axis=1) == first.confusion.sum(axis=1)).all())  # the same cells
    corrected = corrected_confusion(confusion, reachability)[:, :-1]
    totals = np.stack([corrected.diagonal(), corrected.sum(axis=0), confusion.sum(axis=1)])
    yield "by_study", by_study.shape == (n_studies, 3, n_types) and _is_whole(by_study)
    yield "by_study", bool((by_study.sum(axis=0) == totals).all() and by_study[:, 2].any(axis=1).all())
    yield "calibration", bins.shape == (CONFIDENCE_BINS, 3)
    n_cells, confidence, n_right = bins.T
    yield "calibration", _is_whole(n_cells) and _is_whole(n_right) and bool((n_right <= n_cells).all())
    # The sum of confidence lies between as many times the ends of the bin, but for rounding.
    off = CONFIDENCE_BINS * confidence - n_cells * np.arange(CONFIDENCE_BINS)
    yield "calibration", bool((np.abs(off - n_cells / 2) <= n_cells * (0.5 + ROUNDING)).all())
    yield "calibration", bool((bins.sum(axis=0)[[0, 2]] == totals.sum(axis=1)[[1, 0]]).all())


def _is_whole(array: np.ndarray) -> bool:
    if array.dtype.kind == "f":
        return bool((np.isfinite(array) & (array >= 0) & (array == np.floor(array))).all())
    return array.dtype.kind in "iu" and bool((array >= 0).all())


def counts_path(results_folder: Path, model_type: str) -> Path:
    """Return where the counts of an evaluation lie.

    Examples
    --------
    >>> counts_path(Path("sctab_test/best"), "linear").as_posix()
    'sctab_test/best/linear_counts.npz'
    """
    return results_folder / f"{model_type}_counts.npz"
