"""The counts that an evaluation keeps: against its tables, and whatever may be wrong with their file."""

import dataclasses
import json
import os
import zipfile

import numpy as np
import pandas as pd
import pytest
from evaluated import REACHABILITY, CodedCells, CodedClassifier
from sklearn.metrics import f1_score

from hce_jax.errors import CheckpointError
from hce_jax.evaluation.calibration import Calibration
from hce_jax.evaluation.counts import Counts, DecoderCounts, counts_path
from hce_jax.evaluation.evaluate import Job, Settings, evaluate
from hce_jax.evaluation.hierarchical import area_under_risk_coverage, expected_calibration_error
from hce_jax.hierarchy import correct_predictions


class UnevenCells(CodedCells):
    """Of three studies one has no cells; types are named in the Cell Ontology."""

    def __init__(self, block_sizes):
        super().__init__(block_sizes)
        cl_ids = tuple(f"CL:{code:07}" for code in range(7))
        self.side = dataclasses.replace(self.side, cl_ids=cl_ids)
        self.lookups = {**self.lookups, "dataset_id": ("first", "none", "last")}

    def read_block(self, index):
        block = super().read_block(index)
        columns = {name: block.column(name) for name in ("cell_type", "soma_joinid", *self.lookups)}
        return block.with_columns(columns | {"dataset_id": np.where(columns["soma_joinid"] % 5 < 3, 0, 2)})


def calibration_of(temperature):
    curves, judged = np.array([[0.0, 1.0]] * 3), [np.full(7, 9)] * 2
    promise = np.array([0.05]), np.array([0.6])
    return Calibration("cells", 9, "donor", 2, (), "", *promise, curves, *judged, temperature)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """Two evaluations of two models, one of them calibrated: folders of results by split and model."""
    folders = {}
    for split, n_cells in (("id", 90), ("ood", 61)):
        place = tmp_path_factory.mktemp(split)
        jobs = [Job(CodedClassifier(0, "linear"), place / "plain")]
        jobs.append(Job(CodedClassifier(2, "linear"), place / "calibrated", calibration_of(1.7)))
        evaluate(UnevenCells([20, n_cells - 20]), jobs, Settings(split, confidence=0.75))
        folders |= {(split, job.folder.name): job.folder for job in jobs}
    return folders


@pytest.fixture
def path(evaluated, tmp_path):
    """A copy of the counts of a calibrated model."""
    source = counts_path(evaluated["ood", "calibrated"], "linear")
    return _copy(source, tmp_path / source.name)


def _copy(source, destination):
    destination.write_bytes(source.read_bytes())
    return destination


@pytest.mark.parametrize("model", ["plain", "calibrated"])
@pytest.mark.parametrize("split", ["id", "ood"])
def test_they_give_the_numbers_of_the_tables(evaluated, split, model):
    folder = evaluated[split, model]
    counts = Counts.read(folder / "linear_counts.npz")
    table = pd.read_csv(folder / "linear_hierarchical_metrics.csv", index_col="decoder")
    assert list(counts.decoders) == list(table.index)
    for name, (confusion, by_study, calibration) in counts.decoders.items():
        labels, predictions = np.repeat(np.argwhere(confusion), confusion[confusion > 0], axis=0).T
        corrected = correct_predictions(labels, np.where(predictions == 7, 0, predictions), REACHABILITY)
        corrected[predictions == 7] = 7  # unassigned
        types = np.unique(labels if split == "ood" else np.append(labels, corrected[corrected < 7]))
        expected = f1_score(labels, corrected, labels=types, average="macro", zero_division=0)
        assert expected == pytest.approx(table.loc[name, "f1_macro"], rel=1e-12)
        assert (corrected == labels).mean() == pytest.approx(table.loc[name, "accuracy"], rel=1e-12)
        assert confusion.trace() / len(labels) == pytest.approx(table.loc[name, "exact"], rel=1e-12)  # not corrected
        assert expected_calibration_error(calibration) == pytest.approx(table.loc[name, "ece"], rel=1e-12)
        assert area_under_risk_coverage(calibration) == pytest.approx(table.loc[name, "aurc"], rel=1e-12)
        by_hand = [(corrected == labels, labels), (corrected < 7, corrected), (labels >= 0, labels)]
        for found, (counted, codes) in zip(by_study.sum(axis=0), by_hand, strict=True):
            np.testing.assert_array_equal(found, np.bincount(codes[counted], minlength=7))
    studies = pd.read_csv(folder / "linear_per_dataset_metrics.csv", index_col="dataset")
    by_study = counts.decoders["argmax"].by_study
    assert counts.studies == ("first", "last")  # the one without cells has no row
    np.testing.assert_array_equal(by_study[:, 2].sum(axis=1), studies.loc[[*counts.studies], "n_cells"])
    accuracy = by_study[:, 0].sum(axis=1) / by_study[:, 2].sum(axis=1)
    np.testing.assert_allclose(accuracy, studies.loc[[*counts.studies], "accuracy"])


def test_what_was_evaluated_is_said(evaluated):
    plain, calibrated = (Counts.read(evaluated["id", model] / "linear_counts.npz") for model in ("plain", "calibrated"))
    assert (plain.split, plain.title, plain.n_cells) == ("id", "coded cells", 90)
    assert (plain.labels[1], plain.cl_ids[1]) == ("T1", "CL:0000001")
    np.testing.assert_array_equal(plain.reachability, REACHABILITY)
    assert plain.reachability.dtype == np.float32
    assert (plain.backoff, plain.temperature) == ({"confidence": 0.75}, None)
    assert (calibrated.backoff, calibrated.temperature) == ({"max_error": 0.05}, 1.7)
    assert [*calibrated.decoders] == ["argmax", "backoff", "min-distance", "temperature"]
    one, other = calibrated.decoders["argmax"], calibrated.decoders["temperature"]
    np.testing.assert_array_equal(one.confusion, other.confusion)
    assert not np.array_equal(one.calibration, other.calibration)


def test_what_is_written_is_read_as_it_was(path, tmp_path):
    counts = dataclasses.replace(Counts.read(path), cl_ids=("CL:1", None, *"abcde"), studies=("a", "ä / ß"))
    counts.write(tmp_path / "again.npz")
    again = Counts.read(tmp_path / "again.npz")
    for field in dataclasses.fields(counts):
        if field.name != "decoders":
            np.testing.assert_array_equal(getattr(again, field.name), getattr(counts, field.name))
    for name, of_decoder in counts.decoders.items():
        for one, other in zip(of_decoder, again.decoders[name], strict=True):
            np.testing.assert_array_equal(one, other)
            assert one.dtype == other.dtype
    assert sorted(each.name for each in tmp_path.iterdir()) == ["again.npz", path.name]
    assert (tmp_path / "again.npz").stat().st_size < 20_000  # compressed; the bins alone are 144,000 bytes


def test_a_new_evaluation_replaces_the_counts_and_one_without_names_of_the_ontology_says_none(path):
    evaluate(CodedCells([30]), [Job(CodedClassifier(0, "linear"), path.parent)], Settings("id"))
    counts = Counts.read(path)
    assert (counts.split, counts.n_cells, counts.temperature) == ("id", 30, None)
    assert counts.cl_ids == (None,) * 7


REMEDY = "; evaluate it again: python evaluate.py --split id --run RUN$"


def test_counts_that_are_not_there_are_one_line(tmp_path):
    says = r"linear_counts.npz cannot be read \(No such file or directory\)" + REMEDY
    with pytest.raises(CheckpointError, match=says):
        Counts.read(counts_path(tmp_path, "linear"))


def about(**fields):
    def damage(arrays):
        arrays["about"] = np.array(json.dumps(json.loads(str(arrays["about"])) | fields))

    return damage


def without(field):
    def damage(arrays):
        fields = json.loads(str(arrays["about"]))
        del fields[field]
        arrays["about"] = np.array(json.dumps(fields))

    return damage


def change(name, how):
    def damage(arrays):
        arrays[name] = how(arrays[name])

    return damage


def plus(place, amount=1):
    def how(array):
        array = array.copy()
        array[place] += amount
        return array

    return how


def swapped(array):
    """Two bins with cells and without exchanged: the sums stay."""
    full, empty = np.flatnonzero(array[:, 0])[0], np.flatnonzero(array[:, 0] == 0)[-1]
    array = array.copy()
    array[[full, empty]] = array[[empty, full]]
    return array


def moved(array):
    """A cell of one study counted in another one, so that the latter has none left."""
    return np.stack([array.sum(axis=0), np.zeros_like(array[0])])


def right_of_no_cells(array):
    """A cell that was right counted in a bin that has none, in place of its own."""
    array = array.copy()
    array[np.flatnonzero(array[:, 2])[0], 2] -= 1
    array[np.flatnonzero(array[:, 0] == 0)[0], 2] += 1
    return array


FIRST = "argmax/confusion"
DAMAGES = {
    "fields that are none": (lambda arrays: arrays.update(about=np.array("[1]")), "it holds no fields"),
    "text that is no JSON": (lambda arrays: arrays.update(about=np.array("{")), "Expecting property name"),
    "no fields": (lambda arrays: arrays.pop("about"), "about is not a file"),
    "another split": (about(split="val"), 'its split cannot be "val"'),
    "no title": (without("title"), "its title cannot be null"),
    "labels of another number": (about(labels=["a", "b"]), r'its cl_ids cannot be \["CL:0000000"'),
    "labels that are no names": (about(labels=[1] * 7), "its labels"),
    "no labels": (about(labels=[]), "its labels"),
    "an id too few": (about(cl_ids=[None] * 6), "its cl_ids"),
    "an id that is a number": (about(cl_ids=[1] * 7), "its cl_ids"),
    "a study more": (about(studies=["a", "b", "c"]), "its by_study of argmax"),
    "studies that are none": (about(studies=None), "its studies cannot be null"),
    "a decoder less": (about(decoders=["argmax"]), r'its decoders cannot be \["argmax"\]'),
    "a temperature without its counts": (about(decoders=["argmax", "backoff", "min-distance"]), "its decoders"),
    "counts without a temperature": (about(temperature=None), "its decoders"),
    "a temperature of nothing": (about(temperature=0), "its temperature cannot be 0"),
    "a temperature that is no number": (about(temperature=float("nan")), "its temperature cannot be NaN"),
    "a temperature that is a text": (about(temperature="1.7"), "its temperature"),
    "back-off by both": (about(backoff={"confidence": 0.5, "max_error": 0.1}), "its backoff"),
    "back-off by nothing": (about(backoff=None), "its backoff"),
    "back-off by too much": (about(backoff={"confidence": 1.5}), "its backoff"),
    "back-off by a text": (about(backoff={"max_error": "0.1"}), "its backoff"),
    "no hierarchy": (lambda arrays: arrays.pop("reachability"), "reachability is not a file"),
    "a hierarchy with a cycle": (change("reachability", lambda a: a | a.T), "its hierarchy has a cycle"),
    "a hierarchy of other types": (change("reachability", lambda a: a[:5, :5]), "its hierarchy has 5 rows"),
    "a hierarchy of texts": (change("reachability", lambda a: a.astype(str)), "its reachability holds no numbers"),
    "an array less": (lambda arrays: arrays.pop("backoff/by_study"), "backoff/by_study is not a file"),
    "predictions of other types": (change(FIRST, lambda a: a[:, :-1]), "its confusion of argmax"),
    "labels of other types": (change(FIRST, lambda a: a[:-1]), "its confusion of argmax"),
    "fewer than no cells": (change(FIRST, plus((1, 1), -100)), "its confusion of argmax"),
    "halves of cells": (change(FIRST, lambda a: a + 0.5), "its confusion of argmax"),
    "endless cells": (change(FIRST, lambda a: np.where(a, np.inf, 0)), "its confusion of argmax"),
    "truth values": (change(FIRST, lambda a: a > 0), "its confusion of argmax"),
    "a cell more in all": (change(FIRST, plus((1, 1))), "its by_study of argmax"),
    "other cells of another decoder": (change("backoff/confusion", plus((1, 1))), "its confusion of backoff"),
    "a study less": (change("argmax/by_study", lambda a: a.sum(axis=0, keepdims=True)), "its by_study of argmax"),
    "counts of one kind less": (change("argmax/by_study", lambda a: a[:, :2]), "its by_study of argmax"),
    "a right cell more": (change("backoff/by_study", plus((0, 0, 1))), "its by_study of backoff"),
    "a predicted cell more": (change("backoff/by_study", plus((0, 1, 1))), "its by_study of backoff"),
    "a labelled cell more": (change("backoff/by_study", plus((0, 2, 1))), "its by_study of backoff"),
    "a study without cells": (change("argmax/by_study", moved), "its by_study of argmax"),
    "fewer bins": (change("argmax/calibration", lambda a: a[:15]), "its calibration of argmax"),
    "a cell more in a bin": (change("argmax/calibration", plus((1499, slice(None)))), "its calibration of argmax"),
    "a right cell in an empty bin": (change("argmax/calibration", right_of_no_cells), "its calibration of argmax"),
    "confidence in an empty bin": (change("argmax/calibration", plus((0, 1), 0.5)), "its calibration of argmax"),
    "confidence that is no number": (change("argmax/calibration", plus((0, 1), np.nan)), "its calibration of argmax"),
    "bins in another order": (change("argmax/calibration", swapped), "its calibration of argmax"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_one_line(path, name):
    damage, says = DAMAGES[name]
    with np.load(path) as archive:
        arrays = dict(archive)
    damage(arrays)
    np.savez_compressed(path, **arrays)
    with pytest.raises(CheckpointError, match=rf"linear_counts.npz is damaged \(.*{says}.*\)" + REMEDY):
        Counts.read(path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_version_of_the_format_is_said_and_not_called_damaged(path, version):
    with np.load(path) as archive:
        arrays = dict(archive)
    about(format_version=version, decoders=["new"])(arrays)
    np.savez_compressed(path, **arrays)
    says = rf"linear_counts.npz is of format version {json.dumps(version)}, not 1"
    with pytest.raises(CheckpointError, match=says + REMEDY):
        Counts.read(path)


@pytest.mark.parametrize(
    ("contents", "says"),
    [
        (lambda data: b"", "it is no npz file"),
        (lambda data: b"f1\n0.8\n", "it is no npz file"),
        (lambda data: data[: len(data) // 2], "it is no npz file"),
        (lambda data: data.replace(b"about.npy", b"aboutanpy"), ".*about is not a file.*"),
    ],
)
def test_other_files_are_one_line(path, contents, says):
    path.write_bytes(contents(path.read_bytes()))
    with pytest.raises(CheckpointError, match=rf"linear_counts.npz is damaged \({says}\)" + REMEDY):
        Counts.read(path)


def test_a_broken_byte_is_one_line_or_makes_no_difference(path):
    data, whole, n_refused = path.read_bytes(), Counts.read(path), 0
    places = range(20, len(data), 97)
    for place in places:
        path.write_bytes(data[:place] + bytes([data[place] ^ 64]) + data[place + 1 :])
        try:
            read = Counts.read(path)
        except CheckpointError as error:
            assert str(error).startswith(f"{path} is damaged (")  # noqa: PT017
            n_refused += 1
        else:  # of what a zip file says about itself, such as dates, nothing is used
            assert (read.labels, read.studies) == (whole.labels, whole.studies)
            for name, of_decoder in whole.decoders.items():
                for one, other in zip(of_decoder, read.decoders[name], strict=True):
                    np.testing.assert_array_equal(one, other)
    assert n_refused > len(places) / 2 > 20


class MakesFolder:
    """Unpickling it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_nothing_that_a_file_holds_is_executed(path):
    with np.load(path) as archive:
        arrays = dict(archive)
    arrays[FIRST] = np.array([[MakesFolder(path.parent / "executed")]], object)
    np.savez(path, **arrays)
    with pytest.raises(CheckpointError, match="damaged"):
        Counts.read(path)
    assert not (path.parent / "executed").exists()


def test_one_array_for_each_part_and_decoder(path):
    with zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
    decoders = ("argmax", "backoff", "min-distance", "temperature")
    parts = {f"{name}/{part}" for name in decoders for part in DecoderCounts._fields}
    assert names == {"about", "reachability"} | parts
