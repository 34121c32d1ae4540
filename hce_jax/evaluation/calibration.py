r"""Confidence that means a share, and the confidence that keeps a promised error, learned from labelled cells.

A cell gets a type when the mass m of the type's subtree reaches the threshold of its depth
(:class:`hce_jax.evaluation.decoders.Decoders`). At each depth (:func:`hce_jax.hierarchy.depths`) a cell has one
candidate k, the type of that depth with the largest m. The label t that authors gave the cell says of it one of three
things:

=======  ====================================================
right    k is t, or above t
untold   k is below t: the label is too coarse to say
wrong    none of these
=======  ====================================================

Confidence and promise are about the told candidates, those that are right or wrong. What they say of a type of which
few candidates are told is little: how many are is counted for each type, among the candidates with a confidence of one
half or more, the least that a label can have.

**Confidence** is a curve for each depth d, whose two numbers are fitted to the told candidates of that depth, the most
probable ones with a Gaussian prior about 0 and 1, where the curve gives m itself (Platt scaling, Platt 1999):

.. math:: confidence = sigmoid(a_d + b_d\, logit(m)), \quad b_d \ge 0

**A promised error** becomes the confidence that a label must have. Each cell is given its deepest candidate with a
confidence of at least :math:`\tau`; the lowest :math:`\tau` of one half or more is taken at which the labels, W of T
told ones wrong, have an error of at most what was promised by the upper end of its one-sided 95 % interval. Cells of a
donor (or of a study) resemble each other, so that what counts is how much the U donors with told labels differ (the
variance of a ratio over clusters, linearised; Cochran, Sampling Techniques, 1977, ch. 6 and 11), or chance alone if
that is more:

.. math::

    p + t_{0.95,\,U-1}\, s, \quad p = \frac{W + 1}{T + 1}, \quad
    s^2 = \max\left(\frac{p (1 - p)}{T},\ \frac{U}{U - 1} \sum_u \frac{(W_u - p\, T_u)^2}{T^2}\right)

A single donor counts as two that are alike.

From the same cells comes the temperature at which the model's probabilities are most likely
(:mod:`hce_jax.evaluation.temperature`). It changes neither labels nor promises: evaluations say what it does to the
confidence of ``argmax``.
"""

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, logit, stdtrit

from hce_jax.errors import CheckpointError, ConfigError, StoreError
from hce_jax.evaluation.cells import Cells, StoreCells
from hce_jax.evaluation.decoders import ROUNDING, shares
from hce_jax.evaluation.predict import Classifier, classified
from hce_jax.evaluation.temperature import TEMPERATURES, TemperatureFit
from hce_jax.files import written_aside
from hce_jax.hierarchy import depths, propagate
from hce_jax.predictor import Ensemble, Predictor
from hce_jax.store import LABEL_COLUMN, Block, SideFiles, open_store
from hce_jax.typing import Bool, Float, Int

#: Name of the file in a checkpoint's folder.
CALIBRATION_FILE = "calibration.json"
#: The errors that can be promised: by half a per cent to 5 %, by one to 20 %, by five to 50 %.
MAX_ERRORS = tuple(n / 1000 for n in (*range(5, 50, 5), *range(50, 200, 10), *range(200, 501, 50)))
#: Share of labels that are of hardly judged types, above which that is worth a warning.
MOST_HARDLY_JUDGED = 0.1
#: Whose cells resemble each other: those of a donor, or, of new studies, those of a study.
Unit = Literal["donor", "study"]
#: Cells that are read for a calibration, at most; how sure it is hangs on how many donors there are.
MOST_CELLS = 50_000

_FORMAT_VERSION = 2
#: What the confidence of a promise is chosen from, log-odds in steps of 0.05 up to 99.97 %. From one half: a label that
#: is more likely wrong than right is never given, and where labels are coarse its error would not be seen.
_CONFIDENCES = expit(np.arange(161) / 20)
#: One-sided level of the bound.
_LEVEL = 0.95
#: Standard deviation of the prior of a curve's two numbers.
_PRIOR_SD = 1.0
#: Numbers of axes of the arrays in a file.
_AXES = {"max_errors": 1, "confidences": 1, "curves": 2, "n_candidates": 1, "n_told": 1}
#: Told candidates of a type, as a share and as a number, below which its labels are hardly judged.
_FEW_TOLD = (0.5, 20)
#: Verdicts of a label on a type.
UNTOLD, RIGHT, WRONG = 0, 1, 2


class Candidates(NamedTuple):
    """What some labelled cells say of a model.

    Attributes
    ----------
    code
        The candidate of each depth (n, d); -1 at a depth without types.
    mass
        Of the candidate (n, d) float32; 0 where there is none.
    verdict
        Of the cell's label on the candidate (n, d) int8: untold, right or wrong.
    unit
        Number of the unit of each cell, 0, 1, 2, ... (n,).
    """

    code: Int[np.ndarray, "n d"]
    mass: Float[np.ndarray, "n d"]
    verdict: Int[np.ndarray, "n d"]
    unit: Int[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """What was learned of a model from labelled cells.

    Attributes
    ----------
    title
        What the cells are, e.g. "val split of STORE".
    n_cells
        Cells that were read.
    unit, n_units
        Whose cells resemble each other, "donor" or "study", and how many of them there are.
    studies
        Of "study" their names: they are not to be reported on.
    types
        A checksum of the labels and their hierarchy, for which alone this holds.
    max_errors
        Errors that can be promised (e,), ascending.
    confidences
        For each of them the confidence that a label must have (e,); infinite where no promise is possible.
    curves
        For each depth a and b of the confidence sigmoid(a + b logit(m)) (d, 2).
    n_candidates, n_told
        For each type the cells whose candidate it was with a confidence of one half or more, and how many of these
        had a label that tells whether it is right (c,).
    temperature
        T of these cells, in [0.05, 20].

    Examples
    --------
    >>> curves = np.array([[0.0, 1.0], [-2.0, 1.0]])  # labels of depth 1 are less often right than the mass says
    >>> promise, counts = (np.array([0.05]), np.array([0.9])), (np.array([265, 300]), np.array([65, 290]))
    >>> calibration = Calibration("cells", 5000, "donor", 12, (), "", *promise, curves, *counts, 1.0)
    >>> calibration.confidence(np.array([0.9, 0.9]), np.array([0, 1])).round(3)
    array([0.9  , 0.549], dtype=float32)
    >>> calibration.thresholds_at(0.05).round(3).tolist()
    [0.9, 0.985]
    >>> calibration.hardly_judged.tolist()
    [True, False]
    """

    title: str
    n_cells: int
    unit: Unit
    n_units: int
    studies: tuple[str, ...]
    types: str
    max_errors: Float[np.ndarray, " e"]
    confidences: Float[np.ndarray, " e"]
    curves: Float[np.ndarray, "d 2"]
    n_candidates: Int[np.ndarray, " c"]
    n_told: Int[np.ndarray, " c"]
    temperature: float

    @property
    def hardly_judged(self) -> Bool[np.ndarray, " c"]:
        """Types of which few cells could tell whether they are right: fewer than half of theirs, or than 20."""
        share, number = _FEW_TOLD
        return (self.n_told < share * self.n_candidates) | (self.n_told < number)

    @property
    def about(self) -> str:
        """Which cells it is from, and what its promise is worth where they are of one unit, for a person."""
        units = {"donor": "donors", "study": "studies"}[self.unit] if self.n_units > 1 else self.unit
        weak = f"; one {self.unit} says little of others: its promise is weak" if self.n_units == 1 else ""
        return f"calibrated on {self.n_cells:,} cells of {self.n_units:,} {units}, {self.title}{weak}"

    def confidence_at(self, max_error: float) -> float:
        """Return the confidence that a label must have, so that at most this share of the told labels is wrong.

        Parameters
        ----------
        max_error
            The promised error; of the ones that there is a confidence for, the largest that does not exceed it counts.

        Raises
        ------
        ConfigError
            If it is not from 0.005 to 0.5, or more than these cells can promise.
        """
        lowest, highest = self.max_errors[0], self.max_errors[-1]
        if not lowest <= max_error <= highest:
            raise ConfigError(
                f"--max_error={max_error:g}: an error that can be promised lies between {lowest:g} and {highest:g}; "
                "give for example --max_error=0.05"
            )
        confidence = float(self.confidences[np.searchsorted(self.max_errors, max_error, side="right") - 1])
        if math.isinf(confidence):
            possible = self.max_errors[np.isfinite(self.confidences)]
            least = f"the least is {possible[0]:g}; give that, or" if len(possible) else "nor can any other error;"
            raise ConfigError(
                f"--max_error={max_error:g} cannot be promised ({self.about}): {least} calibrate on more "
                f"{'donors' if self.unit == 'donor' else 'studies'}, or give --confidence instead"
            )
        return confidence

    def thresholds_at(self, max_error: float) -> Float[np.ndarray, " d"]:
        """Return the mass that the label must hold at each depth; infinite: no label of that depth is sure enough.

        Parameters and errors as :meth:`confidence_at`.
        """
        return _thresholds(self.curves, self.confidence_at(max_error))

    def confidence(self, mass: Float[np.ndarray, " n"], depth: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Return the share of right ones among told types of such a mass and depth; of untold ones it says nothing.

        Parameters
        ----------
        mass
            Of the subtree of each cell's type, in [0, 1].
        depth
            Of that type.
        """
        intercept_n, slope_n = self.curves[depth].T
        return expit(intercept_n + slope_n * _log_odds(mass)).astype(np.float32)

    def write(self, path: Path) -> None:
        """Write it as JSON; what is there is replaced as a whole.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        lists = {name: value.tolist() for name, value in fields.items() if isinstance(value, np.ndarray)}
        lists["confidences"] = [each if math.isfinite(each) else None for each in lists["confidences"]]
        about = {"format_version": _FORMAT_VERSION, "about": self.about}
        with written_aside(path) as aside:
            aside.write_text(json.dumps(about | fields | lists, indent=1, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path, side: SideFiles) -> "Calibration":
        """Read the calibration of a model.

        Parameters
        ----------
        path
            The file.
        side
            The model's types and hierarchy.

        Raises
        ------
        CheckpointError
            If it cannot be read, is damaged, is of another version of this format, or of other types or another
            hierarchy.
        """
        remedy = "make it anew: python evaluate.py --calibrate_on val --checkpoint CKPT"
        try:
            fields = json.loads(path.read_text())
            if isinstance(fields, dict) and fields.get("format_version", _FORMAT_VERSION) != _FORMAT_VERSION:
                version = json.dumps(fields["format_version"])
                raise CheckpointError(f"{path} is of format version {version:.20}, not {_FORMAT_VERSION}; {remedy}")
            found = cls._of(fields)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
        except (ValueError, OverflowError) as error:  # of JSON, ours, or of numbers beyond all bounds
            raise CheckpointError(f"{path} is damaged ({error}); {remedy}") from error
        sizes = depths(side.reachability).max() + 1, side.n_types
        if found.types != _types_of(side) or (len(found.curves), len(found.n_told)) != sizes:
            raise CheckpointError(f"{path} is of other cell types, or another hierarchy, than the model; {remedy}")
        return found

    @classmethod
    def _of(cls, fields: Any) -> "Calibration":
        """Make it of what stands in a file; a ValueError says what is wrong with that."""
        if not isinstance(fields, dict):
            raise ValueError("it holds no fields")
        names = [field.name for field in dataclasses.fields(cls)]
        if absent := [name for name in ("format_version", *names) if name not in fields]:
            raise ValueError(f"it has no {absent[0]}")
        given = {name: fields[name] for name in names}
        given["confidences"] = [math.inf if each is None else each for each in _list(given, "confidences")]
        given |= {name: _numbers(given, name, n_axes) for name, n_axes in _AXES.items()}
        if unsound := [name for name, is_it in _sound(given) if not is_it]:
            raise ValueError(f"its {unsound[0]} cannot be {json.dumps(fields[unsound[0]]):.60}")
        return cls(**given | {"studies": tuple(given["studies"])})


def _sound(given: Mapping[str, Any]) -> Iterator[tuple[str, bool]]:
    """Say of each field of a file, its numbers already arrays, whether it can be so."""
    n_cells, n_units = given["n_cells"], given["n_units"]
    errors, confidences, curves = given["max_errors"], given["confidences"], given["curves"]
    n_candidates, n_told = given["n_candidates"], given["n_told"]
    yield from ((name, isinstance(given[name], str)) for name in ("title", "types"))
    yield "unit", given["unit"] in ("donor", "study")
    yield "n_cells", type(n_cells) is int and n_cells > 0  # truth values are of another type
    yield "n_units", type(n_cells) is type(n_units) is int and 0 < n_units <= n_cells
    yield "studies", all(isinstance(each, str) for each in _list(given, "studies"))
    yield "max_errors", len(errors) > 0 and bool((np.diff([0, *errors, 1]) > 0).all())
    is_share = (confidences > 0) & ((confidences < 1) | (confidences == math.inf))
    yield "confidences", confidences.shape == errors.shape and bool(is_share.all())
    yield "curves", curves.shape[1] == 2 and bool((np.isfinite(curves) & (curves >= (-math.inf, 0))).all())
    yield "n_candidates", bool((n_candidates >= 0).all())
    yield "n_told", n_told.shape == n_candidates.shape and bool(((n_told >= 0) & (n_told <= n_candidates)).all())
    temperature, (lowest, highest) = given["temperature"], TEMPERATURES
    yield "temperature", type(temperature) in (int, float) and lowest <= temperature <= highest


def _list(fields: Mapping[str, Any], name: str) -> list[Any]:
    if not isinstance(fields[name], list):
        raise ValueError(f"its {name} are no list")
    return fields[name]


def _numbers(fields: Mapping[str, Any], name: str, n_axes: int) -> np.ndarray:
    """Return a field as an array of float64, or of int64 where it counts; text and ragged lists are no numbers."""
    values, is_count = np.array(_list(fields, name), object), name.startswith("n_")
    types = (int,) if is_count else (int, float)
    if values.ndim != n_axes or not all(type(each) in types for each in values.flat):
        raise ValueError(f"its {name} are no {'whole ' if is_count else ''}numbers")
    return values.astype(np.int64 if is_count else np.float64)


def calibration_path(checkpoint: Path) -> Path:
    """Return where the calibration of a checkpoint lies: in its folder; beside a file, such as a published one.

    Examples
    --------
    >>> calibration_path(Path("no/such/model.ckpt")).as_posix()
    'no/such/model.calibration.json'
    """
    if checkpoint.is_dir():
        return checkpoint / CALIBRATION_FILE
    return checkpoint.with_name(f"{checkpoint.stem}.{CALIBRATION_FILE}")


def calibration_of(model: Predictor | Ensemble) -> Calibration:
    """Return the calibration of a model; where it has none, make and keep that of its validation split.

    That of several models together is made each time, for it is none of theirs.

    Raises
    ------
    CheckpointError
        If it is damaged or of other types, or there is none and the store that the model was trained on is not here.
    StoreError
        If that store cannot be read.

    Examples
    --------
    >>> calibration_of(load_model("tb_logs/linear/default/version_0")).about  # doctest: +SKIP
    'calibrated on 50,000 cells of 96 donors, val split of store'
    """
    members = model.predictors if isinstance(model, Ensemble) else [model]
    first, path = members[0], calibration_path(members[0].path) if len(members) == 1 else None
    if path and path.exists():
        return Calibration.read(path, first.side)
    missing = f"{first.path if path else model.title} has no {CALIBRATION_FILE}"
    store_path = Path(first.card.data_path)
    if not store_path.is_dir():
        elsewhere = ", or make one where the store is: python evaluate.py --calibrate_on val --checkpoint CKPT"
        raise CheckpointError(
            f"{missing}, and the store {store_path} is not here to make one; give --confidence 0.9"
            f"{elsewhere if path else ''}"
        )
    store = open_store(store_path)
    first.check_store(store.side)
    print(f"{missing}: one is made now, of the validation split", file=sys.stderr)
    calibration = calibrate(StoreCells(store.split("val")), model, "donor")
    if path:
        keep(calibration, path)
    return calibration


def keep(calibration: Calibration, path: Path) -> None:
    """Write a calibration and say so on stderr; where it cannot be written, say that.

    Examples
    --------
    >>> keep(calibration, calibration_path(predictor.path))  # doctest: +SKIP
    """
    try:
        calibration.write(path)
        print(f"{path}: {calibration.about}", file=sys.stderr)
    except OSError as error:
        print(f"{path} cannot be written ({error.strerror}): {calibration.about}, not kept", file=sys.stderr)


def calibrate(cells: Cells, classifier: Classifier, unit: Unit, batch_size: int = 2048) -> Calibration:
    """Learn confidence, its promises and the temperature from labelled cells.

    A temperature at an end of its range is said on stderr.

    Parameters
    ----------
    cells
        Cells that the model was not trained on. Of more than 50,000 some blocks are read, spread evenly over all.
    classifier
        The model.
    unit
        Whose cells resemble each other: "donor", or, of studies that the model does not know, "study".
    batch_size
        Cells computed at a time.

    Raises
    ------
    CheckpointError
        If model and cells have another hierarchy, or its probabilities are not numbers.
    StoreError, SourceError
        If cells cannot be read, or there are none.

    Examples
    --------
    >>> calibrate(StoreCells(store.split("val")), model, "donor").thresholds_at(0.05)  # doctest: +SKIP
    array([0.58, 0.61, 0.94])
    """
    if not np.array_equal(cells.side.reachability, classifier.side.reachability):
        raise CheckpointError(
            f"{classifier.side.path} was trained with another hierarchy than that of the {cells.title}; calibrate it "
            "on the store that it was trained on"
        )
    if not cells.n_cells:
        raise StoreError(f"{cells.title} holds no cells, so there is nothing to calibrate on; choose other cells")
    read = _SomeBlocks(cells)
    fit = TemperatureFit(cells.side.reachability)
    observed = _observe(read, classifier, unit, batch_size, fit)
    temperature = fit.temperature()
    if temperature in TEMPERATURES:
        surer = "the surer the more likely, as where all cells are right" if temperature < 1 else "none is flat enough"
        print(f"{classifier.title}: T = {temperature:g}, the end of the range: {surer}", file=sys.stderr)
    curves = np.stack([_curve(observed, depth) for depth in range(observed.mass.shape[1])])
    n_candidates, n_told = _told(observed, curves, cells.side.n_types)
    return Calibration(
        title=cells.title if read.n_cells == cells.n_cells else f"of the {cells.n_cells:,} of the {cells.title}",
        n_cells=read.n_cells,
        unit=unit,
        n_units=int(observed.unit.max()) + 1,
        studies=tuple(cells.lookups["dataset_id"]) if unit == "study" else (),
        types=_types_of(cells.side),
        max_errors=np.array(MAX_ERRORS),
        confidences=_promises(observed, curves),
        curves=curves,
        n_candidates=n_candidates,
        n_told=n_told,
        temperature=temperature,
    )


def candidates(mass: Float[np.ndarray, "n c"], depth: Int[np.ndarray, " c"]) -> Int[np.ndarray, "n d"]:
    """Return the type of the largest mass at each depth; of equals the lower code; -1 at a depth without types.

    Parameters
    ----------
    mass
        Of the subtree of each type.
    depth
        Of each type (:func:`hce_jax.hierarchy.depths`).

    Examples
    --------
    >>> candidates(np.array([[1.0, 0.3, 0.7]]), np.array([0, 1, 1])).tolist()
    [[0, 2]]
    """
    found_nd = np.full((len(mass), int(depth.max()) + 1), -1)
    for each in np.unique(depth):
        types = np.flatnonzero(depth == each)
        found_nd[:, each] = types[mass[:, types].argmax(axis=1)]
    return found_nd


def verdicts(
    labels: Int[np.ndarray, " n"], predictions: Int[np.ndarray, "n d"], reachability: np.ndarray
) -> Int[np.ndarray, "n d"]:
    """Say what the label of each cell says of some predictions: untold (0), right (1) or wrong (2).

    Parameters
    ----------
    labels
        Codes.
    predictions
        Codes; of -1, no type, nothing is told.
    reachability
        R (c, c).

    Examples
    --------
    >>> verdicts(np.array([1]), np.array([[0, 1, 2]]), np.array([[1, 1, 1], [0, 1, 0], [0, 0, 1]])).tolist()
    [[1, 1, 2]]
    """
    reach_cc = np.asarray(reachability) > 0  # by label and prediction: the prediction is the label or below it
    verdict_cc = np.where(reach_cc.T, RIGHT, np.where(reach_cc, UNTOLD, WRONG)).astype(np.int8)
    return np.where(predictions < 0, np.int8(UNTOLD), verdict_cc[labels[:, None], predictions])


def _observe(cells: Cells, classifier: Classifier, unit: Unit, batch_size: int, fit: TemperatureFit) -> Candidates:
    """Have the cells classified, and their probabilities collected for the temperature."""
    reach = cells.side.reachability
    depth_c, parts = depths(reach), []
    for block, (probabilities,) in classified(cells, [classifier], batch_size):
        share_nc, labels_n = shares(probabilities), block.column(LABEL_COLUMN)
        fit.add(share_nc, labels_n)
        mass_nc = propagate(share_nc, np.asarray(reach, np.float32))
        code_nd = candidates(mass_nc, depth_c)
        mass_nd = np.where(code_nd < 0, np.float32(0), np.take_along_axis(mass_nc, code_nd, axis=1))
        # Donors of the same name in two studies are one: often they are, and else the promise is only more careful.
        unit_n = block.column("donor_id" if unit == "donor" else "dataset_id")
        parts.append(Candidates(code_nd, mass_nd, verdicts(labels_n, code_nd, reach), unit_n))
    code, mass, verdict, units = map(np.concatenate, zip(*parts, strict=True))
    return Candidates(code, mass, verdict, np.unique(units, return_inverse=True)[1])


def _curve(observed: Candidates, depth: int) -> Float[np.ndarray, " 2"]:
    """Fit the curve of a depth; without told cells it gives the mass itself."""
    told_n = observed.verdict[:, depth] != UNTOLD
    odds_n = _log_odds(observed.mass[told_n, depth])
    right_n = (observed.verdict[told_n, depth] == RIGHT).astype(np.float64)

    def loss(curve: np.ndarray) -> tuple[float, np.ndarray]:
        """Return minus the logarithm of likelihood and prior, and its gradient."""
        score_n = curve[0] + curve[1] * odds_n
        over_n, off = expit(score_n) - right_n, curve - (0, 1)
        value = np.logaddexp(0, score_n).sum() - right_n @ score_n + off @ off / (2 * _PRIOR_SD**2)
        return value, np.array([over_n.sum(), over_n @ odds_n]) + off / _PRIOR_SD**2

    return minimize(loss, np.array([0.0, 1.0]), jac=True, method="L-BFGS-B", bounds=[(None, None), (0, None)]).x


def _told(
    observed: Candidates, curves: Float[np.ndarray, "d 2"], n_types: int
) -> tuple[Int[np.ndarray, " c"], Int[np.ndarray, " c"]]:
    """Count for each type the cells that it can be the label of, and those of them that tell."""
    is_sure_nd = observed.mass >= _thresholds(curves, _CONFIDENCES[0]) - ROUNDING  # as Decoders compares
    is_told_nd = is_sure_nd & (observed.verdict != UNTOLD)
    counted = [np.bincount(observed.code[which_nd], minlength=n_types) for which_nd in (is_sure_nd, is_told_nd)]
    return counted[0], counted[1]


def _promises(observed: Candidates, curves: Float[np.ndarray, "d 2"]) -> Float[np.ndarray, " e"]:
    """Find for each error that can be promised the lowest confidence that keeps it; infinite where none does."""
    bound_k = np.array([_bound(observed, _thresholds(curves, confidence)) for confidence in _CONFIDENCES])
    kept_ek = bound_k <= np.array(MAX_ERRORS)[:, None]
    return np.where(kept_ek.any(axis=1), _CONFIDENCES[kept_ek.argmax(axis=1)], np.inf)


def _bound(observed: Candidates, thresholds: Float[np.ndarray, " d"]) -> float:
    """Return the upper bound of the error of the told labels that thresholds give."""
    passes_nd = observed.mass >= thresholds - ROUNDING  # as Decoders compares
    deepest_n = passes_nd.shape[1] - 1 - passes_nd[:, ::-1].argmax(axis=1)
    verdict_n = np.where(passes_nd.any(axis=1), observed.verdict[np.arange(len(passes_nd)), deepest_n], UNTOLD)
    told_u = np.bincount(observed.unit[verdict_n != UNTOLD])
    wrong_u = np.bincount(observed.unit[verdict_n == WRONG], minlength=len(told_u))
    n_told, n_units = max(int(told_u.sum()), 1), int(np.count_nonzero(told_u))
    error = (wrong_u.sum() + 1) / (n_told + 1)
    freedom = max(n_units - 1, 1)  # one donor says nothing of how donors differ: as two that are alike
    chance = error * (1 - error) / n_told
    between = n_units / freedom * ((wrong_u - error * told_u) ** 2).sum() / n_told**2
    return error + stdtrit(freedom, _LEVEL) * math.sqrt(max(chance, between))


def _thresholds(curves: Float[np.ndarray, "d 2"], confidence: float) -> Float[np.ndarray, " d"]:
    """Return the mass of each depth that has this confidence; infinite where even a mass of 1 has less."""
    intercept_d, slope_d = curves.T
    odds_d = (logit(confidence) - intercept_d) / np.where(slope_d > 0, slope_d, np.nan)
    # A mass of nothing is never enough, whatever rounding it is allowed.
    mass_d = expit(np.maximum(odds_d, logit(2 * ROUNDING)))
    return np.where(odds_d <= logit(1 - ROUNDING), mass_d, np.inf)  # a slope of 0: also never


def _log_odds(mass: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    return logit(np.clip(np.asarray(mass, np.float64), ROUNDING, 1 - ROUNDING))


def _types_of(side: SideFiles) -> str:
    """Return a checksum of the labels and their hierarchy."""
    below = np.packbits(np.asarray(side.reachability) > 0).tobytes()
    return hashlib.sha256("\n".join(side.labels).encode() + below).hexdigest()


class _SomeBlocks(Cells):
    """Some blocks of cells, spread evenly, of about as many cells as a calibration takes at most."""

    def __init__(self, cells: Cells):
        n_blocks = len(cells.block_sizes)
        n_read = max(min(n_blocks, n_blocks * MOST_CELLS // max(cells.n_cells, 1)), 1)
        self._cells, self._blocks = cells, np.arange(n_read) * n_blocks // n_read
        self.title, self.side, self.lookups = cells.title, cells.side, cells.lookups
        self.block_sizes = cells.block_sizes[self._blocks]

    def read_block(self, index: int) -> Block:
        return self._cells.read_block(int(self._blocks[index]))
