import itertools

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from hce_jax.evaluation.plots import calibration_plot, confusion_plot, performance_plot


def report(f1, support=None, codes=None):
    support = [10.0] * len(f1) if support is None else support
    codes = range(len(f1)) if codes is None else codes
    return pd.DataFrame({"f1-score": f1, "support": support}, index=[str(code) for code in codes])


def bins(cells, confidence, accuracy):
    edges = np.linspace(0, 1, len(cells) + 1)
    columns = {"cells": cells, "confidence": confidence, "accuracy": accuracy}
    return pd.DataFrame({"confidence_from": edges[:-1], "confidence_to": edges[1:], **columns})


def boxes_inside(figure, texts):
    """Return where some texts are drawn, all of them in the picture."""
    boxes = [text.get_window_extent(figure.canvas.get_renderer()) for text in texts]
    width, height = figure.bbox.size
    assert all(0 <= box.x0 and box.x1 <= width and 0 <= box.y0 and box.y1 <= height for box in boxes)
    return boxes


#: A root above two types, one of which is also below a second root, as a graph that is no tree has it.
REACH = np.array(
    [
        [1, 0, 0, 1, 0],  # 0 B cell: 3
        [0, 1, 0, 0, 0],  # 1 neuron
        [1, 0, 1, 1, 1],  # 2 lymphocyte: 0, 3, 4
        [0, 0, 0, 1, 0],  # 3 naive B cell
        [0, 0, 0, 0, 1],  # 4 T cell
    ],
    np.float32,
)
NAMES = ["B cell", "neuron", "lymphocyte", "naive B cell", "T cell"]


@pytest.fixture
def drawn(monkeypatch):
    """Collect the figures that are saved."""
    figures, save = [], Figure.savefig

    def savefig(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_best_type_comes_first_and_names_follow_their_codes(drawn, tmp_path):
    names = ["a", "b", "c", "d", "e"]
    performance_plot(report([0.2, 0.9, 0.5], [7, 0, 1234], codes=[4, 0, 2]), names, tmp_path / "plot.png", "title")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "c", "e"]
    assert [bar.get_width() for bar in axes.patches[:3]] == [0.9, 0.5, 0.2]
    assert axes.yaxis_inverted()
    texts = [text.get_text() for text in axes.texts]
    assert [text for text in texts if text in ("0", "1,234", "7")] == ["0", "1,234", "7"]
    assert "2 labelled types, 0.350" in axes.get_xlabel()


@pytest.mark.parametrize("n_types", [1, 5, 100])
def test_no_name_meets_another_or_leaves_the_picture(n_types, drawn, tmp_path):
    names = [f"A CELL TYPE WITH A RATHER LONG NAME, such as there are, number {i}" for i in range(n_types)]
    performance_plot(report(np.linspace(1, 0, n_types)), names, tmp_path / "plot.png", "title")
    boxes = boxes_inside(drawn[0], drawn[0].axes[0].get_yticklabels())
    assert all(below.y1 <= above.y0 for above, below in itertools.pairwise(boxes))


def test_score_of_one_does_not_meet_millions_of_cells(drawn, tmp_path):
    performance_plot(report([1.0, 1.0], [12_345_678, 3]), ["a", "b"], tmp_path / "plot.png", "title")
    (axes,) = drawn[0].axes
    boxes = dict(zip([text.get_text() for text in axes.texts], boxes_inside(drawn[0], axes.texts), strict=True))
    assert boxes["1.00"].x1 < boxes["12,345,678"].x0


def test_long_title_takes_several_lines(drawn, tmp_path):
    title = "a checkpoint's name, on the cells of many studies, " * 5
    performance_plot(report([0.5]), ["a"], tmp_path / "plot.png", title.strip())
    written = drawn[0].texts[0]
    assert written.get_text().replace("\n", " ") == title.strip()
    (box,) = boxes_inside(drawn[0], [written])
    axes_box = drawn[0].axes[0].get_tightbbox(drawn[0].canvas.get_renderer())
    assert axes_box.y1 < box.y0


def test_calibration_shows_the_numbers_of_its_bins(drawn, tmp_path):
    table = bins([4, 0, 10, 6], [0.2, np.nan, 0.6, 0.9], [0.5, np.nan, 0.4, 0.95])
    coverage, accuracy = np.array([0.3, 0.8, 1.0]), np.array([0.95, 0.61, 0.585])
    calibration_plot(table, coverage, accuracy, 0.175, tmp_path / "calibration.png", "title")
    reliability, histogram, curve = drawn[0].axes
    diagonal, points = reliability.lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert points.get_xydata().tolist() == [[0.2, 0.5], [0.6, 0.4], [0.9, 0.95]]
    gaps = [segment.tolist() for segment in reliability.collections[0].get_segments()]
    assert gaps == [[[0.2, 0.2], [0.2, 0.5]], [[0.6, 0.6], [0.6, 0.4]], [[0.9, 0.9], [0.9, 0.95]]]
    assert [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in histogram.patches] == [
        (0, 0.25, 4),
        (0.25, 0.25, 0),
        (0.5, 0.25, 10),
        (0.75, 0.25, 6),
    ]
    assert "calibration error 0.175" in histogram.get_xlabel()
    assert curve.lines[0].get_xydata().tolist() == [[0.3, 0.95], [0.8, 0.61], [1.0, 0.585]]
    assert "all assigned: 0.585" in curve.get_xlabel()
    assert curve.get_ylim()[0] < 0.585


@pytest.mark.parametrize("n_cells", [1, 7, 999_999, 10_000_000])
def test_calibration_of_few_and_many_cells_stays_in_the_picture(n_cells, drawn, tmp_path):
    table = bins([0, 0, n_cells], [np.nan, np.nan, 1.0], [np.nan, np.nan, 1.0])
    calibration_plot(table, np.ones(1), np.ones(1), 0.0, tmp_path / "calibration.png", "title " * 40)
    figure = drawn[0]
    left, below, right = (axes.get_tightbbox(figure.canvas.get_renderer()) for axes in figure.axes)
    assert min(left.x0, below.x0, below.y0, right.y0) >= 0
    assert max(left.x1, below.x1) < right.x0 < right.x1 <= figure.bbox.width
    assert left.y1 < boxes_inside(figure, figure.texts)[0].y0


def test_calibration_without_predictions_is_empty(drawn, tmp_path):
    none = np.empty(0)
    calibration_plot(bins([0], [np.nan], [np.nan]), none, none, np.nan, tmp_path / "calibration.png", "title")
    assert "all assigned: none" in drawn[0].axes[2].get_xlabel()


def test_confusion_has_labels_in_rows_and_all_that_occurs_in_columns(drawn, tmp_path):
    confusion = np.zeros((5, 6), np.int64)
    confusion[2, [2, 0, 3]] = 5, 3, 2  # lymphocyte: 10 cells
    confusion[3, [3, 2]] = 999, 1  # naive B cell: 1,000
    confusion_plot(confusion, NAMES, REACH, tmp_path / "confusion.png", "title")
    axes = drawn[0].axes[0]
    # B cell is predicted only; neuron and T cell do not occur at all.
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lymphocyte", "naive B cell"]
    columns = {label.get_text(): label.get_color() for label in axes.get_xticklabels()}
    assert list(columns) == ["lymphocyte", "B cell", "naive B cell"]
    assert columns["B cell"] != columns["lymphocyte"] == columns["naive B cell"]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.5, 0.3, 0.2], [0.001, 0, 0.999]])
    assert [text.get_text() for text in axes.texts] == ["10", "1,000", "cells"]


def test_confusion_shows_unassigned_cells_last_and_only_where_there_are_some(drawn, tmp_path):
    confusion = np.array([[3, 1, 0], [0, 2, 2]])
    for last in (confusion, confusion * [1, 1, 0]):
        confusion_plot(last, ["a", "b"], np.eye(2, dtype=np.float32), tmp_path / "confusion.png", "title")
    with_some, without = (figure.axes[0] for figure in drawn)
    assert [label.get_text() for label in with_some.get_xticklabels()] == ["a", "b", "unassigned"]
    np.testing.assert_allclose(with_some.images[0].get_array(), [[0.75, 0.25, 0], [0, 0.5, 0.5]])
    assert [label.get_text() for label in without.get_xticklabels()] == ["a", "b"]


def test_confusion_frames_what_counts_as_right(drawn, tmp_path):
    confusion = np.ones((5, 6), np.int64)
    confusion_plot(confusion, NAMES, REACH, tmp_path / "confusion.png", "title")
    axes = drawn[0].axes[0]
    frames = [path.get_extents() for path in axes.collections[0].get_paths()]
    rows, columns = axes.get_yticklabels(), axes.get_xticklabels()
    in_order = ["lymphocyte", "B cell", "naive B cell", "T cell", "neuron"]
    assert [label.get_text() for label in rows] == in_order
    assert [label.get_text() for label in columns] == [*in_order, "unassigned"]
    for row, column in itertools.product(range(5), range(6)):
        framed = any(frame.contains(column, row) for frame in frames)
        label, prediction = rows[row].get_text(), columns[column].get_text()
        right = prediction in NAMES and REACH[NAMES.index(label), NAMES.index(prediction)] == 1
        assert framed == right, (label, prediction)
    assert len(frames) == 5  # descendants are adjacent here: one frame a label


@pytest.mark.parametrize("n_types", [1, 2, 45])
def test_confusion_of_few_and_many_types_can_be_read(n_types, drawn, tmp_path):
    names = [f"A CELL TYPE WITH A RATHER LONG NAME, such as there are, number {i}" for i in range(n_types)]
    confusion = np.pad(np.eye(n_types, dtype=np.int64), ((0, 0), (0, 1)), constant_values=1_234_567)
    confusion_plot(confusion, names, np.eye(n_types, dtype=np.float32), tmp_path / "confusion.png", "title " * 50)
    figure, (axes, colours) = drawn[0], drawn[0].axes
    rows = boxes_inside(figure, axes.get_yticklabels())
    columns = boxes_inside(figure, axes.get_xticklabels())
    assert all(below.y1 <= above.y0 for above, below in itertools.pairwise(rows))
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(columns))
    counts = boxes_inside(figure, axes.texts)
    assert min(box.x0 for box in counts) >= axes.bbox.x1
    caption, title = sorted(boxes_inside(figure, figure.texts), key=lambda box: box.y0)
    assert max(box.y1 for box in columns) < title.y0
    ticks = boxes_inside(figure, colours.get_xticklabels())
    assert caption.y1 < min(box.y0 for box in ticks)
    assert colours.bbox.y1 < axes.bbox.y0


def draw_performance(path):
    performance_plot(report([0.2, 0.9]), ["a", "b"], path, "title")


def draw_calibration(path):
    calibration_plot(bins([2], [0.5], [0.5]), np.array([0.5, 1]), np.array([1, 0.5]), 0.0, path, "title")


def draw_confusion(path):
    confusion_plot(np.ones((5, 6), np.int64), NAMES, REACH, path, "title")


@pytest.mark.parametrize("draw", [draw_performance, draw_calibration, draw_confusion])
def test_picture_is_a_png_under_its_name_alone(draw, tmp_path):
    import matplotlib.pyplot as plt

    draw(tmp_path / "linear_plot.png")
    assert [path.name for path in tmp_path.iterdir()] == ["linear_plot.png"]
    picture = matplotlib.image.imread(tmp_path / "linear_plot.png")
    assert picture.shape[1] > 600  # at least four inches of 150 dots each
    assert picture.std() > 0
    assert plt.get_fignums() == []  # pyplot is left alone
