import pytest

from hce_jax.preprocess.species import PREFIXES, Species, other_species, recognise_species, without_genome


@pytest.mark.parametrize(
    ("prefix", "name"),
    [
        ("ENSG", "human"),
        ("ENSMUSG", "mouse"),
        ("ENSRNOG", "rat"),
        ("ENSDARG", "zebrafish"),
        ("ENSMMUG", "rhesus macaque"),
    ],
)
def test_ensembl_ids_tell_the_species(prefix, name):
    found = recognise_species([f"{prefix}{gene:011d}{'.3' if gene % 2 else ''}" for gene in range(7)])
    assert found == Species((name,), f"{prefix}...: 7 of 7")
    assert str(found) == f"{name} genes ({prefix}...: 7 of 7)"


def test_the_ids_of_fly_and_worm_which_are_not_ensembl_s_tell_too():
    assert recognise_species(["FBgn0031208", "FBgn0002121"]).names == ("fly",)
    assert recognise_species(["WBGene00022277"]).names == ("worm",)


@pytest.mark.parametrize(
    ("genes", "called"),
    [
        (["Cd3d", "Xkr4", "mt-Co1", "Gm1992", "4933401J01Rik", "H2-K1", "a"], "mouse or rat"),
        (["CD3D", "MT-CO1", "C1orf112", "HLA-DRB1", "AL627309.1", "7SK", "a"], "human-like"),
        ([*(f"gene{number}" for number in range(60)), "si:ch211-113g11.6", "zgc:158846"], "zebrafish"),
    ],
)
def test_symbols_tell_the_species_by_how_they_are_written(genes, called):
    assert recognise_species(genes).called == called


@pytest.mark.parametrize(
    "genes",
    [
        [],
        ["0", "1", "2"],
        ["chr1:1-500", "chr1:600-900"],
        ["cd3d", "cd4", "ptprc"],
        ["Cd3d", "CD4"],
        [*(f"ENSG{gene:011d}" for gene in range(100)), *(f"ENSMUSG{gene:011d}" for gene in range(100))],
    ],
    ids=["none", "numbers", "peaks", "lower case", "half and half", "two species"],
)
def test_genes_that_do_not_tell_are_of_no_species(genes):
    assert recognise_species(genes) is None


def test_a_hundred_ids_tell_among_many_names_and_a_few_do_not():
    names = [f"gene-{number}" for number in range(1000)]
    assert recognise_species([*names, *(f"ENSMUSG{gene:011d}" for gene in range(100))]).names == ("mouse",)
    assert recognise_species([*names, *(f"ENSMUSG{gene:011d}" for gene in range(99))]) is None


def test_species_are_others_where_none_can_be_the_same():
    human, mouse, rat = (recognise_species([f"{prefix}00000000001"]) for prefix in ("ENSG", "ENSMUSG", "ENSRNOG"))
    assert other_species(["Cd3d", "Cd4"], human).names == ("mouse", "rat")
    assert other_species(["CD3D", "CD4"], mouse).called == "human-like"
    assert other_species(["Cd3d", "Cd4"], rat) is None
    assert other_species(["CD3D", "CD4"], human) is None
    assert other_species(["ENSMMUG00000000001"], human).names == ("rhesus macaque",)
    assert other_species(["ENSMMUG00000000001"], None) is None
    assert other_species(["1", "2"], human) is None


@pytest.mark.parametrize(
    ("gene", "bare", "species"),
    [
        ("GRCh38_CD3D", "CD3D", "human"),
        ("GRCh38______ENSG00000167286", "ENSG00000167286", "human"),
        ("hg19_HLA-A", "HLA-A", "human"),
        ("mm10___Cd3d", "Cd3d", "mouse"),
        ("GRCm39_ENSMUSG00000032094", "ENSMUSG00000032094", "mouse"),
        ("mRatBN7.2_Cd3d", "Cd3d", "rat"),
        ("CD3D", "CD3D", None),
        ("mm10", "mm10", None),
        ("HGF_2", "HGF_2", None),
        ("Y_RNA", "Y_RNA", None),
    ],
)
def test_the_genome_before_a_gene_is_taken_off(gene, bare, species):
    assert without_genome(gene) == (bare, species)


def test_no_prefix_begins_another_one_s_ids():
    for prefix in PREFIXES:
        assert recognise_species([f"{prefix}00000000001"]).names == (PREFIXES[prefix],)
