"""Calibration on cells whose labels are coarse at random, by a model that is too sure of itself."""

import json
import re
import shutil

import numpy as np
import pytest
from coded_cells import block_of, coded_split
from flax import nnx
from scipy import stats
from scipy.optimize import minimize
from stores import write_tiny_store

from hce_jax.checkpoint import delete_checkpoint, load_model, save_model
from hce_jax.errors import CheckpointError, ConfigError, StoreError
from hce_jax.evaluation import calibration as module
from hce_jax.evaluation.calibration import (
    MAX_ERRORS,
    RIGHT,
    UNTOLD,
    WRONG,
    Calibration,
    Candidates,
    calibrate,
    calibration_of,
    calibration_path,
    candidates,
    keep,
    verdicts,
)
from hce_jax.evaluation.cells import Cells
from hce_jax.evaluation.decoders import UNASSIGNED, Decoders
from hce_jax.hierarchy import depths, reachability_from_edges
from hce_jax.models import build_model, split_model
from hce_jax.predictor import Ensemble, ModelCard
from hce_jax.store import open_store
from hce_jax.typing import PRECISIONS

# 0 -> 1 -> (3, 4), 0 -> 2 -> 5, and 6 alone; depths 0 1 1 2 2 2 0.
REACHABILITY = reachability_from_edges(7, [(0, 1), (0, 2), (1, 3), (1, 4), (2, 5)])
DEPTH = depths(REACHABILITY)
N_CELLS, N_STUDIES, N_DONORS = 3000, 3, 12


class SimulatedCells(Cells):
    """Cells whose authors' labels are often coarse, and a model of which some donors are harder than others."""

    reads_sparse, model_type, title = True, "simulated", "simulated cells"

    def __init__(self, seed, n_cells=N_CELLS, block_size=100):
        rng = np.random.default_rng(seed)
        side = coded_split([1]).side
        self.side = type(side)(**{**vars(side), "reachability": REACHABILITY})
        self.block_sizes = np.full(n_cells // block_size, block_size)
        self.lookups = {"dataset_id": tuple("ABC"), "donor_id": tuple("abcdefghijkl")}
        self.studies, self.donors = rng.integers(N_STUDIES, size=n_cells), rng.integers(N_DONORS, size=n_cells)
        leaf = rng.choice([3, 4, 5, 6], n_cells)
        above = [np.flatnonzero(REACHABILITY[:, each]) for each in range(7)]
        self.labels = np.array([rng.choice(above[each]) if rng.random() < 0.4 else each for each in leaf])
        noise = 1.5 + 0.5 * rng.random(N_DONORS)[self.donors]
        logits = 3 * np.eye(7)[leaf] + noise[:, None] * rng.normal(size=(n_cells, 7))
        self.probabilities = (np.exp(1.7 * logits) / np.exp(1.7 * logits).sum(1, keepdims=True)).astype(np.float32)
        self.reads = []

    def read_block(self, index):
        self.reads.append(index)
        cells = np.arange(self.block_sizes[0]) + index * self.block_sizes[0]
        columns = {"cell_type": self.labels, "dataset_id": self.studies, "donor_id": self.donors}
        return block_of(cells).with_columns({name: codes[cells] for name, codes in columns.items()} | {"number": cells})

    def predict_block(self, cells):
        return self.probabilities[cells.block.column("number")]


def calibration_with(**fields):
    curves = np.array([[0.5, 1.5], [-1.0, 0.8], [-3.0, 2.0]])
    given = {"max_errors": np.array([0.01, 0.05, 0.1]), "confidences": np.array([np.inf, 0.9, 0.7]), "curves": curves}
    given |= {"n_candidates": np.full(7, 30), "n_told": np.full(7, 30), "temperature": 1.0}
    return Calibration(
        **{"title": "cells", "n_cells": 10, "unit": "donor", "n_units": 2, "studies": (), "types": "x"} | given | fields
    )


def observed_of(mass, verdict, unit):
    return Candidates(np.zeros(verdict.shape, int), mass.astype(np.float32), verdict.astype(np.int8), unit)


def told_error(cells, codes):
    """Give the share of wrong ones of the told labels, and of labels among the cells; by sets."""
    below = [{*np.flatnonzero(REACHABILITY[each])} for each in range(7)]
    pairs = [(label, code) for label, code in zip(cells.labels, codes, strict=True) if code != UNASSIGNED]
    told = [(label, code) for label, code in pairs if code == label or code not in below[label]]
    return np.mean([label not in below[code] for label, code in told]), len(pairs) / len(codes)


@pytest.fixture(scope="module")
def calibrated():
    return calibrate(cells := SimulatedCells(0), cells, "donor", batch_size=256)


def test_a_label_tells_right_above_it_wrong_beside_it_and_nothing_below_it():
    told = verdicts(np.array([1]), np.array([[0, 1, 2, 3, 4, 5, 6, -1]]), REACHABILITY)
    assert told.tolist() == [[RIGHT, RIGHT, WRONG, UNTOLD, UNTOLD, WRONG, WRONG, UNTOLD]]
    rng = np.random.default_rng(0)
    edges = [(i, j) for i in range(20) for j in range(i + 1, 20) if rng.random() < 0.15]
    reach = reachability_from_edges(20, edges)
    labels, codes = rng.integers(20, size=500), rng.integers(-1, 20, size=(500, 3))
    for label, row, of_row in zip(labels, codes, verdicts(labels, codes, reach), strict=True):
        ancestors = {i for i in range(20) if reach[i, label]}
        for code, verdict in zip(row, of_row, strict=True):
            is_below = code >= 0 and code != label and reach[label, code]
            assert verdict == (UNTOLD if code < 0 or is_below else RIGHT if code in ancestors else WRONG)


def test_the_candidate_of_a_depth_holds_the_largest_mass_there():
    mass = np.array([[0.6, 0.2, 0.3, 0.1, 0.1, 0.3, 0.4], [0.2, 0.2, 0.0, 0.0, 0.2, 0.0, 0.8]])
    assert candidates(mass, DEPTH).tolist() == [[0, 2, 5], [6, 1, 4]]
    gap = reachability_from_edges(4, [(0, 2), (1, 2), (2, 3)])  # 2 has two parents: depths 0 0 2 3
    assert candidates(np.array([[0.1, 0.9, 0.5, 0.2]]), depths(gap)).tolist() == [[1, -1, 2, 3]]


def told_at_depth_0(mass, right, unit=None):
    verdict = np.where(right, RIGHT, WRONG)[:, None]
    return observed_of(mass[:, None], verdict, np.zeros(len(mass), int) if unit is None else unit)


@pytest.mark.parametrize("n_cells", [5, 400])
def test_a_curve_is_the_most_probable_one(n_cells):
    rng = np.random.default_rng(n_cells)
    mass = rng.uniform(0.05, 0.999, n_cells).astype(np.float32)
    odds = np.log(mass.astype(float) / (1 - mass.astype(float)))
    right = rng.random(n_cells) < 1 / (1 + np.exp(1 - 0.5 * odds))

    def unlikely(curve):
        share = 1 / (1 + np.exp(-curve[0] - curve[1] * odds))
        prior = stats.norm.logpdf(curve[0]) + stats.norm.logpdf(curve[1], loc=1)
        return -stats.bernoulli.logpmf(right, share).sum() - prior

    expected = minimize(unlikely, [0, 0.5], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9}).x
    np.testing.assert_allclose(module._curve(told_at_depth_0(mass, right), 0), expected, atol=2e-3)


def test_without_told_cells_confidence_is_the_mass_and_untold_cells_do_not_count():
    mass = np.linspace(0.1, 0.9, 50)
    untold = observed_of(mass[:, None], np.zeros((50, 1)), np.zeros(50, int))
    assert module._curve(untold, 0).tolist() == [0, 1]
    some = told_at_depth_0(mass, mass > 0.6)
    both = Candidates(*(np.concatenate(pair) for pair in zip(some, untold, strict=True)))
    np.testing.assert_array_equal(module._curve(both, 0), module._curve(some, 0))


def test_where_more_mass_means_less_right_the_slope_is_none_and_no_label_is_given():
    mass = np.tile(np.linspace(0.05, 0.95, 100), 20)
    curve = module._curve(told_at_depth_0(mass, np.arange(2000) % 100 < 95 * (1 - mass)), 0)
    assert curve[1] == 0
    assert module._thresholds(curve[None], 0.5).tolist() == [np.inf]


def test_the_bound_of_three_donors_worked_by_hand():
    # Donors with 10, 20 and 30 told cells of which 0, 1 and 5 are wrong, and with untold cells; a fourth has none told.
    told, wrong = np.array([10, 20, 30]), np.array([0, 1, 5])
    verdict = np.concatenate([[WRONG] * w + [RIGHT] * (t - w) + [UNTOLD] * 3 for t, w in zip(told, wrong, strict=True)])
    unit = np.repeat([0, 2, 3, 1], [13, 23, 33, 2])
    verdict = np.append(verdict, [UNTOLD] * 2)
    observed = observed_of(np.full((len(unit), 1), 0.8), verdict[:, None], unit)
    error = 7 / 61
    between = 3 / 2 * sum((w - error * t) ** 2 for t, w in zip(told, wrong, strict=True)) / 60**2
    chance = error * (1 - error) / 60
    assert between > chance  # or this test shows nothing
    expected = error + stats.t.ppf(0.95, 2) * np.sqrt(between)
    assert module._bound(observed, np.array([0.8])) == pytest.approx(expected)
    alike = observed._replace(unit=np.arange(len(unit)) % 3)
    assert module._bound(alike, np.array([0.8])) == pytest.approx(error + stats.t.ppf(0.95, 2) * np.sqrt(chance))
    one = observed._replace(unit=np.zeros(len(unit), int))
    assert module._bound(one, np.array([0.8])) == pytest.approx(error + stats.t.ppf(0.95, 1) * np.sqrt(chance))
    assert module._bound(observed, np.array([0.81])) >= 1  # no label at all promises nothing


def test_a_promise_is_the_lowest_confidence_that_keeps_it(calibrated):
    cells, expected = SimulatedCells(0), []
    for confidence in module._CONFIDENCES:
        codes = (
            Decoders(REACHABILITY, module._thresholds(calibrated.curves, confidence))
            .decode("backoff", cells.probabilities)
            .codes
        )
        observed = observed_of(
            np.ones((N_CELLS, 1)), verdicts(cells.labels, codes[:, None], REACHABILITY), cells.donors
        )
        expected.append(module._bound(observed, np.array([0.5])))
    for max_error, confidence in zip(MAX_ERRORS, calibrated.confidences, strict=True):
        kept = module._CONFIDENCES[np.array(expected) <= max_error]
        assert confidence == (min(kept) if len(kept) else np.inf)
    assert (calibrated.n_units, calibrated.n_cells, calibrated.studies) == (12, N_CELLS, ())
    assert (np.diff(calibrated.confidences[np.isfinite(calibrated.confidences)]) <= 0).all()


def test_cells_that_tell_are_counted_for_each_type(calibrated):
    cells = SimulatedCells(0)
    mass_nc = cells.probabilities @ REACHABILITY.T
    sure_nc = np.stack([calibrated.confidence(mass_nc[:, code], np.full(N_CELLS, DEPTH[code])) for code in range(7)], 1)
    n_candidates, n_told = np.zeros(7, int), np.zeros(7, int)
    for mass, sure, label in zip(mass_nc.tolist(), sure_nc.tolist(), cells.labels.tolist(), strict=True):
        for same_depth in ([0, 6], [1, 2], [3, 4, 5]):
            code = max(same_depth, key=mass.__getitem__)
            if sure[code] >= 0.5:
                n_candidates[code] += 1
                n_told[code] += code == label or not REACHABILITY[label, code]
    np.testing.assert_allclose(calibrated.n_candidates, n_candidates, atol=1)  # one may lie on the bound
    np.testing.assert_allclose(calibrated.n_told, n_told, atol=1)
    assert n_told[0] == n_candidates[0]  # nothing is coarser
    assert all(0.4 * n_candidates[each] < n_told[each] < 0.95 * n_candidates[each] for each in (3, 4, 5))


def test_types_of_which_few_cells_tell_are_hardly_judged():
    calibration = calibration_with(
        n_candidates=np.array([0, 19, 20, 40, 41, 1000, 1000]), n_told=np.array([0, 19, 20, 20, 20, 499, 500])
    )
    assert calibration.hardly_judged.tolist() == [True, True, False, False, True, True, False]


@pytest.mark.parametrize("max_error", [0.03, 0.05, 0.1])
def test_other_cells_keep_the_promised_error_where_a_plain_threshold_does_not(calibrated, max_error):
    others = SimulatedCells(1)
    codes, _ = Decoders(REACHABILITY, calibrated.thresholds_at(max_error)).decode("backoff", others.probabilities)
    error, labelled = told_error(others, codes)
    assert max_error / 4 < error <= max_error
    assert labelled > 0.3
    plain, _ = Decoders(REACHABILITY, 1 - max_error).decode("backoff", others.probabilities)
    assert told_error(others, plain)[0] > error * 1.3


def test_confidence_is_the_share_of_right_ones_where_the_mass_is_not(calibrated):
    others = SimulatedCells(1)
    codes, mass = Decoders(REACHABILITY, 0.6).decode("backoff", others.probabilities)
    verdict = verdicts(others.labels, codes[:, None], REACHABILITY)[:, 0]
    told = (verdict != UNTOLD) & (codes != UNASSIGNED)
    codes, mass, right = codes[told], mass[told], verdict[told] == RIGHT
    confidence = calibrated.confidence(mass, DEPTH[codes])
    assert confidence.dtype == np.float32
    assert abs(confidence.mean() - right.mean()) < 0.04 < 0.08 < abs(mass.mean() - right.mean())


def test_thresholds_are_the_masses_of_that_confidence_and_infinite_where_there_is_none():
    calibration = calibration_with()
    thresholds = calibration.thresholds_at(0.05)
    np.testing.assert_allclose(calibration.confidence(thresholds, np.arange(3)), 0.9, rtol=1e-5)
    never = calibration_with(curves=np.array([[-20.0, 1.0], [0.0, 0.0], [60.0, 1.0]])).thresholds_at(0.05)
    assert never[:2].tolist() == [np.inf, np.inf]
    nothing = np.zeros((1, 2), np.float32)  # no mass at all is never enough
    assert Decoders(np.eye(2), never[2:]).decode("backoff", nothing).codes.tolist() == [UNASSIGNED]


@pytest.mark.parametrize(("max_error", "confidence"), [(0.05, 0.9), (0.07, 0.9), (0.0999, 0.9), (0.1, 0.7)])
def test_the_promise_of_the_largest_error_that_does_not_exceed_what_is_asked_counts(max_error, confidence):
    assert calibration_with().confidence_at(max_error) == confidence


@pytest.mark.parametrize(
    ("max_error", "says"),
    [
        (0.001, "--max_error=0.001: an error that can be promised lies between 0.01 and 0.1"),
        (0.6, "--max_error=0.6: an error"),
        (float("nan"), "--max_error=nan"),
        (0.02, r"--max_error=0.02 cannot be promised \(calibrated on 10 cells of 2 donors, cells\): the least is 0.05"),
    ],
)
def test_an_error_that_cannot_be_promised_is_refused(max_error, says):
    with pytest.raises(ConfigError, match=says):
        calibration_with().thresholds_at(max_error)


def test_what_is_written_is_read_as_it_was(tmp_path, calibrated):
    path, side = tmp_path / "calibration.json", SimulatedCells(0).side
    calibrated.write(path)
    read = Calibration.read(path, side)
    for name, value in vars(calibrated).items():
        np.testing.assert_array_equal(getattr(read, name), value)
    assert [each.name for each in tmp_path.iterdir()] == ["calibration.json"]
    assert json.loads(path.read_text())["about"] == "calibrated on 3,000 cells of 12 donors, simulated cells"
    assert np.isinf(read.confidences[0])  # half a per cent cannot be promised, and is null in the file


@pytest.mark.parametrize(
    "damage",
    [
        lambda fields: fields.pop("curves"),
        lambda fields: fields.update(temperature=None),
        lambda fields: fields.update(temperature="1.8"),
        lambda fields: fields.update(temperature=True),
        lambda fields: fields.update(temperature=0.0499),
        lambda fields: fields.update(temperature=20.1),
        lambda fields: fields.update(temperature=float("nan")),
        lambda fields: fields.update(curves=[[0, 1]]),
        lambda fields: fields.update(curves=[[0, 1, 2]] * 3),
        lambda fields: fields.update(curves=[[0, None]] * 3),
        lambda fields: fields["confidences"].pop(),
        lambda fields: fields["confidences"].__setitem__(3, -1),
        lambda fields: fields["max_errors"].reverse(),
        lambda fields: fields.update(unit="cell"),
        lambda fields: fields.update(studies=None),
        lambda fields: fields.update(studies=[7]),
        lambda fields: fields.update(title=7),
        lambda fields: fields.update(types=None),
        lambda fields: fields.update(n_cells="576"),
        lambda fields: fields.update(n_cells=True, n_units=True),
        lambda fields: fields.update(n_cells=0),
        lambda fields: fields.update(n_units=None),
        lambda fields: fields.update(n_units="12"),
        lambda fields: fields.update(n_units=0),
        lambda fields: fields.update(n_units=N_CELLS + 1),
        lambda fields: fields["curves"][1].__setitem__(1, -0.1),
        lambda fields: fields["curves"][1].__setitem__(1, "1.0"),
        lambda fields: fields["curves"][1].append(1.0),
        lambda fields: fields["confidences"].__setitem__(3, 2.0),
        lambda fields: fields["confidences"].__setitem__(3, "0.9"),
        lambda fields: fields["confidences"].__setitem__(3, float("nan")),
        lambda fields: fields["max_errors"].__setitem__(0, float("nan")),
        lambda fields: fields["max_errors"].__setitem__(-1, 1.5),
        lambda fields: fields["max_errors"].__setitem__(0, 0),
        lambda fields: fields.update(max_errors=[], confidences=[]),
        lambda fields: fields["n_told"].__setitem__(3, 10**6),
        lambda fields: fields["n_told"].__setitem__(3, -1),
        lambda fields: fields["n_told"].__setitem__(3, 5.0),
        lambda fields: fields["n_told"].pop(),
        lambda fields: fields["n_candidates"].__setitem__(3, 10**30),
        lambda fields: [fields[name].pop() for name in ("n_told", "n_candidates")],
        None,
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, calibrated, damage):
    path = tmp_path / "calibration.json"
    calibrated.write(path)
    if damage is None:
        path.write_text(path.read_text()[:100])
    else:
        fields = json.loads(path.read_text())
        damage(fields)
        path.write_text(json.dumps(fields))
    with pytest.raises(
        CheckpointError, match=r"calibration.json is (damaged|of other) .*; make it anew: python evaluate.py"
    ):
        Calibration.read(path, SimulatedCells(0).side)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (lambda text: text.replace('"n_told"', '"told"'), r"it has no n_told\)"),
        (lambda text: text.replace('"format_version"', '"version"'), r"it has no format_version\)"),
        (lambda text: text.replace('"n_cells": 3000', '"n_cells": "3000"'), r"its n_cells cannot be \"3000\"\)"),
        (lambda text: text.replace('"n_cells": 3000', '"n_cells": 0'), r"its n_cells cannot be 0\)"),
        (lambda text: f"[{text}]", r"it holds no fields\)"),
        (lambda text: text.replace("simulated", "\udcff"), "can't decode"),
    ],
)
def test_what_is_wrong_with_a_damaged_file_is_said(tmp_path, calibrated, text, says):
    path = tmp_path / "calibration.json"
    calibrated.write(path)
    path.write_bytes(text(path.read_text()).encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=rf"calibration.json is damaged \(.*{says}.*; make it anew: python"):
        Calibration.read(path, SimulatedCells(0).side)


@pytest.mark.parametrize("version", [1, 3, "2"])
def test_another_version_of_the_format_is_said_and_not_called_damaged(tmp_path, calibrated, version):
    path = tmp_path / "calibration.json"
    calibrated.write(path)
    fields = json.loads(path.read_text()) | {"format_version": version}
    path.write_text(json.dumps({name: value for name, value in fields.items() if name != "temperature"}))
    says = f"calibration.json is of format version {json.dumps(version)}, not 2; make it anew: python evaluate.py"
    with pytest.raises(CheckpointError, match=says):
        Calibration.read(path, SimulatedCells(0).side)


def test_the_temperature_is_the_most_likely_one_of_the_cells_that_are_read(calibrated):
    cells = SimulatedCells(0)
    p = cells.probabilities.astype(float)

    def unlikely(temperature):
        power = p ** (1 / temperature)
        return -np.log((power * REACHABILITY[cells.labels]).sum(axis=1) / power.sum(axis=1)).sum()

    grid = np.geomspace(0.5, 8, 2000)
    assert calibrated.temperature == pytest.approx(grid[np.argmin([unlikely(t) for t in grid])], rel=2e-3)
    assert 1.5 < calibrated.temperature < 6  # the model is too sure of itself


@pytest.mark.parametrize(("certain", "says"), [(True, "T = 0.05, the end .*: the surer"), (False, "T = 20, the end")])
def test_a_temperature_at_the_end_of_its_range_is_said(certain, says, capsys):
    cells = SimulatedCells(3, 300)
    deep = np.isin(cells.labels, [3, 4, 5])
    cells.labels[~deep] = 6
    wrong = np.where(cells.labels == 6, 3, 6)
    sure = 0.6 * np.eye(7)[cells.labels if certain else wrong] + 0.4 / 7
    cells.probabilities = sure.astype(np.float32)
    assert calibrate(cells, cells, "donor").temperature == (0.05 if certain else 20)
    assert re.search(f"simulated cells: {says}", capsys.readouterr().err)


@pytest.mark.parametrize("change", ["labels", "hierarchy"])
def test_the_calibration_of_other_types_is_refused(tmp_path, calibrated, change):
    calibrated.write(tmp_path / "calibration.json")
    side = SimulatedCells(0).side
    other = {"labels": side.labels[::-1]} if change == "labels" else {"reachability": np.eye(7)}
    with pytest.raises(CheckpointError, match="is of other cell types, or another hierarchy, than the model"):
        Calibration.read(tmp_path / "calibration.json", type(side)(**{**vars(side), **other}))


def test_cells_of_another_hierarchy_than_the_model_s_are_refused():
    cells, model = SimulatedCells(0, 100), SimulatedCells(0, 100)
    model.side = type(model.side)(**{**vars(model.side), "reachability": np.eye(7)})
    with pytest.raises(CheckpointError, match="was trained with another hierarchy than that of the simulated cells"):
        calibrate(cells, model, "donor")
    assert not cells.reads


def test_no_cells_are_one_line_too():
    cells = SimulatedCells(0, 0)
    with pytest.raises(StoreError, match="simulated cells holds no cells, so there is nothing to calibrate on"):
        calibrate(cells, cells, "donor")


def test_of_many_cells_some_are_read_evenly_and_that_is_said(monkeypatch):
    monkeypatch.setattr(module, "MOST_CELLS", 500)
    cells = SimulatedCells(0)
    about = calibrate(cells, cells, "study").about
    assert sorted(cells.reads) == [0, 6, 12, 18, 24]
    assert about == "calibrated on 500 cells of 3 studies, of the 3,000 of the simulated cells"


def test_units_are_studies_or_donors_and_one_is_said_to_be_weak():
    cells = SimulatedCells(2, 200)
    of_studies = calibrate(cells, cells, "study")
    assert (of_studies.n_units, of_studies.studies) == (3, ("A", "B", "C"))
    cells.donors[:] = 3
    about = calibrate(cells, cells, "donor").about
    assert about.startswith("calibrated on 200 cells of 1 donor, simulated cells; one donor says little of others")


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint in a folder, trained on the tiny store beside it, or so it says."""
    side = open_store(write_tiny_store(tmp_path / "store")).side
    config = {"model_type": "linear", "precision": "float32"}
    model = build_model(config, side.n_genes, side.n_types, nnx.Rngs(0), precision=PRECISIONS["float32"])
    loss = {"use_hierarchical_loss": True, "epsilon": 1e-6}
    lists = (side.gene_ids, side.gene_names, side.labels, None)
    card = ModelCard(config, *lists, None, "", loss, str(tmp_path / "store"), 0, 0, {})
    save_model(tmp_path / "a.ckpt", card, side.reachability, *split_model(model)[1:])
    return tmp_path / "a.ckpt"


def test_a_checkpoint_without_calibration_gets_that_of_its_validation_split_and_keeps_it(checkpoint, capsys):
    made = calibration_of(load_model(checkpoint))
    assert (made.n_cells, made.unit, made.n_units) == (23, "donor", 1)
    said = capsys.readouterr().err
    assert "a.ckpt has no calibration.json: one is made now, of the validation split" in said
    assert f"{checkpoint / 'calibration.json'}: calibrated on 23 cells of 1 donor, val split of" in said
    store = checkpoint.parent / "store"
    store.rename(checkpoint.parent / "moved")  # not needed again
    kept = calibration_of(load_model(checkpoint))  # Orbax does not mind the file
    np.testing.assert_array_equal(kept.curves, made.curves)
    assert not capsys.readouterr().err
    (checkpoint / "calibration.json").unlink()
    says = r"has no calibration.json, and the store .*store is not here .*--confidence 0.9"
    with pytest.raises(CheckpointError, match=says):
        calibration_of(load_model(checkpoint))


def test_models_that_are_asked_together_are_calibrated_together_and_nothing_is_kept(checkpoint, capsys):
    shutil.copytree(checkpoint, other := checkpoint.with_name("b.ckpt"))
    made = calibration_of(Ensemble([load_model(checkpoint), load_model(other)]))
    assert made.n_cells == 23
    assert "2 x linear, hierarchical cross entropy has no calibration.json: one is made now" in capsys.readouterr().err
    assert not list(checkpoint.parent.glob("*.ckpt/calibration.json"))
    shutil.rmtree(checkpoint.parent / "store")
    with pytest.raises(CheckpointError, match=r"store is not here to make one; give --confidence 0.9$"):
        calibration_of(Ensemble([load_model(checkpoint), load_model(other)]))


def test_a_checkpoint_is_deleted_with_its_calibration(checkpoint, calibrated):
    keep(calibrated, calibration_path(checkpoint))
    delete_checkpoint(checkpoint)
    assert [path.name for path in checkpoint.parent.iterdir()] == ["store"]


def test_a_calibration_that_cannot_be_kept_is_said(tmp_path, calibrated, capsys):
    keep(calibrated, tmp_path / "no such folder" / "calibration.json")
    assert "cannot be written (No such file or directory): calibrated on 3,000 cells" in capsys.readouterr().err
