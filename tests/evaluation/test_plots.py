import itertools

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from hce_jax.evaluation.plots import performance_plot


def report(f1, support=None, codes=None):
    support = [10.0] * len(f1) if support is None else support
    codes = range(len(f1)) if codes is None else codes
    return pd.DataFrame({"f1-score": f1, "support": support}, index=[str(code) for code in codes])


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


@pytest.mark.parametrize("n_types", [1, 5, 50, 164])
def test_no_name_meets_another_or_leaves_the_picture(n_types, drawn, tmp_path):
    names = [f"a cell type with a rather long name, such as there are, number {i}" for i in range(n_types)]
    performance_plot(report(np.linspace(1, 0, n_types)), names, tmp_path / "plot.png", "title")
    figure = drawn[0]
    renderer = figure.canvas.get_renderer()
    boxes = [label.get_window_extent(renderer) for label in figure.axes[0].get_yticklabels()]
    assert min(box.x0 for box in boxes) >= 0
    assert all(below.y1 <= above.y0 for above, below in itertools.pairwise(boxes))


def test_picture_is_a_png_under_its_name_alone(tmp_path):
    performance_plot(report([0.2, 0.9]), ["a", "b"], tmp_path / "linear_performance_plot.png", "title")
    assert [path.name for path in tmp_path.iterdir()] == ["linear_performance_plot.png"]
    picture = matplotlib.image.imread(tmp_path / "linear_performance_plot.png")
    assert picture.shape[1] > 750  # five inches of bars at 150 dots each
    assert picture.std() > 0


def test_drawing_leaves_pyplot_alone(tmp_path):
    import matplotlib.pyplot as plt

    performance_plot(report([0.5]), ["a"], tmp_path / "plot.png", "title")
    assert plt.get_fignums() == []
