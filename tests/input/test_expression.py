import jax
import numpy as np
import pytest
from coded_cells import block_of, expression

from hce_jax.input import Expression, rows_in_steps
from hce_jax.input.expression import _room


@pytest.mark.parametrize("as_values", [False, True])
@pytest.mark.parametrize("n_cells", [1, 2, 30, 64, 65])
def test_both_forms_have_each_cell_s_expression(n_cells, as_values):
    cells = Expression(block_of(np.arange(n_cells), as_values))
    assert len(cells) == n_cells
    np.testing.assert_allclose(cells.x.toarray(), expression(np.arange(n_cells)), atol=1.1e-6)
    dense = np.asarray(cells.dense)
    assert len(dense) == rows_in_steps(n_cells)
    np.testing.assert_allclose(dense[:n_cells], expression(np.arange(n_cells)), atol=1.1e-6)
    assert not dense[n_cells:].any()


def test_dense_rows_are_as_wide_as_the_backend_wants_them(monkeypatch):
    block = block_of(np.arange(7))
    narrow = Expression(block).dense
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    wide = Expression(block).dense
    assert wide.shape == (8, 640)
    np.testing.assert_array_equal(wide[:, : narrow.shape[1]], narrow)
    assert not wide[:, narrow.shape[1] :].any()


def test_each_form_is_made_once():
    cells = Expression(block_of(np.arange(5)))
    assert cells.x is cells.x
    assert cells.dense is cells.dense


def test_rooms_are_few_and_none_is_too_small():
    assert _room(0) == 0
    for n_entries in [*range(1, 3000), 10**6 + 1, 2**22, 2**22 + 1]:
        assert n_entries <= _room(n_entries) <= max(n_entries * 1.25 + 128, 128)
        assert _room(n_entries) % 128 == 0
    assert len({_room(n_entries) for n_entries in range(2**12, 2**13)}) <= 5


def test_rows_are_powers_of_two():
    assert [rows_in_steps(n) for n in (1, 2, 3, 4, 5, 2047, 2048, 2049)] == [1, 2, 4, 4, 8, 2048, 2048, 4096]
