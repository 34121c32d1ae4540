from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import scipy.sparse as sp

from hce_jax.ops.csr import csr_product


def cells(n_cells, n_genes, density, seed=0):
    rng = np.random.default_rng(seed)
    x = np.where(rng.random((n_cells, n_genes)) < density, rng.random((n_cells, n_genes)), 0)
    return x.astype(np.float32), rng.normal(size=(n_genes, 7)).astype(np.float32)


@pytest.mark.parametrize(
    ("n_cells", "n_genes", "density"),
    [(1, 1, 1), (3, 512, 0.1), (5, 513, 1), (256, 40, 0.3), (257, 1100, 0.05), (600, 9, 0.5), (4, 30, 0), (0, 5, 0)],
)
def test_product_is_that_of_dense_float64(n_cells, n_genes, density):
    x, kernel = cells(n_cells, n_genes, density)
    product = csr_product(sp.csr_array(x), kernel)
    assert product.dtype == np.float32
    np.testing.assert_allclose(product, x.astype(np.float64) @ kernel, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n_entries", range(10))
def test_cells_of_any_number_of_genes_are_read_to_the_end(n_entries):
    x = np.zeros((2, 10), np.float32)
    x[0, :n_entries], x[1, 10 - n_entries :] = np.arange(1, n_entries + 1), 1
    np.testing.assert_array_equal(csr_product(sp.csr_array(x), np.eye(10, dtype=np.float32)), x)


def test_unsorted_and_wide_indices_float64_amounts_and_transposed_weights_give_the_same():
    x, kernel = cells(300, 700, 0.1)
    expected = csr_product(sp.csr_array(x), kernel)
    backwards = sp.csr_array(x[:, ::-1].astype(np.float64))
    backwards.indices = (699 - backwards.indices).astype(np.int64)
    backwards.indptr = backwards.indptr.astype(np.int64)
    backwards.has_sorted_indices = False
    np.testing.assert_array_equal(csr_product(backwards, np.asfortranarray(kernel)), expected)


def test_threads_do_not_disturb_each_other():
    x, kernel = cells(900, 700, 0.2)
    parts = [sp.csr_array(x[start : start + 300]) for start in (0, 300, 600)]
    with ThreadPoolExecutor(3) as pool:
        products = list(pool.map(lambda part: csr_product(part, kernel), parts))
    np.testing.assert_array_equal(np.concatenate(products), csr_product(sp.csr_array(x), kernel))
