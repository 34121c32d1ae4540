import numpy as np
import pytest
from comparisons import reachability

from hce_jax.compare.tree_layout import (
    COLUMN_WIDTH,
    INDENT,
    LINE_HEIGHT,
    NAME_GAP,
    NAME_SIZE,
    PAGE_HEIGHT,
    ROW_HEIGHT,
    tree_layout,
    tree_parents,
)
from hce_jax.figure_style import widest
from hce_jax.hierarchy import direct_edges, reachability_from_edges, tree_order


def many_types(n_types=164):
    """A deep tree of three quarters of the types, some with a second parent; the others have no relatives."""
    rng = np.random.default_rng(7)
    edges = []
    for child in range(1, 3 * n_types // 4):
        edges.append((int(rng.integers(max(0, child - 25), child)), child))
        if child % 9 == 0:
            edges.append((int(rng.integers(child)), child))
    return reachability_from_edges(n_types, edges)


CASES = {
    "two types": np.array([[1, 1], [0, 1]]),
    "one type": np.eye(1),
    "no relatives at all": np.eye(70),
    "a type with two parents": reachability(10),
    "several columns": many_types(),
}


@pytest.fixture(params=CASES)
def laid_out(request):
    reach = CASES[request.param]
    names = [f"type {code}" + " of a rather long name" * (code % 5) for code in range(len(reach))]
    return reach, names, tree_layout(reach, names)


def column_of(layout):
    return (layout.x // COLUMN_WIDTH).astype(int)


def test_every_edge_is_drawn_or_named_once(laid_out):
    reach, _, layout = laid_out
    times = layout.drawn.astype(int) + layout.further + layout.named
    np.testing.assert_array_equal(times, direct_edges(reach))
    same_column = column_of(layout)[:, None] == column_of(layout)
    assert not (layout.named & same_column).any()
    assert not ((layout.drawn | layout.further) & ~same_column).any()
    assert layout.drawn.sum(axis=0).max() <= 1


def test_type_stands_below_its_parent_and_one_step_to_the_right(laid_out):
    _, _, layout = laid_out
    for parent, child in np.argwhere(layout.drawn):
        assert layout.y[child] > layout.y[parent]
        assert layout.x[child] - layout.x[parent] == pytest.approx(INDENT)
        # Nothing between them stands so far left that the line would go through it.
        between = (layout.y > layout.y[parent]) & (layout.y < layout.y[child])
        beside = between & (column_of(layout) == column_of(layout)[child])
        assert (layout.x[beside] > layout.x[parent] + INDENT / 2).all()


def test_rows_do_not_meet_and_all_is_inside(laid_out):
    _, _, layout = laid_out
    assert len(set(zip(layout.x.tolist(), layout.y.tolist(), strict=True))) == len(layout.x)
    lines = [
        name.count("\n") + (note.count("\n") + 1 if note else 0)
        for name, note in zip(layout.names, layout.notes, strict=True)
    ]
    ends = layout.y - ROW_HEIGHT / 2 + ROW_HEIGHT + LINE_HEIGHT * np.array(lines)
    titles = np.array(layout.titles).reshape(-1, 2)
    for column in range(column_of(layout).max() + 1):
        rows = np.flatnonzero(column_of(layout) == column)
        rows = rows[np.argsort(layout.y[rows])]
        assert (layout.y[rows][1:] - ROW_HEIGHT / 2 >= ends[rows][:-1] - 1e-9).all()
        for title in titles[titles[:, 0] // COLUMN_WIDTH == column, 1]:
            assert not ((layout.y[rows] < title + 0.9 * ROW_HEIGHT) & (ends[rows] > title - 0.4 * ROW_HEIGHT)).any()
    assert (layout.y - ROW_HEIGHT / 2 >= -1e-9).all()
    assert ends.max() <= layout.height + 1e-9
    assert layout.x.max() < layout.width


def test_names_are_broken_where_their_column_ends(laid_out):
    _, names, layout = laid_out
    for code, name in enumerate(layout.names):
        assert name.replace("\n", " ") == names[code]
        right = layout.x[code] % COLUMN_WIDTH + NAME_GAP + max(widest([line], NAME_SIZE) for line in name.split("\n"))
        assert right < COLUMN_WIDTH


def test_parent_in_another_column_is_named():
    reach = many_types()
    layout = tree_layout(reach, [f"type {code}" for code in range(len(reach))])
    assert layout.named.any()
    for code, note in enumerate(layout.notes):
        parents = [f"type {parent}" for parent in np.flatnonzero(layout.named[:, code])]
        assert note.replace("\n", " ") == ("below " + " and ".join(parents) if parents else "")


def test_many_types_fit_on_a_page_in_columns_of_about_equal_height():
    reach = many_types()
    layout = tree_layout(reach, [f"type {code}" for code in range(len(reach))])
    assert layout.width == 2 * COLUMN_WIDTH
    assert layout.height < PAGE_HEIGHT
    lowest = [layout.y[column_of(layout) == column].max() for column in range(2)]
    assert min(lowest) > 0.8 * max(lowest)


def test_types_without_relatives_come_last_and_each_column_goes_on_in_tree_order():
    reach = many_types()
    layout = tree_layout(reach, [f"type {code}" for code in range(len(reach))])
    edges = direct_edges(reach)
    isolated = ~(edges.any(axis=0) | edges.any(axis=1))
    places = np.lexsort((layout.y, column_of(layout)))
    order = tree_order(reach)
    assert [code for code in places if not isolated[code]] == [code for code in order if not isolated[code]]
    for column in range(2):
        here = column_of(layout) == column
        assert layout.y[here & isolated].min(initial=np.inf) > layout.y[here & ~isolated].max(initial=0)


def test_few_types_have_one_column():
    layout = tree_layout(reachability(10), [f"type {code}" for code in range(10)])
    assert layout.width == COLUMN_WIDTH
    assert len(layout.titles) == 1
    assert not layout.named.any()
    assert np.argwhere(layout.further).tolist() == [[1, 5]] or np.argwhere(layout.further).tolist() == [[2, 5]]


def test_tree_parent_is_a_parent_and_comes_before():
    reach = many_types()
    parents, order = tree_parents(reach), tree_order(reach).tolist()
    edges = direct_edges(reach)
    for code, parent in enumerate(parents):
        if parent < 0:
            assert not edges[:, code].any()
        else:
            assert edges[parent, code]
            assert order.index(parent) < order.index(code)
