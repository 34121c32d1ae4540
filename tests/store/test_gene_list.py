import gzip

import pandas as pd
import pytest
from memory_source import MemorySource, genes_of, many_cells

from hce_jax.errors import SourceError
from hce_jax.store.gene_list import gene_list

#: As a source may have them: in no order, two ids of one name.
GENES = (
    genes_of(12)
    .iloc[[3, 0, 11, 4, 7, 9, 1, 2]]
    .assign(feature_name=["GENE3", "GENE0", "twin", "GENE4", "NA", "twin", "GENE1", "GENE2"])
)
IDS = GENES["feature_id"].tolist()
NAMES = dict(zip(IDS, GENES["feature_name"], strict=True))


@pytest.fixture
def source():
    return MemorySource(many_cells(5), GENES)


def check(genes, ids, names=NAMES):
    assert list(genes.columns) == ["feature_id", "feature_name"]
    assert genes.index.tolist() == list(range(len(ids)))
    assert genes["feature_id"].tolist() == ids
    assert genes["feature_name"].tolist() == [names[each] for each in ids]


def test_all_genes_of_the_source_stay_in_its_order(source):
    check(gene_list("all", source), IDS)


def test_the_genes_that_code_for_proteins_are_those_of_which_the_source_says_so(source):
    coding = [each for each in IDS if int(each[4:]) % 5 != 4]
    assert 0 < len(coding) < len(IDS)
    check(gene_list("protein-coding", source), coding)


def test_a_source_that_does_not_say_which_genes_code_for_proteins_is_asked_in_vain(source):
    source.genes_ = GENES.drop(columns="feature_type")
    with pytest.raises(SourceError, match=r"memory does not say which genes code for proteins; name a file that does"):
        gene_list("protein-coding", source)
    check(gene_list("all", source), IDS)


def written(table, path):
    (table.to_parquet if path.suffix == ".parquet" else table.to_csv)(path)
    return str(path)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "csv.gz"])
def test_a_file_with_ids_keeps_its_genes_names_and_order_whatever_the_source_has(source, tmp_path, suffix):
    ids = [IDS[5], "ENSG00000000777", IDS[4], IDS[0]]
    var = pd.DataFrame({"feature_name": ["b", "NA", None, "a"], "feature_id": ids})
    genes = gene_list(written(var, tmp_path / f"var.{suffix}"), source)
    names = {IDS[5]: "b", "ENSG00000000777": "NA", IDS[4]: IDS[4], IDS[0]: "a"}  # a gene without a name goes by its id
    check(genes, ids, names)


def test_a_file_with_ids_alone_takes_the_names_from_the_source(source, tmp_path):
    ids = [IDS[6], "ENSG00000000777", IDS[2]]
    genes = gene_list(written(pd.DataFrame({"feature_id": ids}), tmp_path / "ids.csv"), source)
    check(genes, ids, NAMES | {"ENSG00000000777": "ENSG00000000777"})


@pytest.mark.parametrize("column", ["gene_names", "feature_name"])
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_file_with_names_alone_takes_these_genes_of_the_source_in_its_order(source, tmp_path, suffix, column):
    names = pd.DataFrame({column: ["GENE1", "NA", "absent", "twin", "GENE3"]})
    genes = gene_list(written(names, tmp_path / f"features.{suffix}"), source)
    check(genes, [IDS[0], IDS[2], IDS[4], IDS[5], IDS[6]])


def test_a_name_that_is_there_twice_takes_its_gene_once(source, tmp_path):
    names = pd.DataFrame({"gene_names": pd.Categorical(["GENE1", "GENE0", "GENE1"])})
    check(gene_list(written(names, tmp_path / "features.parquet"), source), [IDS[1], IDS[6]])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"feature_id": [IDS[0], IDS[1], IDS[0], IDS[1]]}, rf"gives the gene {IDS[0]} more than once \(2 in all\)"),
        ({"feature_id": [IDS[0], None]}, "the list of genes .* has an empty entry in the column feature_id"),
        ({"symbol": ["a"], "x": ["b"]}, r"has the columns (Unnamed: 0, )?symbol, x; it needs feature_id or"),
        ({"gene_names": ["absent"]}, "no gene of memory is among those asked for by --genes .*/genes"),
        ({"feature_id": []}, "no gene of memory is among those asked for by --genes .*/genes"),
    ],
    ids=["ids twice", "an empty id", "other columns", "names of other genes", "no ids"],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_list_that_cannot_be_used_is_refused(source, tmp_path, table, message, suffix):
    with pytest.raises(SourceError, match=message):
        gene_list(written(pd.DataFrame(table), tmp_path / f"genes.{suffix}"), source)


def test_genes_that_a_source_has_twice_are_refused(source):
    source.genes_ = pd.concat([GENES, GENES.iloc[:1]])
    with pytest.raises(SourceError, match=rf"--genes all gives the gene {IDS[0]} more than once \(1 in all\)"):
        gene_list("all", source)


def test_a_file_that_is_absent_or_damaged_is_named(source, tmp_path):
    with pytest.raises(SourceError) as caught:
        gene_list("protein_coding", source)
    assert str(caught.value) == (
        "the list of genes (--genes FILE, protein-coding or all) protein_coding does not exist"
    )
    contents = {"a.csv": b"\xff\xfe\x00bad\x00", "b.parquet": b"PAR1 no parquet PAR1", "c.csv": b"",
                "d.csv.gz": gzip.compress(b"feature_id\n" + b"a\n" * 1000)[:-9]}  # fmt: skip
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SourceError, match=rf"the list of genes .*/{name} cannot be read as CSV or parquet \("):
            gene_list(str(tmp_path / name), source)


def test_the_genes_of_the_published_store_are_a_list(source, real_dir):
    var = pd.read_parquet(real_dir / "sctab_var.parquet")
    genes = gene_list(str(real_dir / "sctab_var.parquet"), source)
    check(genes, var["feature_id"].tolist(), dict(zip(var["feature_id"], var["feature_name"], strict=True)))
    assert len(genes) == 19_331
