import numpy as np
import pandas as pd
import pytest

from hce_jax.hierarchy import CellOntology, diff_ontology, reachability_from_edges
from hce_jax.hierarchy.cell_ontology import Term

ROOT, BIRD, DUCK, OLD_DUCK, GONE, FISH, MERGED_FISH = (f"CL:000000{number}" for number in range(1, 8))

#: A release in which "fowl" is called bird, "mallard" became duck, "dodo" went, and fish is a bird.
LATER = CellOntology(
    "2021-01-01",
    "later.obo",
    {
        ROOT: Term("animal"),
        BIRD: Term("bird", (ROOT,), synonyms=("fowl",)),
        DUCK: Term("duck", (BIRD,)),
        OLD_DUCK: Term("obsolete mallard", obsolete=True, replaced_by=DUCK),
        GONE: Term("obsolete dodo", obsolete=True),
        FISH: Term("fish", (BIRD,)),
        MERGED_FISH: Term("", obsolete=True, replaced_by=FISH),
    },
)


def test_nothing_changes_where_the_store_agrees():
    labels, ids = ["bird", "animal", "duck"], [BIRD, ROOT, DUCK]
    diff = diff_ontology(labels, ids, LATER.reachability(ids), LATER, "2021-01-01")
    assert diff.is_empty
    assert (diff.n_types, diff.n_compared, diff.n_edges_before, diff.n_edges_after) == (3, 3, 3, 3)
    assert diff.report() == (
        "3 cell types of Cell Ontology 2021-01-01, in Cell Ontology 2021-01-01 (later.obo)\n\n"
        "Edges among all types: 3 before, 3 after\n\n"
        "Nothing changes."
    )


@pytest.mark.parametrize("by_id", [True, False])
def test_every_kind_of_change_is_listed_under_the_store_s_labels(by_id):
    labels = ["animal", "fowl", "duck", "mallard", "dodo", "fish"]
    ids = [ROOT, BIRD, DUCK, OLD_DUCK, GONE, FISH]
    # as it was: all below animal, mallard below duck, and duck, wrongly, above fish
    reach = reachability_from_edges(6, [(0, 1), (0, 2), (2, 3), (0, 4), (2, 5)])
    diff = diff_ontology(labels, ids if by_id else None, reach, LATER, None)
    assert diff.renamed == (("fowl", "bird"),)
    assert [(one.given, one.cl_id, one.label, one.why) for one in diff.replaced] == [
        ("mallard", DUCK, "duck", "obsolete, replaced")
    ]
    assert diff.united == ((("duck", "mallard"), "duck"),)
    assert [label for label, _ in diff.missing] == ["dodo"]
    assert "CL:0000005 (obsolete dodo) is obsolete" in diff.missing[0][1]
    # among animal, fowl and fish
    assert (diff.n_types, diff.n_compared, diff.n_edges_before, diff.n_edges_after) == (6, 3, 2, 3)
    assert (diff.added, diff.removed) == ((("fowl", "fish"),), ())
    assert not diff.is_empty
    assert diff.report() == (
        "6 cell types of an unrecorded release of the Cell Ontology, in Cell Ontology 2021-01-01 (later.obo)\n\n"
        "Renamed (1):\n  fowl -> bird\n\n"
        "Obsolete or merged (1):\n  mallard -> duck (CL:0000003; obsolete, replaced)\n\n"
        "Become one (1):\n  duck; mallard -> duck\n\n"
        "Not found (1):\n  dodo: CL:0000005 (obsolete dodo) is obsolete and no current type replaces it\n\n"
        "Edges among 3 of 6 types (left out: not found, or become one): 2 before, 3 after\n  + fowl > fish"
    )


def test_merged_ids_are_replaced_and_edges_that_went_are_listed():
    labels = ["animal", "pisces", "bird"]
    reach = reachability_from_edges(3, [(0, 1), (0, 2), (1, 2)])
    diff = diff_ontology(labels, [ROOT, MERGED_FISH, BIRD], reach, LATER, None)
    assert [(one.given, one.cl_id, one.why) for one in diff.replaced] == [("pisces", FISH, "merged")]
    assert diff.renamed == ()
    assert (diff.added, diff.removed) == ((("bird", "pisces"),), (("pisces", "bird"),))
    assert diff.report().endswith("3 before, 3 after\n  + bird > pisces\n  - pisces > bird")


@pytest.mark.parametrize(
    ("ids", "line"),
    [
        (None, '  "anmal" is no label, exact synonym or id; the nearest: "animal"'),
        (["CL:0000099", BIRD], '  anmal: "CL:0000099" is no label, exact synonym or id'),
    ],
)
def test_a_type_that_is_not_found_is_no_error_and_comes_with_suggestions(ids, line):
    diff = diff_ontology(["anmal", "bird"], ids, reachability_from_edges(2, [(0, 1)]), LATER, "2020-01-01")
    assert f"Not found (1):\n{line}\n" in diff.report()
    assert "Edges among 1 of 2 types (left out: not found, or become one): 0 before, 0 after" in diff.report()


def test_a_store_of_which_nothing_is_found_still_has_a_report():
    diff = diff_ontology(["x1", "x2"], None, np.eye(2), LATER, None)
    assert (diff.n_compared, len(diff.missing)) == (0, 2)
    assert "Edges among 0 of 2 types (left out" in diff.report()


# ---------------------------------------------------------------------------------------------------- real data


@pytest.fixture(scope="module")
def types(real_dir):
    """The 164 published types."""
    return pd.read_csv(real_dir / "sctab_cell_types.csv", keep_default_na=False)


@pytest.fixture(scope="module")
def default():
    return CellOntology.open()


def test_the_published_types_in_the_default_release_by_id(real_dir, types, default):
    labels, reach = list(types["label"]), np.load(real_dir / "child_matrix_164.npy")
    diff = diff_ontology(labels, list(types["cl_id"]), reach, default, "2022-12-15")
    renamed = types[types["status_in_cl_2026_03_26"] != "same"]
    renamed = renamed[renamed["replaced_by"] == ""]
    assert diff.renamed == tuple(zip(renamed["label"], renamed["label_in_cl_2026_03_26"], strict=True))
    assert len(diff.renamed) == 16
    gone = types[types["replaced_by"] != ""]
    assert [(one.given, one.cl_id) for one in diff.replaced] == list(
        zip(gone["label"], gone["replaced_by"], strict=True)
    )
    assert len(diff.replaced) == 2
    assert diff.missing == diff.united == ()
    wide = "caudal ganglionic eminence derived GABAergic cortical interneuron"
    gains = [f"{marker} GABAergic cortical interneuron" for marker in ("lamp5", "sncg", "vip")]
    assert set(diff.added) == {("exhausted T cell", "T follicular helper cell"), *((wide, each) for each in gains)}
    assert diff.removed == (
        ("pvalb GABAergic cortical interneuron", "chandelier pvalb GABAergic cortical interneuron"),
    )
    assert (diff.n_compared, diff.n_edges_before, diff.n_edges_after) == (164, 381, 384)


def test_the_published_types_in_the_default_release_by_label(real_dir, types, default):
    reach = np.load(real_dir / "child_matrix_164.npy")
    diff = diff_ontology(list(types["label"]), None, reach, default, None)
    assert (len(diff.renamed), len(diff.replaced), len(diff.missing)) == (9, 2, 7)
    assert diff.n_compared == 157
    assert all("the nearest: " in why for _, why in diff.missing)


def test_nothing_changes_for_the_published_types_in_the_release_of_2022(real_dir, types):
    published = CellOntology.open(real_dir / "ontology" / "cl-simple-2022-12-15.obo.gz")
    reach = np.load(real_dir / "child_matrix_164.npy")
    assert diff_ontology(list(types["label"]), list(types["cl_id"]), reach, published, "2022-12-15").is_empty
