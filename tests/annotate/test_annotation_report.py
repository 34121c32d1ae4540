import base64
import io
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb

from hce_jax.annotate import report_pictures
from hce_jax.annotate.report import ReportInput, write_report
from hce_jax.errors import StoreError
from hce_jax.preprocess.scale import Scale

VOID = {"meta", "img"}  # what of the page has no end tag


class Node:
    def __init__(self, tag, attributes=(), parent=None):
        self.tag, self.attributes, self.parent, self.content = tag, dict(attributes), parent, []

    @property
    def children(self):
        return [each for each in self.content if isinstance(each, Node)]

    @property
    def classes(self):
        return self.attributes.get("class", "").split()

    @property
    def text(self):
        text = "".join(each.text if isinstance(each, Node) else each for each in self.content)
        return text.replace("\N{NO-BREAK SPACE}", " ")

    def all(self, tag, class_=None):
        found = [each for child in self.children for each in child.all(tag, class_)]
        return [self, *found] if tag == self.tag and (class_ is None or class_ in self.classes) else found


class Tree(HTMLParser):
    """The elements of a page, each closed before the one that it stands in."""

    def __init__(self, page):
        super().__init__()
        self.root = self.open = Node("root")
        self.feed(page)
        self.close()
        assert self.open is self.root, f"<{self.open.tag}> stays open"

    def handle_starttag(self, tag, attributes):
        node = Node(tag, attributes, self.open)
        self.open.content.append(node)
        self.open = self.open if tag in VOID else node

    def handle_endtag(self, tag):
        assert tag == self.open.tag, f"</{tag}> in <{self.open.tag}>"
        self.open = self.open.parent

    def handle_data(self, data):
        self.open.content.append(data)


# 5 is below both 1 and 2, which are below 0; 4 is alone; 6, below 3, is given to no cell.
LABELS = ("lymphocyte", "T cell", "memory cell", "B cell", "neuron", "memory T cell", "naive B cell")
CL_IDS = tuple(f"CL:000000{code}" for code in range(7))
ABOVE = {0: {0}, 1: {0, 1}, 2: {0, 2}, 3: {0, 3}, 4: {4}, 5: {0, 1, 2, 5}, 6: {0, 3, 6}}
REACH = np.array([[float(i in ABOVE[j]) for j in range(7)] for i in range(7)], np.float32)
DEPTH = {code: len(above) - 1 for code, above in ABOVE.items()}
INPUT = {
    "matrix": "raw",
    "scale": "raw counts",
    "genes_by": "the index of var, as Ensembl ids",
    "genes_found": 900,
    "genes_of_model": 1000,
    "share_of_counts": 0.97,
    "warnings": [],
    "notes": [],
}
ABOUT = {
    "versions": {"hce_jax": "0.1.0"},
    "time": "2026-01-01T00:00:00+00:00",
    "model": "linear, cross entropy",
    "ontology_release": "v2026-03-26",
    "types": list(LABELS),
    "confidence": 0.6,
    "input": INPUT,
}
CALIBRATION = "calibrated on 900 cells of 4 donors"
PROMISE = {"max_error": 0.05, "thresholds": [0.7, 0.8, np.inf, 0.9], "calibration": CALIBRATION}


def cells(n_cells=400, **changes):
    rng = np.random.default_rng(7)
    codes = rng.choice([-1, 0, 1, 2, 3, 4, 5], n_cells, p=[0.1, 0.1, 0.2, 0.05, 0.2, 0.05, 0.3])
    confidence = np.where(codes < 0, 0, rng.uniform(0.6, 1, n_cells)).astype(np.float32)
    leaves = np.where(rng.random(n_cells) < 0.5, np.maximum(codes, 4), rng.choice(7, n_cells))
    return ReportInput(
        **{
            "title": "cells.h5ad",
            "about": ABOUT,
            "labels": LABELS,
            "cl_ids": CL_IDS,
            "reachability": REACH,
            "codes": codes.astype(np.int16),
            "confidence": confidence,
            "leaf_codes": leaves.astype(np.int16),
            "leaf_confidence": rng.uniform(0.1, 1, n_cells).astype(np.float32),
            "barcodes": pd.Index([f"cell {row}" for row in range(n_cells)]),
            "picture": None,
            "groups": None,
            "explanation": [],
        }
        | changes
    )


def about(**changes):
    return ABOUT | {"input": INPUT | changes}


def read(report, tmp_path):
    write_report(tmp_path / "report.html", report)
    return Tree((tmp_path / "report.html").read_text(encoding="utf-8")).root


def chapter(page, title):
    """What stands between a heading and the next one of its size."""
    (main,) = page.all("main")
    chapters, found = [], Node("chapter")
    for each in main.children:
        if each.tag == "h2":
            chapters.append(found := Node("chapter"))
        found.content.append(each)
    return next(each for each in chapters if each.children[0].text == title)


def rows_below(page, title):
    """The cells of the table that follows a small heading."""
    (main,) = page.all("main")
    titles = [each.text if each.tag in ("h2", "h3") else None for each in main.children]
    after = main.children[titles.index(title) :]
    table = next(each for each in after if "scroll" in each.classes)
    return [[cell.text for cell in row.all("td")] for row in table.all("tr") if row.all("td")]


def frame(report):
    names = np.array([*report.labels, "unassigned"])
    columns = {"label": names[report.codes], "leaf": names[report.leaf_codes], "confidence": report.confidence}
    return pd.DataFrame(columns | {"code": report.codes, "leaf_code": report.leaf_codes}, index=report.barcodes)


GROUPS = pd.DataFrame(
    {
        "group": ["0", "1", "2"],
        "cells": [1234, 20, 3],
        "label": ["T cell", "unassigned", "neuron"],
        "agreement": [0.9, 0.0, 0.7],
        "unassigned": [0.05, 1.0, 0.0],
    }
)
POINTS = np.random.default_rng(3).normal(size=(400, 2)).astype(np.float32)
NONE = {"codes": np.full(9, -1), "confidence": np.zeros(9)}
SCRIPT = """<script>alert("1 & 2")</script>&lt;'</style>"""
CASES = {
    "everything": {
        "groups": GROUPS,
        "explanation": ["T cell and not B cell: CD3D"],
        "about": ABOUT | PROMISE,
        "picture": ("X_umap", POINTS),
    },
    "no label": {"n_cells": 9, **NONE, "picture": ("X_umap", POINTS[:9])},
    "no label and no most probable type": {"n_cells": 9, **NONE, "leaf_codes": np.full(9, -1)},
    "no label of a promise": {"n_cells": 9, **NONE, "about": ABOUT | PROMISE},
    "one cell": {"n_cells": 1, "picture": ("X_umap", POINTS[:1])},
    "no cell": {"n_cells": 0},
    "cells without a place": {"picture": ("X_umap", np.full((400, 2), np.nan))},
    "no hierarchy": {"reachability": np.eye(7)},
    "text that is markup": {
        "title": SCRIPT,
        "labels": (SCRIPT, *LABELS[1:]),
        "cl_ids": (SCRIPT, *CL_IDS[1:]),
        "barcodes": pd.Index([f"{SCRIPT}{row}" for row in range(400)]),
        "picture": (SCRIPT, np.zeros((400, 2))),
        "groups": GROUPS.assign(group=SCRIPT, label=SCRIPT),
        "explanation": [SCRIPT],
        "about": {**about(scale=SCRIPT, warnings=[SCRIPT], notes=[SCRIPT]), SCRIPT: SCRIPT, "model": SCRIPT},
    },
}


@pytest.mark.parametrize("case", CASES)
def test_page_is_well_nested_and_asks_for_nothing_from_elsewhere(case, tmp_path):
    page = read(cells(**CASES[case]), tmp_path)
    for node in (each for tag in ("script", "link", "iframe", "object", "base", "a") for each in page.all(tag)):
        raise AssertionError(node.tag)
    nodes = [page]
    for node in nodes:
        nodes += node.children
        for name, value in node.attributes.items():
            assert not name.startswith("on")
            assert name != "src" or value.startswith("data:image/png;base64,")
            assert name != "style" or "url(" not in value
    (style,) = page.all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    (rule,) = (each for each in page.all("meta") if "http-equiv" in each.attributes)
    assert rule.attributes["content"].startswith("default-src 'none'")


def test_text_of_the_user_stands_as_it_is(tmp_path):
    page = read(cells(**CASES["text that is markup"]), tmp_path)
    (title,), (heading,) = page.all("title"), page.all("h1")
    assert title.text == heading.text == f"Cell types of {SCRIPT}"
    (main,) = page.all("main")
    texts = [each.text for tag in ("td", "li", "p", "figcaption") for each in main.all(tag)]
    for beginning in (SCRIPT, f"Annotated by a model ({SCRIPT})", f"{SCRIPT}, as it is in the file"):
        assert any(text.startswith(beginning) for text in texts), beginning
    assert any(f"most often {SCRIPT}" in text for text in texts)


def test_file_name_that_is_no_text_can_be_written(tmp_path):
    write_report(tmp_path / "report.html", cells(5, title="cells\udcff.h5ad"))
    assert "cells&#56575;.h5ad" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_same_input_gives_the_same_bytes(tmp_path):
    for name in ("first.html", "second.html"):
        write_report(tmp_path / name, cells(groups=GROUPS, picture=("X_umap", POINTS)))
    assert (tmp_path / "first.html").read_bytes() == (tmp_path / "second.html").read_bytes()


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(StoreError, match="no_folder"):
        write_report(tmp_path / "no_folder" / "report.html", cells(5))
    assert list(tmp_path.iterdir()) == []


def test_summary_counts_cells_and_labels(tmp_path):
    report = cells()
    table, page = frame(report), read(report, tmp_path)
    n_none = (table.label == "unassigned").sum()
    (figures,) = page.all("div", "figures")
    assert [each.text for each in figures.children] == [
        "400cells",
        f"{400 - n_none}with a label ({(400 - n_none) / 4:.1f} %)",
        "6different labels",
        f"{n_none}unassigned ({n_none / 4:.1f} %)",
    ]
    n_finest = table.label.isin(["neuron", "memory T cell", "naive B cell"]).sum()
    fine = next(each.text for each in page.all("p") if "as fine as" in each.text)
    assert fine.startswith(f"{100 * n_finest / (400 - n_none):.1f} % of the labels")
    assert f"({n_finest} cells)" in fine


def test_promise_is_made_only_where_there_is_a_calibration(tmp_path):
    promised = read(cells(about=ABOUT | PROMISE), tmp_path).text
    assert "Of the labels at most 5 % should be wrong: calibrated on 900 cells of 4 donors." in promised
    plain = read(cells(), tmp_path).text
    assert "No error is promised." in plain
    assert "hold at least 0.6 of the probability" in plain
    assert "should be wrong" not in plain


def test_warnings_stand_on_top_and_nowhere_else(tmp_path):
    page = read(cells(about=about(warnings=["few genes", "empty cells"])), tmp_path)
    (main,) = page.all("main")
    (box,) = page.all("section", "warnings")
    assert [each.text for each in box.all("li")] == ["few genes", "empty cells"]
    assert main.children.index(box) < main.children.index(page.all("div", "figures")[0])
    assert not read(cells(), tmp_path).all("section", "warnings")


@pytest.mark.parametrize(
    ("changes", "mark", "words"),
    [
        ({"genes_found": 800}, "fine", "800 of 1,000 (80.0 %)"),
        ({"genes_found": 799}, "look", "799 of 1,000 (79.9 %)"),
        ({"genes_found": 499}, "bad", "499 of 1,000 (49.9 %)"),
        ({"share_of_counts": 0.99996}, "fine", ">99.9 %"),
        ({"share_of_counts": 0.6}, "look", "60.0 %"),
        ({"share_of_counts": 0.0}, "bad", "0 %"),
        ({"species": "human"}, "fine", "human"),
        ({"scale": Scale("raw counts", "X", "counts").words}, "fine", "raw counts"),
        (
            {"scale": Scale("ln(1 + x)", "X", "multiples", (np.e,)).words},
            "fine",
            "ln(1 + x), taken back to whole counts",
        ),
        ({"scale": Scale("TPM", "X", "proportional").words}, "look", "TPM"),
    ],
)
def test_checks_are_marked(changes, mark, words, tmp_path):
    page = read(cells(about=about(**changes)), tmp_path)
    rows = {row[2]: row[0] for row in rows_below(page, "Checks")}
    assert rows[words].endswith(mark)


@pytest.mark.parametrize(("mass", "mark"), [(0.96, "fine"), (0.92, "look"), (0.8, "bad")])
def test_labels_expected_to_be_wrong_are_held_against_the_promise(mass, mark, tmp_path):
    sure = np.where(cells().codes < 0, 0, mass).astype(np.float32)
    rows = rows_below(read(cells(about=ABOUT | PROMISE, confidence=sure), tmp_path), "Checks")
    words = f"{100 * (1 - mass):.1f} % of those that can be judged, if the confidence holds for these cells"
    found = [row[0][2:] for row in rows if row[1] == "labels expected to be wrong" and row[2].startswith(words)]
    assert found == [mark]


@pytest.mark.parametrize(
    ("mass", "of_input", "hardly_judged", "mark"),
    [
        (0.96, {}, 0.1, "fine"),
        (0.96, {}, 0.11, "look"),
        (0.8, {}, 0.11, "bad"),
        (0.96, {"genes_found": 499}, 0.0, "look"),
        (0.96, {"share_of_counts": 0.4}, 0.0, "look"),
        (0.96, {"share_of_counts": 0.6}, 0.0, "fine"),
    ],
)
def test_what_is_expected_to_be_wrong_is_not_fine_where_it_can_hardly_be_known(
    mass, of_input, hardly_judged, mark, tmp_path
):
    sure = np.where(cells().codes < 0, 0, mass).astype(np.float32)
    promised = about(**of_input) | PROMISE | {"hardly_judged": hardly_judged}
    rows = {row[1]: row for row in rows_below(read(cells(about=promised, confidence=sure), tmp_path), "Checks")}
    sign, _, words = rows["labels expected to be wrong"]
    assert sign[2:] == mark
    assert f"Of {100 * hardly_judged:.1f} % of the".replace(" 0.0", " 0") in words


@pytest.mark.parametrize(("n_labelled", "mark"), [(8, "fine"), (7, "look"), (4, "bad")])
def test_cells_without_a_label_are_seen(n_labelled, mark, tmp_path):
    codes = np.where(np.arange(10) < n_labelled, 1, -1)
    rows = rows_below(read(cells(10, codes=codes), tmp_path), "Checks")
    assert [row[0][2:] for row in rows if row[2] == f"{n_labelled} of 10 ({10 * n_labelled}.0 %)"] == [mark]


def test_tree_counts_each_type_once_below_one_of_its_parents(tmp_path):
    report = cells()
    table, page = frame(report), read(report, tmp_path)
    found, parents, bars = {}, {}, {}
    for item in chapter(page, "Labels on the ontology").all("li")[1:-1]:
        row = item.children[0]
        name, bar, own, below = row.children
        label = name.content[0].strip()
        assert label not in found
        found[label] = int(own.text), int(below.text)
        above = item.parent.parent
        parents[label] = above.children[0].children[0].content[0].strip() if above.tag == "li" else None
        widths = {each.attributes["class"]: each.attributes["style"] for each in bar.children}
        bars[label] = [float(re.findall(r"[\d.]+", widths.get(kind, "0"))[0]) for kind in ("own", "below")]
    expected = {}
    for code, label in enumerate(LABELS):
        below = [LABELS[each] for each, above in ABOVE.items() if code in above]
        expected[label] = int((table.label == label).sum()), int(table.label.isin(below).sum())
    del expected["naive B cell"]  # no cell
    assert found == expected
    assert list(found) == ["lymphocyte", "T cell", "memory T cell", "memory cell", "B cell", "neuron"]
    roots = {"lymphocyte": None, "neuron": None}
    children = dict.fromkeys(["T cell", "memory cell", "B cell"], "lymphocyte")
    assert parents == {**roots, **children, "memory T cell": "T cell"}
    most = expected["lymphocyte"][1]
    for label, (own, below) in expected.items():
        np.testing.assert_allclose(bars[label], [100 * own / most, 100 * (below - own) / most], atol=0.005)
    assert "memory T cell CL:0000005; also below memory cell" in page.text
    last = chapter(page, "Labels on the ontology").all("li")[-1].children[0]
    assert [last.children[0].text, last.children[2].text] == ["unassigned", str((table.label == "unassigned").sum())]


def test_bar_of_most_cells_fills_its_room(tmp_path):
    codes = np.repeat([-1, 0, 4], [300, 60, 40])
    rows = chapter(read(cells(codes=codes), tmp_path), "Labels on the ontology").all("li")[1:]
    bars = [row.children[0].children[1].children[0].attributes["style"] for row in rows]
    assert bars == ["width:20.00%", "width:13.33%", "width:100.00%"]


def test_histograms_count_no_cell_without_a_label(tmp_path):
    report = cells(reachability=np.eye(7))
    (figure,) = chapter(read(report, tmp_path), "How sure are the labels?").all("figure")
    assert figure.text.startswith(f"Depth 0: {np.count_nonzero(report.codes >= 0)} cells")


def test_histograms_count_the_the_confidence_of_each_depth(tmp_path):
    report = cells(about=ABOUT | PROMISE | {"confidence": 0.6})
    table = frame(report)
    found = chapter(read(report, tmp_path), "How sure are the labels?")
    depth = table.code.map(DEPTH)
    for each, figure in zip([0, 1, 3], found.all("figure"), strict=True):  # no cell is of depth 2
        here = table[depth == each]
        caption = f"Depth {each}: {len(here)} cells, most often {here.label.mode()[0]}; mean "
        assert figure.children[0].text.startswith(caption)
        mean = float(figure.children[0].text[len(caption) :])
        assert 0 <= here.confidence.astype(float).mean() - mean < 0.01  # cut off
        heights = [float(bar.attributes["height"]) for bar in figure.all("rect")]
        counts = pd.cut(here.confidence, np.arange(21) / 20, right=False).value_counts(sort=False).to_numpy()
        counts = counts[counts > 0]
        np.testing.assert_allclose(heights, 70 * counts / counts.max(), atol=0.051)
        (line,) = figure.all("line", "threshold")
        axis = next(line for line in figure.all("line") if not line.classes)
        left, right = float(axis.attributes["x1"]), float(axis.attributes["x2"])
        assert float(line.attributes["x1"]) == pytest.approx(left + 0.6 * (right - left), abs=0.06)
    assert "No label is given at depth 2:" in found.text
    assert "A label needs at least 0.6 (dashed)." in found.text


def image(figure):
    (node,) = figure.all("img")
    png = base64.b64decode(node.attributes["src"].removeprefix("data:image/png;base64,"))
    return matplotlib.image.imread(io.BytesIO(png))[..., :3]


def colours(picture):
    """The colours of a picture, each as red, green and blue up to 255, with the number of its pixels."""
    values, counts = np.unique((255 * picture).round().astype(int) @ [65536, 256, 1], return_counts=True)
    return {(v >> 16, v >> 8 & 255, v & 255): count for v, count in zip(values.tolist(), counts.tolist(), strict=True)}


def test_cells_have_the_colour_of_their_label_and_the_legend_its_cells(tmp_path):
    # Three clouds, of labels 5 (60 cells), 1 (30) and none (10), left to right; at the same height.
    codes = np.repeat([5, 1, -1], [60, 30, 10])
    places = np.repeat([0.0, 5, 10], [60, 30, 10]) + np.tile([-0.5, 0.5], 50)
    confidence = np.repeat([1.0, 0.5, 0.0], [60, 30, 10])
    points = np.column_stack([places, np.tile([0, 0, 1, 1], 25)])
    report = cells(100, codes=codes, confidence=confidence, picture=("X_pca", points))
    figures = chapter(read(report, tmp_path), "Where the cells lie").all("figure")
    by_label, by_confidence = (image(figure) for figure in figures)
    legend = [(each.children[0].text, each.content[1]) for each in figures[0].all("li")]
    assert legend == [("1", "memory T cell, 60"), ("2", "T cell, 30"), (" ", "unassigned, 10")]
    swatches = [each.attributes["style"].removeprefix("background:") for each in figures[0].all("span", "swatch")]
    thirds = np.array_split(by_label, 3, axis=1)
    for third, swatch in zip(thirds, swatches, strict=True):
        seen = colours(third)
        wanted = [tuple(int(255 * part + 0.5) for part in to_rgb(each)) for each in swatches]
        here = tuple(int(255 * part + 0.5) for part in to_rgb(swatch))
        assert [each for each in wanted if seen.get(each, 0) > 20] == [here]
    dark, orange, grey = (colours(third) for third in np.array_split(by_confidence, 3, axis=1))
    assert dark[(13, 8, 135)] > 20  # plasma's first colour
    red, green, blue = max((each for each in orange if each != (255, 255, 255)), key=orange.get)
    assert red > green > blue
    assert grey[(180, 180, 180)] > 20


def test_labels_beyond_the_colours_are_others(monkeypatch, tmp_path):
    monkeypatch.setattr(report_pictures, "COLOURS", report_pictures.COLOURS[:2])
    report = cells(picture=("X_umap", POINTS))
    counts = frame(report).label[lambda label: label != "unassigned"].value_counts()
    figure = chapter(read(report, tmp_path), "Where the cells lie").all("figure")[0]
    texts = [each.content[1] for each in figure.all("li")]
    assert texts[:2] == [f"{label}, {count}" for label, count in counts[:2].items()]
    assert texts[2] == f"4 other labels, {counts[2:].sum()}"


def test_of_many_cells_some_are_drawn_and_all_are_counted(monkeypatch, tmp_path):
    monkeypatch.setattr(report_pictures, "_MOST_POINTS", 30)
    drawn = []
    monkeypatch.setattr(report_pictures, "_draw", lambda points, *_: drawn.append(points) or "data:image/png;base64,")
    points = np.column_stack([np.arange(400.0), np.arange(400) ** 2.0])
    points[7] = np.nan
    found = chapter(read(cells(picture=("X_tsne", points)), tmp_path), "Where the cells lie")
    assert "t-SNE, as it is in the file; 30 of 399 cells, chosen at random." in found.text
    assert [len(each) for each in drawn] == [30, 30]
    assert len(np.unique(drawn[0][:, 0])) == 30
    np.testing.assert_array_equal(drawn[0][:, 0] ** 2, drawn[0][:, 1])
    assert sum(int(each.content[1].rsplit(", ")[1]) for each in found.all("figure")[0].all("li")) == 400


def test_clusters_are_ranked_by_agreement(tmp_path):
    rows = rows_below(read(cells(groups=GROUPS), tmp_path), "Clusters, the most mixed first")
    assert rows == [
        ["✗ bad", "1", "20", "unassigned", "0 %", "100 %"],
        ["● look", "2", "3", "neuron", "70.0 %", "0 %"],
        ["✓ fine", "0", "1,234", "T cell", "90.0 %", "5.0 %"],
    ]


def test_labels_are_ranked_by_the_cells_whose_most_probable_type_is_another(tmp_path):
    report = cells(leaf_codes=np.where(np.arange(400) % 50 == 0, -1, cells().leaf_codes))
    table = frame(report)
    rows = rows_below(read(report, tmp_path), "Labels that are not the most probable type")
    others = table[(table.label != table.leaf) & (table.leaf_code >= 0)]

    def kind(row):
        if row.code < 0 or row.code in ABOVE[row.leaf_code]:
            return "finer"
        return "wider" if row.leaf_code in ABOVE[row.code] else "elsewhere"

    kinds = others.apply(kind, axis=1)
    expected = pd.crosstab(others.label, kinds)
    assert set(expected.columns) == {"finer", "wider", "elsewhere"}
    cells_of = table.label.value_counts()
    assert {row[0]: [int(each) for each in row[1:5]] for row in rows} == {
        label: [cells_of[label], *expected.loc[label, ["finer", "wider", "elsewhere"]]] for label in expected.index
    }
    totals = [sum(map(int, row[2:5])) for row in rows]
    assert totals == sorted(totals, reverse=True)
    for label, *_, named in rows:
        shares = others.leaf[others.label == label].value_counts(normalize=True)
        first, *rest = (re.fullmatch(r"(.+) ([\d.]+) %", each).groups() for each in named.split("; "))
        assert len(rest) == min(len(shares), 3) - 1
        assert float(first[1]) == pytest.approx(100 * shares.iloc[0], abs=0.051)
        assert float(first[1]) == pytest.approx(100 * shares[first[0]], abs=0.051)


def test_labels_are_ranked_by_their_mean_confidence(tmp_path):
    report = cells()
    table = frame(report)
    rows = rows_below(read(report, tmp_path), "Labels of the lowest confidence")
    given = table[table.code >= 0].astype({"confidence": float}).groupby("label").confidence
    means = given.mean().sort_values()
    assert [row[0] for row in rows] == list(means.index)
    for label, n_cells, mean, wrong in rows:
        assert int(n_cells) == given.count()[label]
        assert float(mean) == np.floor(100 * means[label]) / 100
        assert float(wrong) == pytest.approx((1 - given.get_group(label)).sum(), abs=0.051)


def test_least_sure_cells_are_those_with_a_label(tmp_path):
    report = cells(confidence=np.where(cells().codes < 0, 0, np.round(cells().confidence, 2)).astype(np.float32))
    table = frame(report)
    rows = rows_below(read(report, tmp_path), "The least sure of the cells with a label")
    least = table[table.code >= 0].sort_values("confidence", kind="stable")[:20]  # of equal ones, the first in the file
    assert [[*row[:2], row[3]] for row in rows] == least.reset_index()[["index", "label", "leaf"]].to_numpy().tolist()
    assert [float(row[2]) for row in rows] == pytest.approx(least.confidence.to_list())


def test_reasons_stand_there_where_there_are_some(tmp_path):
    said = ["T cell and not B cell: CD3D, CD3E", "B cell and not T cell: CD79A"]
    page = read(cells(explanation=said), tmp_path)
    assert [each.text for each in chapter(page, "Why these labels?").all("li")] == said
    assert "Why these labels?" not in read(cells(), tmp_path).text


def test_all_that_was_done_is_listed(tmp_path):
    page = read(cells(about=ABOUT | PROMISE | {"checkpoint": [], "missing": None}), tmp_path)
    (details,) = chapter(page, "All that was done").all("details")
    assert "open" not in details.attributes
    rows = dict([cell.text for cell in row.all("td")] for row in details.all("tr") if row.all("td"))
    assert rows["versions.hce_jax"] == "0.1.0"
    assert rows["input.genes_found"] == "900"
    assert rows["input.share_of_counts"] == "0.97"
    assert rows["thresholds"] == "0.7; 0.8; inf; 0.9"
    assert rows["types"] == "; ".join(LABELS)
    assert rows["checkpoint"] == rows["missing"] == rows["input.warnings"] == "none"
    assert len(rows) == len(ABOUT | PROMISE) - 1 + len(INPUT) + 2


def test_large_annotation_gives_a_small_file(tmp_path):
    points = np.random.default_rng(5).normal(size=(60_000, 2))
    write_report(tmp_path / "report.html", cells(60_000, picture=("X_umap", points)))
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
