import dataclasses

import networkx as nx
import numpy as np
import pandas as pd
import pytest
from cellxgene_ontology_guide.ontology_parser import OntologyParser
from memory_source import TYPES, MemorySource, many_cells

from hce_jax.errors import OntologyError, SourceError
from hce_jax.hierarchy import CellOntology, Mapped
from hce_jax.hierarchy.cell_ontology import DEPTH_WITNESSES, Term
from hce_jax.store.cell_source import TERM_COLUMN, TEXT_COLUMNS, UNKNOWN
from hce_jax.store.selection import PUBLISHED_ASSAYS, Rules, select_cells
from hce_jax.store.split_cells import SplitTable

ANY = Rules(primary=False, assays=None, below=None, min_cells=0, min_tech_samples=0, min_ancestors=0)


def ladder(step):
    """A type with step + 1 ancestors: cell, native cell, and the lower steps."""
    return f"CL:900000{step}"


#: The ids of the types that cells have here; "just" has 8 ancestors, "almost" 7.
TOY_TYPES = {"just": "CL:9100001", "almost": "CL:9100002", "Deep": "CL:9100003", "deeper": "CL:9100004",
             "malignant": "CL:9100005", "native cell": "CL:0000003", "cell": "CL:0000000"}  # fmt: skip
TOY = CellOntology(
    "toy",
    "toy.obo",
    {
        "CL:0000000": Term("cell"),
        "CL:0000003": Term("native cell", ("CL:0000000",)),
        ladder(1): Term("step 1", ("CL:0000003",)),
        **{ladder(step): Term(f"step {step}", (ladder(step - 1),)) for step in range(2, 9)},
        "CL:9100001": Term("just", (ladder(6),), synonyms=("barely",)),
        "CL:9100002": Term("almost", (ladder(5),)),
        "CL:9100003": Term("Deep", (ladder(8), "CL:9100002")),
        "CL:9100004": Term("deeper", ("CL:9100003",)),
        "CL:9100005": Term("malignant", ("CL:0000000",)),
        "CL:9200001": Term("obsolete abyss", obsolete=True, replaced_by="CL:9100003"),
        "CL:9200002": Term("", obsolete=True, replaced_by="CL:9100004"),
        **{witness: Term(f"witness {witness}", (ladder(8),)) for witness in DEPTH_WITNESSES},
    },
)


def toy_cells(n_cells=1_500, seed=0):
    obs = many_cells(n_cells, seed)
    labels = np.random.default_rng(seed).choice(
        [*TOY_TYPES, UNKNOWN], n_cells, p=[0.05, 0.28, 0.35, 0.01, 0.22, 0.03, 0.03, 0.03]
    )
    obs["cell_type"], obs[TERM_COLUMN] = labels, [TOY_TYPES.get(label, UNKNOWN) for label in labels]
    return obs


def few_cells(**columns):
    """Cells that are alike but for these columns."""
    n_cells = max(map(len, columns.values()))
    obs = many_cells(n_cells)
    alike = {name: [obs[name].iloc[0]] * n_cells for name in TEXT_COLUMNS if name != "cell_type"}
    obs = obs.assign(**alike | {"assay": "10x 3' v3", "is_primary_data": True, "cell_type": "Deep"})
    obs[TERM_COLUMN] = "CL:9100003"
    return obs.assign(**columns)


def without_terms(obs):
    return obs.drop(columns=[TERM_COLUMN])


def by_pandas(obs, rules, ancestors):
    """The rules on a table of text, with the numbers of cells and labels after each; a type's ancestors are given."""
    left = [(len(obs), obs["cell_type"].nunique())]
    obs = obs.assign(row=np.arange(len(obs)), tech_sample=obs["dataset_id"] + "_" + obs["donor_id"])
    if rules.primary:
        obs = obs[obs["is_primary_data"]]
        left.append((len(obs), obs["cell_type"].nunique()))
    for column, names in (("assay", rules.assays), ("tissue_general", rules.tissues)):
        if names:
            obs = obs.query(f"{column} in @names")
            left.append((len(obs), obs["cell_type"].nunique()))
    obs = obs[obs[TERM_COLUMN] != "unknown"]
    left.append((len(obs), obs["cell_type"].nunique()))
    about = obs.groupby(TERM_COLUMN).agg(cells=("row", "size"), samples=("tech_sample", "nunique"))
    about["above"] = [ancestors(cl_id) for cl_id in about.index]
    refused = set()
    for wrong in (
        [rules.below not in above for above in about["above"]] if rules.below else None,
        about["cells"] < rules.min_cells,
        about["samples"] < rules.min_tech_samples,
        about["above"].map(len) < rules.min_ancestors if rules.min_ancestors else None,
    ):
        if wrong is not None:
            refused |= set(about.index[wrong])
            kept = obs[~obs[TERM_COLUMN].isin(refused)]
            left.append((len(kept), kept["cell_type"].nunique()))
    return kept.reset_index(drop=True), left


def check_same(selection, expected, left):
    """The selection holds the expected cells, in codes whose categories are sorted and all used."""
    assert [(step.cells, step.types) for step in selection.steps] == left
    for column in ("row", "soma_joinid", "is_primary_data"):
        np.testing.assert_array_equal(selection.obs[column], expected[column])
    for column in (*TEXT_COLUMNS, "tech_sample"):
        categories = list(selection.obs[column].cat.categories)
        assert categories == sorted(set(expected[column]))
        np.testing.assert_array_equal(np.array(categories)[selection.obs[column].cat.codes], expected[column])
    ids = dict(zip(expected["cell_type"], expected[TERM_COLUMN], strict=True))
    assert selection.cl_ids == tuple(ids[label] for label in sorted(ids))
    assert set(selection.obs.columns) == {"row", "soma_joinid", "is_primary_data", *TEXT_COLUMNS, "tech_sample"}


PUBLISHED = Rules(below="CL:0000003", min_cells=40, min_tech_samples=10, min_ancestors=8)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"primary": False, "assays": None},
        {"assays": ("Smart-seq2", "10x 3' v2"), "tissues": ("blood", "liver"), "min_tech_samples": 6},
        {"below": None, "min_cells": 300},
        {"min_ancestors": 9},
        {"min_cells": 0, "min_tech_samples": 0, "min_ancestors": 0, "below": None},
    ],
    ids=str,
)
def test_the_rules_choose_what_pandas_chooses_with_the_same_counts_after_each(seed, changes):
    rules = dataclasses.replace(PUBLISHED, **changes)
    graph = nx.DiGraph((child, parent) for child, term in TOY.terms.items() for parent in term.parents)
    source = MemorySource(toy_cells(seed=seed))
    expected, left = by_pandas(source.obs, rules, lambda cl_id: nx.descendants(graph, cl_id))
    assert 0 < len(expected) < len(source.obs)
    selection = select_cells(source, rules, TOY)
    check_same(selection, expected, left)
    assert selection.datasets == tuple(sorted(set(source.obs["dataset_id"])))
    assert selection.notes == selection.mapped == ()
    assert source.reads == []


def test_types_of_a_real_release_are_chosen_by_their_place_in_it():
    parser = OntologyParser()
    rules = Rules(below="CL:0000542", min_cells=30, min_tech_samples=8, min_ancestors=10)  # lymphocyte
    source = MemorySource(many_cells(900))
    expected, left = by_pandas(
        source.obs, rules, lambda cl_id: set(parser.get_term_ancestors(cl_id, include_self=False))
    )
    assert {"CD4-positive, alpha-beta T cell"} < set(expected["cell_type"]) < set(TYPES)
    check_same(select_cells(source, rules, CellOntology.open()), expected, left)


def test_a_type_passes_that_just_reaches_each_number_and_one_that_misses_one_does_not():
    donors = [f"D{donor}" for donor in range(31)]

    def chosen(label, cells, samples):
        obs = few_cells(donor_id=[donors[number % samples] for number in range(cells)])
        obs["cell_type"], obs[TERM_COLUMN] = label, TOY_TYPES[label]
        beside = few_cells(donor_id=[donors[number % 31] for number in range(50)])
        source = MemorySource(pd.concat([obs, beside], ignore_index=True))
        return label in set(select_cells(source, Rules(min_cells=40), TOY).obs["cell_type"])

    assert chosen("just", 40, 31)
    assert not chosen("just", 39, 31)
    assert not chosen("just", 40, 30)
    assert not chosen("almost", 40, 31)  # has 7 ancestors
    assert not chosen("native cell", 40, 31)  # does not lie below itself


def test_the_published_numbers_are_the_defaults():
    rules = Rules()
    assert rules == Rules(True, PUBLISHED_ASSAYS, None, "native cell", 5_000, 31, None)
    source = MemorySource(few_cells(donor_id=[f"D{number % 31}" for number in range(5_000)]), batch_sizes=(5_000,))
    assert [step.rule for step in select_cells(source, rules, TOY).steps] == [
        "in memory",
        "primary data",
        "of these assays",
        "with a cell type",
        "below native cell",
        "at least 5,000 cells",
        "at least 31 tech_samples",
        "at least 8 ancestors",
    ]


@pytest.mark.parametrize("batch_sizes", [(1,), (7, 0, 30), (59, 1), (10_000,), (0, 30)], ids=str)
def test_the_selection_does_not_depend_on_how_the_source_cuts_its_batches(batch_sizes):
    obs = toy_cells(60)
    rules = dataclasses.replace(PUBLISHED, min_cells=3, min_tech_samples=3)
    ours, other = (select_cells(MemorySource(obs, batch_sizes=sizes), rules, TOY) for sizes in (batch_sizes, (97,)))
    pd.testing.assert_frame_equal(ours.obs, other.obs)
    for name in ("cl_ids", "datasets", "steps", "mapped", "notes"):
        assert getattr(ours, name) == getattr(other, name)


def test_neither_the_source_s_table_nor_its_batches_are_changed():
    source = MemorySource(toy_cells(300))
    before, batches = source.obs.copy(), list(source.obs_batches())
    copies = [batch.copy() for batch in batches]
    source.obs_batches = lambda: iter(batches)
    splits = pd.DataFrame({"split": "val", "cell_type": "Deep"}, index=before["soma_joinid"])
    select_cells(source, ANY, TOY, SplitTable("table", splits))
    pd.testing.assert_frame_equal(source.obs, before)
    for batch, copy in zip(batches, copies, strict=True):
        pd.testing.assert_frame_equal(batch, copy)


def test_labels_ids_and_both_together_say_the_same():
    obs = toy_cells(300)
    by_both = select_cells(MemorySource(obs), ANY, TOY)
    mixed = obs["cell_type"].where(np.arange(300) % 2 == 0, obs[TERM_COLUMN])
    for labels in (obs["cell_type"], obs[TERM_COLUMN], mixed):
        selection = select_cells(MemorySource(without_terms(obs).assign(cell_type=labels)), ANY, TOY)
        pd.testing.assert_frame_equal(selection.obs, by_both.obs)
        assert selection.cl_ids == by_both.cl_ids
        assert selection.mapped == ()


def test_where_there_are_ids_the_labels_beside_them_do_not_count():
    obs = few_cells(cell_type=["Deep", "deeper", "just"])
    obs[TERM_COLUMN] = ["CL:9100001", "CL:9100001", "CL:9100002"]
    selection = select_cells(MemorySource(obs), ANY, TOY)
    assert selection.obs["cell_type"].tolist() == ["just", "just", "almost"]
    assert selection.cl_ids == ("CL:9100002", "CL:9100001")
    assert [each.given for each in selection.mapped] == ["Deep", "deeper", "just"]


def test_names_of_one_type_become_one_type_and_are_told():
    names = ["Deep", "abyss", "obsolete abyss", "CL:9200001", "CL:9200002", "deeper", "barely", "DEEP", "malignant"]
    obs = without_terms(few_cells(cell_type=names, donor_id=[f"D{number}" for number in range(9)]))
    selection = select_cells(MemorySource(obs), dataclasses.replace(ANY, below="native cell", min_cells=2), TOY)
    assert selection.obs["cell_type"].tolist() == ["Deep"] * 4 + ["deeper"] * 2 + ["Deep"]
    assert selection.obs["row"].tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert selection.cl_ids == ("CL:9100003", "CL:9100004")
    assert [step.types for step in selection.steps] == [9, 9, 3, 2, 2]
    assert sorted(selection.mapped, key=lambda each: each.given) == [  # not "barely": that type is not taken
        Mapped("CL:9200001", "CL:9100003", "Deep", "obsolete, replaced"),
        Mapped("CL:9200002", "CL:9100004", "deeper", "merged"),
        Mapped("DEEP", "CL:9100003", "Deep", "letter case or blanks"),
        Mapped("abyss", "CL:9100003", "Deep", "obsolete, replaced"),
        Mapped("obsolete abyss", "CL:9100003", "Deep", "obsolete, replaced"),
    ]


def test_ids_that_were_replaced_and_labels_that_were_renamed_are_told():
    obs = few_cells(cell_type=["deep", "Deep", "deeper", "old word", "gone"])
    obs[TERM_COLUMN] = ["CL:9100003", "CL:9100003", "CL:9200002", "CL:9200001", "CL:9100005"]
    selection = select_cells(MemorySource(obs), dataclasses.replace(ANY, below="native cell"), TOY)
    assert selection.obs["cell_type"].tolist() == ["Deep", "Deep", "deeper", "Deep"]
    assert sorted(selection.mapped, key=lambda each: each.given) == [
        Mapped("CL:9200001", "CL:9100003", "Deep", "obsolete, replaced"),
        Mapped("CL:9200002", "CL:9100004", "deeper", "merged"),
        Mapped("deep", "CL:9100003", "Deep", "renamed"),
        Mapped("old word", "CL:9100003", "Deep", "renamed"),
    ]
    assert "mapped      old word -> Deep (CL:9100003; renamed)" in selection.report().splitlines()


def test_types_are_sorted_as_plain_strings_capitals_first():
    selection = select_cells(MemorySource(toy_cells(300)), ANY, TOY)
    assert list(selection.obs["cell_type"].cat.categories) == [
        "Deep", "almost", "cell", "deeper", "just", "malignant", "native cell"]  # fmt: skip
    assert selection.obs["dataset_id"].cat.categories[0] == "Brain"


def test_cells_of_unknown_type_are_left_out_and_counted():
    obs = few_cells(cell_type=["Deep", "unknown", "Deep", "unknown", "unknown"])
    for given in (without_terms(obs), obs.assign(**{TERM_COLUMN: obs["cell_type"].replace({"Deep": "CL:9100003"})})):
        selection = select_cells(MemorySource(given), ANY, TOY)
        assert selection.obs["row"].tolist() == [0, 2]
        assert [(step.rule, step.cells) for step in selection.steps][:2] == [("in memory", 5), ("with a cell type", 2)]


def test_a_label_that_is_no_type_is_refused():
    with pytest.raises(OntologyError, match=r'"Dep" is no label.*the nearest: "Deep"'):
        select_cells(MemorySource(without_terms(few_cells(cell_type=["Dep", "Deep"]))), ANY, TOY)


def test_donors_of_studies_are_tech_samples_and_one_name_is_one_sample():
    obs = few_cells(dataset_id=["a", "a_b", "a", "b"], donor_id=["b_c", "c", "x", "x"])
    selection = select_cells(MemorySource(obs), dataclasses.replace(ANY, min_tech_samples=3), TOY)
    assert list(selection.obs["tech_sample"].cat.categories) == ["a_b_c", "a_x", "b_x"]
    assert selection.obs["tech_sample"].tolist() == ["a_b_c", "a_b_c", "a_x", "b_x"]
    with pytest.raises(SourceError, match="at least 4 tech_samples"):
        select_cells(MemorySource(obs), dataclasses.replace(ANY, min_tech_samples=4), TOY)


def test_the_rule_of_ancestors_is_off_where_the_release_is_not_deep_enough_unless_it_is_asked_for():
    source, ontology = MemorySource(many_cells(200)), CellOntology.open()
    rules = dataclasses.replace(ANY, min_ancestors=None)
    selection = select_cells(source, rules, ontology)
    assert selection.notes == (
        f"the published rule of at least 8 ancestors is off: Cell Ontology {ontology.release} ({ontology.source}) "
        "lists fewer ancestors than the release for which it was made",
    )
    assert not any("ancestors" in step.rule for step in selection.steps)
    assert "neuron" in set(selection.obs["cell_type"])
    asked = select_cells(source, dataclasses.replace(rules, min_ancestors=8), ontology)
    assert asked.notes == ()
    assert asked.steps[-1].rule == "at least 8 ancestors"
    assert "neuron" not in set(asked.obs["cell_type"])  # has 6


def test_a_type_whose_label_is_obsolete_can_be_the_one_above():
    labels = ["cell", "T cell", "neuron"]
    source = MemorySource(without_terms(few_cells(cell_type=labels)))
    ontology = CellOntology.open()
    selection = select_cells(source, dataclasses.replace(ANY, below="native cell"), ontology)
    assert selection.obs["cell_type"].tolist() == ["T cell", "neuron"]
    assert selection.notes == (f"native cell is cell in Cell Ontology {ontology.release} (obsolete, replaced)",)
    assert [step.rule for step in selection.steps][2] == "below cell"
    with pytest.raises(OntologyError, match="captive cell"):
        select_cells(source, dataclasses.replace(ANY, below="captive cell"), ontology)


@pytest.mark.parametrize(
    ("changes", "columns", "counts"),
    [
        ({"primary": True}, {"is_primary_data": [False] * 3}, ["in memory 3", "primary data 0"]),
        (
            {"assays": ("a",), "tissues": ("b",)},
            {"assay": ["a", "c", "c"], "tissue_general": ["d", "b", "b"]},
            ["in memory 3", "of these assays 1", "of these tissues 0"],
        ),
        (
            {},
            {"cell_type": ["unknown"] * 3, TERM_COLUMN: ["unknown"] * 3},
            ["in memory 3", "with a cell type 0"],
        ),
        ({"below": "just"}, {}, ["in memory 3", "with a cell type 3", "below just 0"]),
        (
            {"below": "cell", "min_cells": 4_000},
            {},
            ["in memory 3", "with a cell type 3", "below cell 3", "at least 4,000 cells 0"],
        ),
        (
            {"min_tech_samples": 2},
            {},
            ["in memory 3", "with a cell type 3", "at least 0 cells 3", "at least 2 tech_samples 0"],
        ),
        (
            {"min_ancestors": 99},
            {},
            [
                "in memory 3",
                "with a cell type 3",
                "at least 0 cells 3",
                "at least 0 tech_samples 3",
                "at least 99 ancestors 0",
            ],
        ),
    ],
    ids=["primary", "tissues", "unknown", "below", "cells", "samples", "ancestors"],
)
def test_an_empty_result_names_the_rule_that_took_the_last_cells_with_the_counts_after_each(changes, columns, counts):
    source = MemorySource(few_cells(**{"disease": ["normal"] * 3} | columns), batch_sizes=(2,))
    with pytest.raises(SourceError) as caught:
        select_cells(source, dataclasses.replace(ANY, **changes), TOY)
    rule = counts[-1].removesuffix(" 0")
    left = "; ".join(counts)
    said = str(caught.value)
    assert said.startswith(f"no cell is left after the rule {rule!r} (--")
    assert said.endswith(f"); cells left after each rule: {left}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"assays": ("10x 3' v3", "10x 3'v2")},
            """the assay "10x 3'v2"; its cells have "10x 3' v3", 'unknown'; name some of these, or take any """
            "(--assays any)",
        ),
        (
            {"tissues": ("bloody", "blood", "bone")},
            "the tissue 'bloody' or 'bone'; its cells have 'blood'; name some of these, or take any (--tissues any)",
        ),
        (
            {"assays": PUBLISHED_ASSAYS[:1]},
            """the assay "10x 5' v2"; its cells have "10x 3' v3", 'unknown'; name some of these, or take any """
            "(--assays any)",
        ),
    ],
    ids=["an assay beside a right one", "tissues", "a published assay"],
)
def test_names_that_no_cell_has_are_refused_with_those_that_there_are(changes, message):
    obs = few_cells(assay=["10x 3' v3", "10x 3' v3", "unknown"], tissue_general=["blood"] * 3)
    with pytest.raises(SourceError) as caught:
        select_cells(MemorySource(obs), dataclasses.replace(ANY, **changes), TOY)
    assert str(caught.value) == f"no cell of memory has {message}"


def test_of_the_published_assays_some_may_be_missing():
    obs = few_cells(assay=["10x 3' v3", "Smart-seq2", "10x 5' v1"])
    selection = select_cells(MemorySource(obs), dataclasses.replace(ANY, assays=PUBLISHED_ASSAYS), TOY)
    assert selection.obs["row"].tolist() == [0, 2]


@pytest.mark.parametrize("batch_sizes", [(1,), (0,)], ids=["no batch", "an empty batch"])
def test_a_source_without_cells_is_refused(batch_sizes):
    source = MemorySource(toy_cells(10).iloc[:0])
    if batch_sizes == (0,):
        batch = next(MemorySource(toy_cells(10)).obs_batches()).iloc[:0]
        source.obs_batches = lambda: iter([batch])
    with pytest.raises(SourceError, match="memory has no cells"):
        select_cells(source, Rules(), TOY)


def test_a_table_of_splits_chooses_cells_and_may_label_them():
    obs = toy_cells(400)
    named = obs["soma_joinid"][::-3]
    splits = np.resize(["val", "train"], len(named))
    table = pd.DataFrame({"split": splits}, index=named)
    selection = select_cells(MemorySource(obs), ANY, TOY, SplitTable("mine.csv", table))
    known = obs[TERM_COLUMN].isin(TOY_TYPES.values()) & obs["soma_joinid"].isin(named)
    assert selection.obs["soma_joinid"].tolist() == obs["soma_joinid"][known].tolist()
    assert selection.obs["split"].tolist() == table["split"].loc[selection.obs["soma_joinid"]].tolist()
    assert selection.steps[:3] == (
        ("in memory", 400, obs["cell_type"].nunique()),
        ("in mine.csv", len(named), obs["cell_type"][named.index].nunique()),
        ("with a cell type", known.sum(), len(TOY_TYPES)),
    )
    labels = np.resize(["deeper", "just", "CL:9100003"], len(named))
    selection = select_cells(MemorySource(obs), ANY, TOY, SplitTable("mine.csv", table.assign(cell_type=labels)))
    assert selection.obs["soma_joinid"].tolist() == sorted(named)  # whatever their own label
    expected = pd.Series(labels, index=named).replace({"CL:9100003": "Deep"}).sort_index()
    assert selection.obs["cell_type"].tolist() == expected.tolist()
    assert selection.cl_ids == ("CL:9100003", "CL:9100004", "CL:9100001")


def test_the_report_has_a_line_for_each_rule_and_note():
    selection = select_cells(MemorySource(many_cells(200)), Rules(min_cells=1, min_tech_samples=1), CellOntology.open())
    head, *lines = selection.report().splitlines()
    assert head.split() == ["cells", "types", "left", "after", "each", "rule"]
    for line, step in zip(lines[: len(selection.steps)], selection.steps, strict=True):
        assert line.split(maxsplit=2) == [str(step.cells), str(step.types), step.rule]
    assert lines[len(selection.steps) :] == [f"note        {note}" for note in selection.notes]


def test_the_164_published_types_pass_the_published_rules_in_their_release_and_keep_their_order(real_dir):
    ontology = CellOntology.open(real_dir / "ontology" / "cl-simple-2022-12-15.obo.gz")
    published = pd.read_csv(real_dir / "sctab_cell_types.csv")
    others = ["lymphocyte", "native cell", "malignant cell", "cell", "epithelial cell"]  # too high, or not native
    names = [*published["label"].sample(frac=1, random_state=0), *others]
    source = MemorySource(without_terms(few_cells(cell_type=names, donor_id=[f"D{n % 9}" for n in range(len(names))])))
    selection = select_cells(source, Rules(min_cells=1, min_tech_samples=1), ontology)
    assert list(selection.obs["cell_type"].cat.categories) == published["label"].tolist()
    assert selection.cl_ids == tuple(published["cl_id"])
    assert selection.notes == selection.mapped == ()
