"""What is said of a user's cells before a model is asked."""

import numpy as np
import pytest
from scipy import sparse
from small_model import GENE_IDS, GENE_NAMES, LABELS, REACH, raw_counts

from hce_jax.annotate.prepared import PreparedCells
from hce_jax.annotate.query import open_query
from hce_jax.store import SideFiles


@pytest.fixture
def side(tmp_path):
    return SideFiles(tmp_path, GENE_IDS, GENE_NAMES, LABELS, None, reachability=REACH, about={})


def test_antibodies_do_not_count_in_the_share_of_the_models_genes(side):
    cells = raw_counts()
    theirs = cells.X.toarray()
    is_ours = cells.var_names.isin(GENE_IDS)
    some = theirs.sum(axis=1) > 0
    expected = (theirs[:, is_ours].sum(axis=1)[some] / theirs.sum(axis=1)[some]).mean()
    assert 0.3 < expected < 0.97
    is_antibody = np.zeros(cells.n_vars, bool)
    is_antibody[np.flatnonzero(~is_ours)[:4]] = True
    cells.var["feature_types"] = np.where(is_antibody, "Antibody Capture", "Gene Expression")
    with open_query(cells) as query:
        prepared = PreparedCells.of(query, side)
    theirs = theirs[:, ~is_antibody]
    some = theirs.sum(axis=1) > 0
    without = (theirs[:, is_ours[~is_antibody]].sum(axis=1)[some] / theirs.sum(axis=1)[some]).mean()
    assert without > expected + 0.01
    assert prepared.share_of_counts == prepared.about["share_of_counts"] == pytest.approx(without)
    assert "4 rows of var that are Antibody Capture are left out" in prepared.notes


def test_zeros_and_ones_are_warned_of_and_counts_are_not(side):
    cells = raw_counts()
    with open_query(cells) as query:
        assert PreparedCells.of(query, side).warnings == ()
    cells.X = sparse.csr_matrix((cells.X.toarray() > 0).astype(np.float32))
    with open_query(cells) as query:
        prepared = PreparedCells.of(query, side)
    assert prepared.warnings == (
        "X has zeros and ones, which say what is expressed and not how much: labels are less certain than they look",
    )
    assert "counts" not in prepared.about["scale"]  # so that the report does not call it fine
