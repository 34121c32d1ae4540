import numpy as np
import pytest
from scipy import sparse

from hce_jax.errors import UserError
from hce_jax.preprocess.normalize import normalize_log1p

CONTAINERS = [np.asarray, sparse.csr_array, sparse.csr_matrix]


def dense(values) -> np.ndarray:
    return values.toarray() if sparse.issparse(values) else values


def random_counts(rng: np.random.Generator, n_cells: int = 40, n_genes: int = 25) -> np.ndarray:
    return rng.poisson(rng.gamma(0.3, 5.0, (n_cells, n_genes)))


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_table_worked_by_hand(container):
    counts = np.array([[1, 0, 3], [0, 0, 0], [0, 7, 0], [5_000, 2_500, 2_500]])
    expected = np.array(
        [
            [7.824446, 0.0, 8.922792],  # ln 2501, ln 7501
            [0.0, 0.0, 0.0],  # an empty cell stays zero
            [0.0, 9.210440, 0.0],  # ln 10001, whatever the one count is
            [8.517393, 7.824446, 7.824446],  # ln 5001, ln 2501
        ]
    )
    result = normalize_log1p(container(counts))
    assert type(result) is type(container(counts))
    assert result.dtype == np.float32
    np.testing.assert_allclose(dense(result), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.int64, np.float32, np.float64])
@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_and_number_type_gives_what_a_loop_over_cells_gives(container, dtype):
    counts = random_counts(np.random.default_rng(0)).astype(dtype)
    expected = [[np.log(1 + 10_000 * int(c) / max(int(cell.sum(dtype=np.int64)), 1)) for c in cell] for cell in counts]
    np.testing.assert_allclose(dense(normalize_log1p(container(counts))), expected, rtol=1e-6, atol=2e-6)


def test_every_cell_with_counts_sums_to_10000_and_the_counts_come_back():
    counts = random_counts(np.random.default_rng(1)) + np.eye(40, 25, dtype=np.int64)
    counts[39] = 0
    scaled = np.expm1(normalize_log1p(counts).astype(np.float64))
    total = counts.sum(axis=1)
    np.testing.assert_allclose(scaled.sum(axis=1)[total > 0], 10_000, rtol=1e-5)
    assert not scaled[39].any()
    np.testing.assert_array_equal(np.rint(scaled * total[:, None] / 10_000), counts)


def test_a_cell_sequenced_twice_as_deep_is_the_same_cell():
    counts = random_counts(np.random.default_rng(2))
    np.testing.assert_array_equal(normalize_log1p(2 * counts), normalize_log1p(counts))


def test_entries_stored_twice_are_added_before_the_logarithm():
    twice = sparse.csr_array((np.array([1.0, 2.0, 1.0]), np.array([0, 0, 1]), np.array([0, 3])), shape=(1, 2))
    np.testing.assert_allclose(dense(normalize_log1p(twice)), normalize_log1p(np.array([[3.0, 1.0]])))


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_input_is_not_changed(container):
    counts = container(random_counts(np.random.default_rng(3)).astype(np.float64))
    before = counts.copy()
    normalize_log1p(counts)
    np.testing.assert_array_equal(dense(counts), dense(before))


def test_a_large_total_keeps_its_last_digits():
    # 2^24 + 1 is not a float32: the total must not be summed in single precision
    counts = np.array([[2**24, 1, 1, 1, 1]], dtype=np.float32)
    np.testing.assert_allclose(normalize_log1p(counts)[0, 1], np.log1p(1e4 / (2**24 + 4)), rtol=1e-7)


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("bad", [-1.0, np.nan, np.inf])
def test_a_value_that_is_no_count_is_refused(container, bad):
    with pytest.raises(UserError, match=r"1 of the given counts are negative or not finite .*give raw counts"):
        normalize_log1p(container(np.array([[1.0, bad], [2.0, 0.0]])))


def test_a_sparse_format_other_than_csr_is_refused():
    with pytest.raises(UserError, match=r"csc format, expected csr; convert with .tocsr\(\)"):
        normalize_log1p(sparse.csc_array(np.eye(3)))
