import numpy as np
import pytest
from scipy.sparse import csr_array

from hce_jax.preprocess.normalize import normalize_log1p

LOG1P_TOLERANCE = 2e-6


def dense(x):
    return x.toarray() if hasattr(x, "toarray") else np.asarray(x)


@pytest.mark.golden("preprocess_sf_log1p")
def test_golden_normalize_log1p_of_sparse_counts(golden):
    a = golden.arrays
    counts = csr_array((a["counts_data"], a["counts_indices"], a["counts_indptr"]), shape=a["counts_shape"])
    np.testing.assert_allclose(dense(normalize_log1p(counts)), a["log1p_dense"], atol=LOG1P_TOLERANCE, rtol=0)


@pytest.mark.golden("preprocess_sf_log1p")
def test_golden_normalize_log1p_of_dense_counts(golden):
    a = golden.arrays
    found = normalize_log1p(a["counts_dense"])
    np.testing.assert_allclose(dense(found), a["log1p_dense_input"], atol=LOG1P_TOLERANCE, rtol=0)
    # Undone, they sum to the size factor of the manifest, but for the empty cell.
    totals = np.expm1(dense(found).astype(np.float64)).sum(axis=1)
    filled = a["counts_dense"].any(axis=1)
    np.testing.assert_allclose(totals, np.where(filled, golden.config["target_sum"], 0), rtol=1e-5)
