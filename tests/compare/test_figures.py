import dataclasses
import itertools
import re

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from comparisons import make_comparison, reachability
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.colors import to_hex, to_rgba
from matplotlib.patches import PathPatch

from hce_jax.compare import figures
from hce_jax.compare.numbers import PUBLISHED, tables
from hce_jax.compare.ontology_figure import (
    ABSENT_COLOUR,
    FURTHER_COLOUR,
    GAIN_COLOUR,
    LOSS_COLOUR,
    colour_limit,
    dag_figure,
    layered_places,
    node_areas,
    ontology_figure,
)
from hce_jax.compare.panels import BEFORE_COLOUR, LOSS_COLOURS, by_class_figure, calibration_figure, overall_figure
from hce_jax.compare.tree_layout import tree_layout, tree_parents
from hce_jax.compare.waterfall import waterfall_figure
from hce_jax.hierarchy import direct_edges

REACH = reachability(10)
NAMES = [f"type {code}" for code in range(10)]
LONG = "A CELL TYPE WITH A RATHER LONG NAME, such as there are, of a tissue, number"


@pytest.fixture(scope="module")
def compared():
    comparison = make_comparison(cells=150, seeds=(1, 2, 3))
    return comparison, tables(comparison)


def texts_inside(figure):
    """Assert that all texts that are drawn are inside the picture and can be read."""
    renderer, (width, height) = figure.canvas.get_renderer(), figure.bbox.size
    figure.draw_without_rendering()
    beyond = set()  # ticks beyond the range of an axis are made but not drawn
    for axes in figure.axes:
        if not axes.axison:
            beyond |= {*axes.get_xticklabels(), *axes.get_yticklabels()}
        for axis, which in ((axes.xaxis, 0), (axes.yaxis, 1)):
            low, high = sorted(axis.get_view_interval())
            beyond |= {label for label in axis.get_ticklabels() if not low <= label.get_position()[which] <= high}
    for text in figure.findobj(mpl.text.Text):
        if text.get_text().strip() and text.get_visible() and text not in beyond:
            box = text.get_window_extent(renderer)
            inside = box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height
            assert inside, (text.get_text(), box)
            assert text.get_fontsize() >= 5.5


def where(table, **values):
    for column, value in values.items():
        table = table[table[column] == value]
    return table


def lines_at(axes):
    """Return the height of each short horizontal line."""
    collections = [each for each in axes.collections if isinstance(each, LineCollection)]
    return [each.get_segments()[0][0, 1] for each in collections]


def test_overall_shows_means_seeds_differences_and_published_values(compared):
    comparison, numbers = compared
    figure, caption = overall_figure(comparison, numbers)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["held-out donors", "new studies"]
    for axes, split in zip(figure.axes, ("id", "ood"), strict=True):
        macro = where(numbers.overall, split=split, average="macro")
        np.testing.assert_allclose(lines_at(axes), 100 * macro["mean"])  # model by model, loss by loss
        seeds = [line for line in axes.lines if line.get_marker() == "o"]
        for line, (model, loss) in zip(seeds, itertools.product(("linear", "mlp"), ("CE", "HCE")), strict=True):
            expected = where(numbers.by_seed, split=split, average="macro", model=model, loss=loss)
            np.testing.assert_allclose(line.get_ydata(), 100 * expected["f1"])
            assert line.get_color() == LOSS_COLOURS[loss == "HCE"]
        diamonds = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "D"]
        assert diamonds == [100 * PUBLISHED[model, "CE", split] for model in ("linear", "mlp")]
        gains = macro.query("loss == 'HCE'")
        for text, (_, gain) in zip(axes.texts, gains.iterrows(), strict=True):
            said = [
                float(number) for number in re.findall(r"[-+]?\d+\.\d", text.get_text().replace("\N{MINUS SIGN}", "-"))
            ]
            np.testing.assert_allclose(said, 100 * gain[["difference", "low", "high"]].astype(float), atol=0.051)
    assert "3 seeds" in caption
    assert "published" in caption


def test_by_class_shows_every_seed_and_the_numbers_of_types(compared):
    comparison, numbers = compared
    figure, _ = by_class_figure(comparison, numbers, "HCE")
    shown = iter(figure.axes)
    for split in ("id", "ood"):
        ranges = []
        for grouping in ("depth", "leaf", "connected"):
            axes = next(shown)
            rows = where(numbers.by_class, split=split, grouping=grouping)
            drawn = np.concatenate([line.get_ydata() for line in axes.lines if line.get_marker() in "os"])
            np.testing.assert_allclose(sorted(drawn), sorted(100 * rows["difference"]))
            ticks = dict(label.get_text().split("\n") for label in axes.get_xticklabels())
            assert ticks == {value: f"({n})" for value, n in zip(rows["value"], rows["n_types"], strict=True)}
            ranges.append(axes.get_ylim())
        assert len(set(ranges)) == 1


def test_calibration_shows_bins_before_and_after(compared):
    comparison, numbers = compared
    figure, caption = calibration_figure(comparison, numbers)
    panels = [*itertools.product(("id", "ood"), ("CE", "HCE"), ("linear", "mlp"))]
    assert len(figure.axes) == len(panels)
    for axes, (split, loss, model) in zip(figure.axes, panels, strict=True):
        assert axes.get_title() == f"{model}, {loss}"
        here = {"split": split, "loss": loss, "model": model}
        for dots, is_scaled in zip(axes.collections, (False, True), strict=True):
            bins = where(numbers.reliability, scaled=is_scaled, **here).query("cells > 0")
            np.testing.assert_allclose(dots.get_offsets(), bins[["confidence", "accuracy"]])
            assert (to_hex(dots.get_facecolor()[0]) == BEFORE_COLOUR) == (not is_scaled)
            areas = dots.get_sizes()
            assert np.argmax(areas) == np.argmax(bins["cells"])
        (ece,) = where(numbers.calibration, **here).itertuples()
        assert axes.texts[0].get_text() == f"ECE {ece.ece_before:.3f} → {ece.ece_after:.3f}\nT = 1.50"
    assert "before and after" in caption


def waterfall_rows(difference, p_holm=None, label=None, n_train=None):
    n = len(difference)
    columns = {"label": label or NAMES[:n], "difference": difference, "p_holm": p_holm or [np.nan] * n}
    return pd.DataFrame(columns | {"n_cells": [1_234_000] * n, "n_train": n_train or [np.nan] * n})


def test_waterfall_is_sorted_and_coloured_by_sign_with_stars_and_numbers():
    rows = waterfall_rows(
        [-0.02, 0.1, np.nan, 0.0], [0.01, 0.049, np.nan, 0.2], ["a", "b", "c", "d"], [1, 20, 30_000, 4_000_000]
    )
    (axes,) = waterfall_figure(rows, "title").axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "d", "a", "c"]
    assert axes.yaxis_inverted()
    bars = sorted(axes.patches, key=lambda bar: bar.get_y())
    np.testing.assert_allclose([bar.get_width() for bar in bars], [10, 0, -2, 0])
    assert to_hex(bars[0].get_facecolor()) == GAIN_COLOUR
    assert to_hex(bars[2].get_facecolor()) == LOSS_COLOUR
    stars = [text for text in axes.texts if text.get_text() == "*"]
    np.testing.assert_allclose([star.xy[0] for star in stars], [10, -2])
    assert [star.get_ha() for star in stars] == ["left", "right"]
    numbers = [text.get_text() for text in axes.texts if text.get_text() != "*"]
    assert numbers == ["1.23M"] * 4 + ["cells"] + ["20", "4M", "1", "30k"] + ["training"]


def test_waterfall_without_training_cells_has_no_column_of_them():
    (axes,) = waterfall_figure(waterfall_rows([0.1, 0.2]), "title").axes
    assert "training" not in [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("n_types", [1, 164])
def test_waterfall_names_do_not_meet_and_fit_on_a_page(n_types):
    names = [f"{LONG[:45] if code % 6 == 0 else 'type'} {code}" for code in range(n_types)]
    rows = waterfall_rows(np.linspace(1, -0.5, n_types).tolist(), [0.001] * n_types, names, [10**7] * n_types)
    figure = waterfall_figure(rows, "title")
    width, height = figure.get_size_inches()
    assert width <= 7.2
    assert height < 11
    shown, renderer = [], figure.canvas.get_renderer()
    texts_inside(figure)
    for axes in figure.axes:
        labels = axes.get_yticklabels()
        boxes = [label.get_window_extent(renderer) for label in labels]
        assert all(below.y1 <= above.y0 + 1 for above, below in itertools.pairwise(boxes))
        shown += [label.get_text().replace("\n", " ") for label in labels]
    assert shown == names


def test_ontology_shows_every_type_by_colour_and_size():
    changes = np.array([10.0, -10, 0, np.nan, 5, 1, 1, 1, 1, 1])
    n_train = 10 ** np.array([2, 3, 4, 5, 2, 2, 2, 2, 2, 0])
    figure = ontology_figure(REACH, NAMES, changes, n_train, "title")
    axes, layout = figure.axes[0], tree_layout(REACH, NAMES)
    (nodes,) = (each for each in axes.collections if isinstance(each, PathCollection))
    np.testing.assert_allclose(nodes.get_offsets(), np.stack([layout.x, layout.y], axis=1))
    colours = [to_hex(colour) for colour in nodes.get_facecolor()]
    assert colours[:2] == [GAIN_COLOUR, LOSS_COLOUR]
    assert colours[2] not in (colours[0], colours[1], colours[3])
    assert colours[3] == ABSENT_COLOUR
    np.testing.assert_allclose(nodes.get_sizes(), node_areas(n_train, 10))
    assert nodes.get_sizes()[0] < nodes.get_sizes()[1] < nodes.get_sizes()[2] < nodes.get_sizes()[3]
    shown = {text.get_text(): text for text in axes.texts}
    assert set(NAMES) <= set(shown)
    for code, name in enumerate(NAMES):
        assert shown[name].get_position()[0] > layout.x[code]
        assert abs(shown[name].get_position()[1] - layout.y[code]) < 0.06
    texts_inside(figure)


def test_ontology_draws_every_edge():
    axes = ontology_figure(REACH, NAMES, np.zeros(10), None, "title").axes[0]
    layout, edges = tree_layout(REACH, NAMES), set()
    of_place = {(x, y): code for code, (x, y) in enumerate(zip(layout.x, layout.y, strict=True))}
    (elbows,) = (each for each in axes.collections if isinstance(each, LineCollection))
    ends = [(segment[0], segment[-1]) for segment in elbows.get_segments()]
    curves = [patch for patch in axes.patches if isinstance(patch, PathPatch)]
    ends += [(curve.get_path().vertices[0], curve.get_path().vertices[-1]) for curve in curves]
    edges = {(of_place[tuple(start)], of_place[tuple(end)]) for start, end in ends}
    assert sorted(edges) == [tuple(edge) for edge in np.argwhere(direct_edges(REACH))]
    assert len(ends) == len(edges)
    assert len(curves) == 1
    assert to_hex(curves[0].get_edgecolor()) == FURTHER_COLOUR


def test_layers_lead_down_and_hold_every_type_once():
    edges = direct_edges(REACH)
    x, y, width, height = layered_places(REACH)
    assert len(set(zip(x, y, strict=True))) == 10
    assert all(y[parent] < y[child] for parent, child in np.argwhere(edges))
    assert y[8] == y[9] > y[:8].max()  # without relatives
    assert 0 < x.min() < x.max() < width
    assert y.max() < height
    figure = dag_figure(REACH, np.zeros(10), None, "title")
    lines = figure.axes[0].collections[0]
    expected = np.array([[(x[parent], y[parent]), (x[child], y[child])] for parent, child in np.argwhere(edges)])
    np.testing.assert_allclose(np.array(lines.get_segments()), expected)
    further = [tree_parents(REACH)[child] != parent for parent, child in np.argwhere(edges)]
    assert [np.allclose(colour, to_rgba(FURTHER_COLOUR)) for colour in lines.get_colors()] == further
    assert sum(further) == 1


def test_colours_end_at_a_multiple_of_five_points():
    assert colour_limit(np.full(3, np.nan)) == colour_limit(np.zeros(4)) == 5
    assert colour_limit(np.array([-12.0, 1])) == 15
    assert colour_limit(np.array([0.0] * 99 + [80])) == 5


def test_each_type_is_drawn_with_its_own_change_in_points(compared, monkeypatch, tmp_path):
    comparison, numbers = compared
    comparison = dataclasses.replace(comparison, models=("mlp",), splits=("ood",))
    given = []
    for name in ("ontology_figure", "dag_figure"):
        draw = getattr(figures, name)
        # Behind the changes stand the training cells and the title.
        monkeypatch.setattr(figures, name, lambda *args, draw=draw: given.append(args[-3]) or draw(*args))
    monkeypatch.setattr(figures, "save", lambda *_: None)
    figures.draw(comparison, numbers, tmp_path)
    rows = where(numbers.per_type, model="mlp", split="ood").set_index("label")
    assert "type 0" not in rows.index  # so that codes are not rows
    expected = [100 * rows["difference"].get(label, np.nan) for label in comparison.labels]
    assert len(given) == 2
    for changes in given:
        np.testing.assert_allclose(changes, expected)


def test_files_are_whole_and_fonts_are_embedded_as_truetype(tmp_path):
    comparison = make_comparison(("mlp",), seeds=(1, 2), splits=("id",), n_types=3, cells=40)
    before = dict(mpl.rcParams)
    drawn = figures.draw(comparison, tables(comparison), tmp_path)
    names = ["overall", "waterfall_mlp_id", "ontology_mlp_id", "dag_mlp_id", "by_class", "calibration"]
    assert [figure.name for figure in drawn] == names
    assert {path.name for path in tmp_path.iterdir()} == {f"{n}{s}" for n in names for s in (".png", ".pdf")}
    for figure in drawn:
        pixels = matplotlib.image.imread(tmp_path / f"{figure.name}.png")
        assert pixels.shape[1] <= 7.2 * 200
        written = (tmp_path / f"{figure.name}.pdf").read_bytes()
        assert written.rstrip().endswith(b"%%EOF")
        assert b"/Type3" not in written
        assert b"/Type0" in written or b"/TrueType" in written
        assert figure.caption.endswith("Trained on: a store in memory.")
    assert dict(mpl.rcParams) == before


#: What to change in two models, two losses, two seeds, id and ood.
AWKWARD = {
    "one seed": {"models": ("mlp",), "seeds": (1,)},
    "two types without temperature or training cells": {
        "models": ("mlp",),
        "n_types": 2,
        "temperature": None,
        "n_train": False,
    },
    "three losses": {"models": ("mlp",), "losses": ("CE", "HCE", "HCE (epsilon 0.001)"), "splits": ("id",)},
    "no difference at all": {"models": ("linear",), "gain": 0.0, "n_types": 4},
    "long names": {"models": ("mlp",), "splits": ("id",), "n_types": 40},
}


@pytest.mark.parametrize("case", AWKWARD)
def test_awkward_comparisons_are_drawn_inside_their_pictures(case, monkeypatch, tmp_path):
    saved = {}
    monkeypatch.setattr(figures, "save", lambda figure, path, _: saved.update({path.stem: figure}))
    comparison = make_comparison(**({"seeds": (1, 2), "cells": 60} | AWKWARD[case]))
    if case == "long names":
        comparison = dataclasses.replace(comparison, labels=tuple(f"{LONG} {code}" for code in range(40)))
    numbers = tables(comparison)
    if case == "no difference at all":
        numbers = numbers._replace(per_type=numbers.per_type.assign(difference=0.0))
    drawn = figures.draw(comparison, numbers, tmp_path)
    assert [figure.name for figure in drawn] == list(saved)
    for figure in saved.values():
        texts_inside(figure)
    captions = " ".join(figure.caption for figure in drawn)
    if case == "one seed":
        assert "With one seed there is no test" in captions
    if case == "three losses":
        assert {"waterfall_mlp_id_hce", "waterfall_mlp_id_hce_epsilon_0_001", "by_class_hce"} <= set(saved)
    if case.startswith("two types"):
        assert "numbers of training cells are not known" in captions
        assert "No temperature was fitted" in captions
