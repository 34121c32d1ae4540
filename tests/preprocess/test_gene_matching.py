"""A model's genes in files that call them in every way."""

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from hce_jax.errors import SourceError
from hce_jax.preprocess.genes import GeneAlignment, check_coverage, match_genes

IDS = [f"ENSG{number:011d}" for number in range(100, 140)]
NAMES = [f"GENE{number}" for number in range(38)] + ["C1orf7", "HLA-A"]
#: Where the genes of the files lie among ours.
PLACES = np.random.default_rng(0).permutation(40)[:30]


def theirs(names, change=str):
    return [change(names[place]) for place in PLACES]


def mouse_ids(n=30):
    return [f"ENSMUSG{number:011d}" for number in range(n)]


def match(var, column=None):
    return match_genes(var, IDS, NAMES, "my.h5ad", column)


FORMS = {
    "the index of var, as gene ids": pd.DataFrame({"gene_symbols": theirs(NAMES)}, theirs(IDS)),
    "the index of var, as gene names": pd.DataFrame({"n_cells": 3}, theirs(NAMES)),
    "the column gene_ids of var, as gene ids": pd.DataFrame(
        {"gene_ids": theirs(IDS, "{}.17".format), "genome": "GRCh38"}, theirs(NAMES)
    ),
    "the column feature_name of var, as gene names": pd.DataFrame(
        {"feature_name": pd.Categorical(theirs(NAMES))}, [str(number) for number in range(30)]
    ),
    "the column Ensembl of var, as gene ids": pd.DataFrame({"Ensembl": theirs(IDS)}, [f"g{n}" for n in range(30)]),
    "the index of var, as gene names, in upper or lower case": pd.DataFrame(index=theirs(NAMES, str.lower)),
}


@pytest.mark.parametrize("how", FORMS)
def test_genes_are_found_wherever_they_are_named(how):
    found = match(FORMS[how])
    assert found.places_t.tolist() == PLACES.tolist()
    assert (found.by, found.n_genes, found.n_found, found.notes) == (how, 40, 30, ())


def test_what_finds_most_is_taken():
    var = pd.DataFrame(
        {"gene_ids": ["x"] * 10 + theirs(IDS)[10:], "symbol": theirs(NAMES)}, ["y"] * 5 + theirs(IDS)[5:]
    )
    assert match(var).by == "the column symbol of var, as gene names"
    assert match(var[["gene_ids"]]).by == "the index of var, as gene ids"
    assert match(var, "gene_ids").by == "the column gene_ids of var, as gene ids"
    assert match(var, "gene_ids").n_found == 20


def test_ids_of_a_model_that_are_names_are_found_by_name():
    found = match_genes(FORMS["the index of var, as gene ids"], NAMES, NAMES, "my.h5ad")
    assert (found.by, found.n_found) == ("the column gene_symbols of var, as gene ids", 30)


def test_another_column_is_looked_in_only_if_it_is_named():
    var = pd.DataFrame({"alias": theirs(NAMES), "n": 1.0}, [f"g{number}" for number in range(30)])
    with pytest.raises(SourceError, match=r"none of the genes of my\.h5ad is among the 40 of the model"):
        match(var)
    assert match(var, "alias").n_found == 30
    for column in ("n", "symbol"):
        with pytest.raises(SourceError) as caught:
            match(var, column)
        assert str(caught.value) == (
            f"my.h5ad has no column '{column}' of text in var (--gene-column); those it has: alias"
        )


def test_columns_that_are_one_gene_are_added_up():
    # of 3 columns of the first gene one has a version, of 2 of the second both have none
    var = pd.DataFrame(index=[IDS[4], IDS[9], f"{IDS[4]}.3", "ENSG00000999999", IDS[9], IDS[4], IDS[0]])
    found = match(var)
    assert found.notes == ("2 genes are the sum of 5 columns",)
    counts = sparse.csr_array(np.arange(1, 15, dtype=np.float32).reshape(2, 7) ** 2)
    aligned = found.apply(counts)
    assert (aligned.dtype, aligned.has_canonical_format) == (np.float32, True)
    assert {int(gene): aligned[:, [gene]].toarray().ravel().tolist() for gene in np.unique(aligned.indices)} == {
        0: [49, 196],
        4: [1 + 9 + 36, 64 + 100 + 169],
        9: [4 + 25, 81 + 144],
    }


@pytest.mark.parametrize("seed", range(3))
def test_sums_are_those_of_a_matrix_product(seed):
    rng = np.random.default_rng(seed)
    places = rng.integers(-1, 6, 20)
    counts = rng.poisson(0.7, (9, 20)).astype(np.float32)
    expected = counts[:, places >= 0] @ np.eye(6, dtype=np.float32)[places[places >= 0]]
    np.testing.assert_array_equal(GeneAlignment(places, 6, "").apply(sparse.csr_array(counts)).toarray(), expected)


def test_genes_that_are_there_twice_are_found_once():
    var = pd.DataFrame(index=[*IDS[:15], *(f"{name}.2" for name in IDS[:15]), *IDS[:15]])
    found = match(var)
    assert found.n_found == 15
    assert check_coverage(found, "my.h5ad").startswith("my.h5ad has only 15 of the model's 40 genes (38 %;")
    with pytest.raises(SourceError, match=r"only 1 of the model's 40 genes \(2\.5 %;"):
        check_coverage(match(pd.DataFrame(index=IDS[:1] * 45)), "my.h5ad")


def test_what_finds_most_different_genes_is_taken():
    var = pd.DataFrame({"symbol": theirs(NAMES)}, [IDS[0]] * 20 + [IDS[1]] * 10)
    var["gene_ids"] = ["x"] * 30
    assert match(var).by == "the column symbol of var, as gene names"


@pytest.mark.parametrize(
    "var",
    [
        pd.DataFrame({"feature_types": ["Gene Expression"] * 3 + ["Antibody Capture"]}, [*IDS[:2], "other", "CD4"]),
        pd.DataFrame(index=[f"GRCh38_{NAMES[0]}", f"GRCh38_{NAMES[1]}", "GRCh38_other", "mm10_Cd4"]),
        pd.DataFrame({"gene_ids": [*IDS[:2], "", "mm10_x"]}, ["a", "b", "other", "d"]),
        pd.DataFrame({"gene_ids": [*IDS[:2], "", "x"]}, ["a", "b", "other", "mm10_Cd4"]),
    ],
    ids=["antibodies", "another genome among symbols", "another genome in a column", "another genome in the index"],
)
def test_only_genes_of_our_species_are_in_the_share_of_counts(var):
    counts = sparse.csr_array(np.array([[3, 0, 1, 96], [1, 1, 2, 0], [0, 0, 0, 7], [0, 0, 0, 0]], np.float32))
    assert match(var).share_of_counts(counts) == pytest.approx((3 / 4 + 2 / 4) / 2)  # cells without genes say nothing


def test_the_share_of_counts_is_that_of_all_columns_where_nothing_is_known_of_them():
    counts = sparse.csr_array(np.array([[3.0, 1, 4], [2, 0, 0]]))
    assert GeneAlignment(np.array([1, -1, 1]), 2, "").share_of_counts(counts) == pytest.approx((7 / 8 + 1) / 2)
    assert GeneAlignment(np.array([1, -1, 1]), 2, "").share_of_counts(counts[:0]) == 0


def test_a_name_that_stands_for_several_of_our_genes_finds_none_in_any_case():
    assert match_genes(pd.DataFrame(index=["A", "B", "C"]), ["1", "2", "3"], ["A", "A", "B"], "x").n_found == 1
    assert match_genes(pd.DataFrame(index=["a", "b", "c"]), ["1", "2", "3"], ["A", "A", "B"], "x").n_found == 1


@pytest.mark.parametrize(
    ("column", "kinds", "noted"),
    [
        ("feature_types", ["Gene Expression", "Antibody Capture"], "Antibody Capture"),
        ("feature_types", ["Gene Expression", "Something New"], "Something New"),
        ("feature_type", ["protein_coding", "CRISPR Guide Capture"], "CRISPR Guide Capture"),
        ("modality", ["rna", "prot"], "prot"),
        ("modality", ["other", "Protein"], "Protein"),
    ],
)
def test_rows_that_are_no_genes_are_left_out_even_where_they_are_called_so(column, kinds, noted):
    var = pd.DataFrame({column: pd.Categorical([kinds[0]] * 30 + [kinds[1]] * 2)}, [*theirs(NAMES), *theirs(NAMES)[:2]])
    found = match(var)
    assert found.places_t.tolist() == [*PLACES, -1, -1]
    assert found.notes == (f"2 rows of var that are {noted} are left out",)


def test_a_file_of_proteins_alone_is_refused():
    with pytest.raises(SourceError) as caught:
        match(pd.DataFrame({"feature_types": "Antibody Capture"}, theirs(NAMES)))
    assert str(caught.value) == "my.h5ad has no genes: its rows of var are Antibody Capture; give one with genes"


def test_kinds_of_genes_are_genes():
    var = pd.DataFrame({"feature_type": ["protein_coding", "lncRNA"] * 15, "feature_types": None}, theirs(NAMES))
    assert (match(var).n_found, match(var).notes) == (30, ())


@pytest.mark.parametrize("prefix", ["GRCh38_", "hg19_", "GRCh38______"])
def test_of_a_mixture_of_species_the_genes_of_ours_are_taken(prefix):
    human = [f"{prefix}{name}" for name in theirs(NAMES)]
    mouse = [f"mm10_Gene{number}" for number in range(50)]
    found = match(pd.DataFrame(index=[*mouse, *human]))
    assert found.places_t.tolist() == [-1] * 50 + PLACES.tolist()
    assert found.notes == ("50 genes of mouse are left out",)


@pytest.mark.parametrize(
    ("var", "has"),
    [
        (pd.DataFrame(index=mouse_ids()), "mouse genes (ENSMUSG...: 30 of 30)"),
        (pd.DataFrame(index=theirs(NAMES, str.capitalize)), "mouse or rat genes (Gene"),
        (
            pd.DataFrame({"gene_ids": [f"mm10_{name}" for name in mouse_ids()]}, theirs(NAMES, "mm10_{}".format)),
            "mouse",
        ),
        (pd.DataFrame(index=[f"mm10_{name}" for name in theirs(NAMES, str.capitalize)]), "mouse or rat genes (Gene"),
        (pd.DataFrame({"gene_ids": mouse_ids()}, [str(number) for number in range(30)]), "mouse genes (ENSMUSG"),
    ],
    ids=["ids", "symbols", "a genome alone", "a genome and symbols", "a column"],
)
def test_another_species_is_refused_by_its_name(var, has):
    with pytest.raises(SourceError) as caught:
        match(var)
    assert str(caught.value).startswith(f"my.h5ad has {has}")
    assert str(caught.value).endswith(
        "the model knows human genes (ENSG...: 40 of 40); map them to human orthologues first"
    )


def test_genes_that_were_mapped_to_orthologues_are_taken_and_it_is_said_what_they_were():
    found = match(pd.DataFrame({"gene_ids": mouse_ids()}, theirs(NAMES)))
    assert (found.n_found, found.notes) == (30, ("the column gene_ids of var has mouse genes (ENSMUSG...: 30 of 30)",))
    classes = pd.DataFrame({"gene_group": ["Coding", "Other"] * 15}, theirs(NAMES))
    assert match(classes).notes == ()


def test_genes_of_a_model_without_a_species_are_matched_all_the_same():
    with pytest.raises(SourceError, match="none of the genes of x is among the 1 of the model"):
        match_genes(pd.DataFrame(index=["Cd3d", "Cd4"]), ["gene-1"], ["gene-1"], "x")


def test_the_refusal_of_unknown_genes_shows_what_was_looked_at():
    with pytest.raises(SourceError) as caught:
        match(pd.DataFrame({"symbol": ["p", "q", "r"], "score": 1.0}, ["1", "2", "3"]))
    assert str(caught.value) == (
        "none of the genes of my.h5ad is among the 40 of the model (ENSG00000000100, ENSG00000000101, ...; by name "
        "GENE0, GENE1, ...); looked in the index of var: 1, 2, ...; the column symbol of var: p, q, ...; name the "
        "column of var that has Ensembl ids or gene names (--gene-column)"
    )


@pytest.mark.parametrize(("n_found", "outcome"), [(50, None), (49, "warned"), (5, "warned"), (4, "refused")])
def test_coverage_below_half_is_warned_of_and_below_a_twentieth_refused(n_found, outcome):
    alignment = GeneAlignment(np.arange(n_found), 100, "the index of var, as gene ids")
    few = f"my.h5ad has only {n_found} of the model's 100 genes ({n_found} %; looked in the index of var, as gene ids)"
    if outcome == "refused":
        with pytest.raises(SourceError) as caught:
            check_coverage(alignment, "my.h5ad")
        assert str(caught.value).startswith(f"{few}, too few to tell cell types; name the column of var")
    else:
        warning = check_coverage(alignment, "my.h5ad")
        assert (warning is None) == (outcome is None)
        assert warning is None or warning.startswith(f"{few}; the others are 0 in its cells")


def test_real_genes_are_found_in_any_form(real_dir):
    var = pd.read_parquet(real_dir / "pbmc_store" / "var.parquet")
    ours = list(var["feature_id"]), list(var["feature_name"])
    var = anndata.read_h5ad(real_dir / "h5ad_raw" / "pbmc3k.h5ad", backed="r").var
    symbols = var["feature_name"].astype(str)
    versioned = [f"{name}.4" if name.startswith("ENSG") else name for name in var["feature_id"].astype(str)]
    expected = match_genes(var, *ours, "pbmc3k").places_t
    for form in (pd.DataFrame(index=symbols), pd.DataFrame(index=versioned), pd.DataFrame(index=symbols.str.lower())):
        found = match_genes(form, *ours, "pbmc3k")
        assert found.n_found == 2312  # as the folder's description says
        np.testing.assert_array_equal(found.places_t, expected)
    with pytest.raises(SourceError, match="has mouse or rat genes"):
        match_genes(pd.DataFrame(index=symbols.str.capitalize()), *ours, "pbmc3k")
