import collections
import csv

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from hce_jax.store.summary import SUMMARY_COLUMNS, data_summary, summary_plot, write_summary

SPLITS = ("train", "val", "test")


def cells(n_cells=500, n_types=4, n_samples=7, name="{column} {code}", n_tissues=3):
    """Cells of which each tech_sample lies in one study and one split; no cell has the last label of a column."""
    rng = np.random.default_rng(3)
    sample = rng.choice(n_samples, n_cells, p=rng.dirichlet(np.ones(n_samples)))
    sizes = {"cell_type": n_types, "tissue_general": n_tissues}
    codes = {column: rng.integers(sizes.get(column, 3), size=n_cells) for column in SUMMARY_COLUMNS}
    codes |= {"cell_type": np.arange(n_cells) % n_types, "tech_sample": sample, "dataset_id": sample // 2}
    obs = {}
    for column, code in codes.items():
        labels = [name.format(column=column, code=each) for each in range(code.max() + 2)]
        obs[column] = pd.Categorical.from_codes(code, labels)
    return pd.DataFrame(obs | {"split": pd.Categorical(np.take(SPLITS, sample % 3), SPLITS)})


@pytest.fixture
def drawn(monkeypatch):
    """Collect the figures that are saved."""
    figures, save = [], Figure.savefig

    def savefig(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return figures


def test_cells_are_counted_by_column_label_and_split():
    obs = cells()
    expected = collections.Counter()
    for row in obs.astype(str).to_dict("records"):
        for column in SUMMARY_COLUMNS:
            expected.update([(column, row[column], row["split"]), (column, row[column], "total")])
    table = data_summary(obs)
    found = {
        (row["column"], row["label"], split): row[split]
        for row in table.to_dict("records")
        for split in (*SPLITS, "total")
        if row[split]
    }
    assert found == dict(expected)
    assert (table["total"] > 0).all()  # labels that no cell has are left out


def test_rows_follow_the_columns_then_the_number_of_cells_then_the_codes():
    table = data_summary(cells(n_cells=402, n_types=4))
    assert list(dict.fromkeys(table["column"])) == list(SUMMARY_COLUMNS)
    assert all((rows["total"].diff().dropna() <= 0).all() for _, rows in table.groupby("column"))
    types = table[table["column"] == "cell_type"]
    assert types["total"].tolist() == [101, 101, 100, 100]
    assert types["label"].tolist() == [f"cell_type {code}" for code in range(4)]


def test_types_have_the_number_of_their_tech_samples_and_studies_the_others_have_none():
    obs = cells(n_cells=60, n_types=6, n_samples=9, name="{code}")  # a type and an assay have the same name
    table = data_summary(obs)
    types = table[table["column"] == "cell_type"].set_index("label")
    for column, name in (("tech_sample", "tech_samples"), ("dataset_id", "studies")):
        expected = {label: len({*rows[column]}) for label, rows in obs.groupby("cell_type", observed=True)}
        assert types[name].to_dict() == expected
        assert len({*expected.values()}) > 1
        assert table.loc[table["column"] != "cell_type", name].isna().all()


def test_a_split_may_be_absent_or_stand_in_another_order():
    obs = cells()
    obs = obs[obs["split"] != "val"].copy()
    obs["split"] = obs["split"].cat.set_categories(["test", "train"])
    table = data_summary(obs)
    rows = table[table["column"] == "assay"]
    assert rows[["train", "val", "test"]].sum().tolist() == [*(obs["split"].value_counts()[["train"]]), 0,
                                                            (obs["split"] == "test").sum()]  # fmt: skip


@pytest.mark.parametrize("column", ["split", "disease"])
def test_a_cell_without_a_label_is_refused(column):
    obs = cells()
    obs.loc[3, column] = np.nan
    with pytest.raises(ValueError, match=f"a cell has no {column}"):
        data_summary(obs)


def test_table_and_picture_are_written(tmp_path, drawn):
    table = data_summary(cells())
    write_summary(tmp_path, table)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data_summary.csv", "data_summary.png"]
    with (tmp_path / "data_summary.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    assert [*rows[0]] == ["column", "label", *SPLITS, "total", "tech_samples", "studies"]
    assert [row["label"] for row in rows] == table["label"].tolist()
    assert [int(row["total"]) for row in rows] == table["total"].tolist()
    assert {row["studies"] == "" for row in rows if row["column"] != "cell_type"} == {True}
    assert matplotlib.image.imread(tmp_path / "data_summary.png").std() > 0
    n_samples, n_studies = ((table["column"] == column).sum() for column in ("tech_sample", "dataset_id"))
    assert drawn[0].texts[0].get_text() == f"500 cells, 4 cell types, {n_studies} studies, {n_samples} tech_samples"


def test_bars_marks_and_numbers_stand_at_the_cells_of_their_type(tmp_path, drawn):
    table = data_summary(cells(n_cells=10, n_types=6, n_samples=4))
    types = table[table["column"] == "cell_type"].reset_index(drop=True)
    summary_plot(table, tmp_path / "plot.png", "title")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == types["label"].tolist()
    assert [bar.get_width() for bar in axes.patches[:6]] == types["total"].tolist()
    assert axes.get_xscale() == "log"
    assert axes.yaxis_inverted()
    for marks in axes.get_lines():
        x, y = marks.get_data()
        rows = types[types[marks.get_label()] > 0]
        assert (x.tolist(), np.rint(y).tolist()) == (rows[marks.get_label()].tolist(), rows.index.tolist())
    assert {marks.get_label() for marks in axes.get_lines()} == {split for split in SPLITS if types[split].any()}
    numbers = [text.get_text() for text in axes.texts]
    assert numbers == [
        str(each) for name in ("total", "tech_samples", "studies")
        for each in ("cells" if name == "total" else name, *types[name])
    ]  # fmt: skip


@pytest.mark.parametrize(("n_types", "n_tissues"), [(1, 1), (5, 60), (164, 3)])
def test_no_text_meets_another_or_leaves_the_picture(n_types, n_tissues, drawn, tmp_path, monkeypatch):
    texts, draw = {}, Text.draw

    def note(self, renderer, *args, **kwargs):
        if self.get_text() and self.get_visible():
            texts[self] = self.get_window_extent(renderer).extents
        draw(self, renderer, *args, **kwargs)

    monkeypatch.setattr(Text, "draw", note)
    name = "{column} {code} " + "with a rather long name, such as there are, WWW, in all eighty characters here"
    obs = cells(n_cells=5000, n_types=n_types, n_tissues=n_tissues, n_samples=40, name=name)
    summary_plot(data_summary(obs), tmp_path / "plot.png", "title")
    height, width, _ = matplotlib.image.imread(tmp_path / "plot.png").shape
    names, boxes = [text.get_text() for text in texts], np.array([*texts.values()])
    assert names.count(obs["cell_type"].iloc[0]) == 1
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] <= (width, height)).all()
    low, high = boxes[:, None, :2] + 1, boxes[None, :, 2:]  # boxes of neighbouring rows may touch
    meet = ((low < high) & (low.transpose(1, 0, 2) < high.transpose(1, 0, 2))).all(axis=2)
    np.fill_diagonal(meet, False)
    assert not [(names[one], names[other]) for one, other in np.argwhere(meet)]


def test_a_small_panel_sums_up_what_it_has_no_room_for(drawn, tmp_path):
    table = data_summary(cells(n_cells=900, n_tissues=30))
    summary_plot(table, tmp_path / "plot.png", "title")
    tissues = table[table["column"] == "tissue_general"]
    axes = drawn[0].axes[1]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [*tissues["label"][:19], "11 others together"]
    assert [bar.get_width() for bar in axes.patches] == [*tissues["total"][:19], tissues["total"][19:].sum()]


def test_tech_samples_are_all_in_the_histogram(drawn, tmp_path):
    table = data_summary(cells(n_samples=30))
    summary_plot(table, tmp_path / "plot.png", "title")
    samples = table.loc[table["column"] == "tech_sample", "total"]
    assert sum(bar.get_height() for bar in drawn[0].axes[3].patches) == len(samples)
    assert f"median, {samples.median():,.0f})" in drawn[0].axes[3].get_xlabel()


def test_drawing_leaves_pyplot_alone(tmp_path):
    import matplotlib.pyplot as plt

    summary_plot(data_summary(cells()), tmp_path / "plot.png", "title")
    assert plt.get_fignums() == []
