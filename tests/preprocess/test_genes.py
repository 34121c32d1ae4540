import numpy as np
import pytest
from scipy import sparse

from hce_jax.errors import SourceError
from hce_jax.preprocess.genes import align_genes

IDS = ["ENSG00000010610", "ENSG00000153563", "ENSG00000156738", "ENSG00000081237", "ENSMUSG00000000001"]
NAMES = ["CD4", "CD8A", "MS4A1", "PTPRC", "Gnai3"]


def test_genes_are_found_by_id():
    found = align_genes([IDS[2], "ENSG00000000009", IDS[0], "CD8A"], IDS, NAMES)
    assert (found.places_t.tolist(), found.by, found.n_genes, found.n_found) == ([2, -1, 0, -1], "feature_id", 5, 2)
    assert found.places_t.dtype == np.int64


def test_genes_are_found_by_name_where_that_finds_more():
    found = align_genes(["PTPRC", "CD4", "ENSG00000010610", "cd8a"], IDS, NAMES)
    assert (found.places_t.tolist(), found.by, found.n_found) == ([3, 0, -1, -1], "feature_name", 2)


def test_genes_are_found_by_id_where_names_find_as_many():
    found = align_genes(["CD4", IDS[1]], IDS, NAMES)
    assert (found.places_t.tolist(), found.by) == ([-1, 1], "feature_id")


def test_versions_of_ids_are_ignored_on_both_sides():
    theirs = ["ENSG00000153563.12", "ENSMUSG00000000001.4", "ENSG00000010610"]
    for ours in (IDS, [f"{name}.7" for name in IDS], [IDS[0], *(f"{name}.1" for name in IDS[1:])]):
        assert align_genes(theirs, ours, NAMES).places_t.tolist() == [1, 4, 0]


@pytest.mark.parametrize("name", ["RP11-34P13.7", "ENSG00000010610.9_PAR_Y", "ENST00000011653.9", "ENSG0000001061.9"])
def test_what_is_no_version_of_a_gene_s_id_is_part_of_the_name(name):
    assert align_genes([name, IDS[1]], IDS, NAMES).places_t.tolist() == [-1, 1]
    assert align_genes([name.split(".")[0], name], [name, "x"], ["-", "-"]).places_t.tolist() == [-1, 0]


def test_a_name_of_several_of_our_genes_finds_none_of_them():
    found = align_genes(["A", "B", "C"], ["1", "2", "3", "4"], ["A", "B", "A", "C"])
    assert (found.places_t.tolist(), found.n_found) == ([-1, 1, 3], 2)


def test_genes_that_are_there_twice_are_refused_if_they_are_ours():
    with pytest.raises(SourceError) as caught:
        align_genes(["CD8A", "X", "CD8A", "X", "CD4", "CD4"], IDS, NAMES, "mine.h5ad")
    assert str(caught.value).startswith("mine.h5ad has 2 genes more than once (first: CD8A); keep one column of each")
    with pytest.raises(SourceError, match=f"the data has 1 genes more than once \\(first: {IDS[1]}\\)"):
        align_genes([f"{IDS[1]}.1", f"{IDS[1]}.2"], IDS, NAMES)
    assert align_genes(["X", "CD4", "X"], IDS, NAMES).places_t.tolist() == [-1, 0, -1]


def test_a_gene_that_is_there_twice_counts_once_for_what_finds_more():
    # by id one gene of ours, twice; by name two
    found = align_genes(["a", "a", "B", "C"], ["a", "b", "c"], ["A", "B", "C"])
    assert (found.by, found.places_t.tolist()) == ("feature_name", [-1, -1, 1, 2])


@pytest.mark.parametrize("theirs", [["g1", "g2", "g3"], []], ids=["other words", "no genes"])
def test_genes_none_of_which_is_ours_are_refused(theirs):
    with pytest.raises(SourceError) as caught:
        align_genes(theirs, IDS, NAMES, "mine.h5ad")
    shown = "g1, g2, ..." if theirs else ""
    assert str(caught.value) == (
        f"none of the {len(theirs)} genes of mine.h5ad ({shown}) is among the 5 asked for (ENSG00000010610, "
        "ENSG00000153563, ...; by name CD4, CD8A, ...); name the column of var that has Ensembl ids or gene names "
        "(--gene-column), or ask for other genes"
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("container", [sparse.csr_array, sparse.csr_matrix])
def test_counts_come_into_our_order_gene_by_gene(container, seed):
    rng = np.random.default_rng(seed)
    ours = [f"G{gene}" for gene in range(30)]
    theirs = [f"G{gene}" for gene in rng.permutation(50)[:40]]
    cells, genes = np.arange(12)[:, None], np.array([int(name[1:]) for name in theirs])[None]
    counts = np.where(rng.random((12, 40)) < 0.6, 100 * cells + genes + 1, 0).astype(np.float32)  # tell cell and gene
    counts[[3, 11]] = 0
    expected = np.zeros((12, 30), np.float32)
    for column, name in enumerate(theirs):
        if name in ours:
            expected[:, ours.index(name)] = counts[:, column]
    given = container(counts)
    alignment = align_genes(theirs, ours, ours)
    aligned = alignment.apply(given)
    assert isinstance(aligned, sparse.csr_array)
    assert aligned.dtype == np.float32
    assert aligned.has_canonical_format
    assert aligned.nnz == np.count_nonzero(expected)
    np.testing.assert_array_equal(aligned.toarray(), expected)
    np.testing.assert_array_equal(given.toarray(), counts)
    assert alignment.n_found == len(set(ours) & set(theirs))
    assert alignment.apply(given[:0]).shape == (0, 30)


def test_counts_that_are_in_our_order_stay_in_it_sorted():
    counts = np.arange(1, 13, dtype=np.float32).reshape(3, 4)
    genes = np.array([[2, 0, 3, 1], [0, 1, 2, 3], [3, 2, 1, 0]])
    given = sparse.csr_matrix((np.take_along_axis(counts, genes, 1).ravel(), genes.ravel(), [0, 4, 8, 12]), (3, 4))
    names = [f"G{gene}" for gene in range(4)]
    aligned = align_genes(names, names, names).apply(given)
    assert isinstance(aligned, sparse.csr_array)
    assert aligned.has_canonical_format
    np.testing.assert_array_equal(aligned.toarray(), counts)
    np.testing.assert_array_equal(given.indices, genes.ravel())
