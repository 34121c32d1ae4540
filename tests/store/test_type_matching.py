"""Which type a label and an id stand for; worked by hand on five terms."""

import pandas as pd
import pytest

from hce_jax.hierarchy.cell_ontology import CellOntology, Term
from hce_jax.store.type_matching import TypeMatcher

TERMS = {
    "CL:0000001": Term("T cell", synonyms=("T lymphocyte",)),
    "CL:0000002": Term("B cell"),
    "CL:0000003": Term("neuron"),
    "CL:0000004": Term("obsolete old T cell", obsolete=True, replaced_by="CL:0000001"),
    "CL:0000005": Term("obsolete lost cell", obsolete=True),
}
ONTOLOGY = CellOntology("2026-01-01", "the tests", TERMS)
TYPES = ("B cell", "T cell", "neuron X")
IDS = ("CL:0000002", "CL:0000004", "CL:0000003")


@pytest.mark.parametrize(
    ("label", "cl_id", "by_labels", "by_ids"),
    [
        ("B cell", None, "B cell", "B cell"),
        ("T lymphocyte", None, "T cell", "T cell"),
        ("old t  cell", None, "T cell", "T cell"),
        ("CL:0000001", None, "T cell", "T cell"),
        ("neuron", None, None, "neuron X"),
        ("neuron X", None, "neuron X", "neuron X"),
        ("Neuron x", None, None, None),
        ("helper", "CL:0000001", "T cell", "T cell"),
        ("helper", "CL:0000004", "T cell", "T cell"),
        ("T cell", "CL:0000002", "T cell", "B cell"),  # the label, unless both sides have ids
        ("B cell", "CL:0000005", "B cell", "B cell"),  # an id that stands for nothing
        ("T lymphocyte", "CL:0000003", None, "neuron X"),  # an id counts more than what a label stands for
        ("T lymphocyte", "unknown", "T cell", "T cell"),
        ("unknown", "unknown", None, None),
    ],
)
def test_labels_and_ids_stand_for_types(label, cl_id, by_labels, by_ids):
    for ids, expected in ((None, by_labels), (IDS, by_ids)):
        code = TypeMatcher(TYPES, ids, ONTOLOGY).match(label, cl_id)
        assert (TYPES[code] if code >= 0 else None) == expected


def test_ids_are_those_of_the_release_where_it_knows_the_type(capsys):
    matcher = TypeMatcher(TYPES, IDS, ONTOLOGY)
    assert (matcher.cl_ids, matcher.by_text) == (("CL:0000002", "CL:0000001", "CL:0000003"), ())
    matcher.warn("store")
    assert capsys.readouterr().err == ""
    matcher = TypeMatcher(TYPES, None, ONTOLOGY)
    assert (matcher.cl_ids, matcher.by_text) == (("CL:0000002", "CL:0000001", "unknown"), ("neuron X",))


def test_cells_are_matched_by_pairs_of_label_and_id():
    labels = pd.Categorical(["helper", "B cell", "helper", "B cell"])
    terms = pd.Categorical(["CL:0000002", "unknown", "CL:0000001", "CL:0000003"])
    obs = pd.DataFrame({"cell_type": labels, "cell_type_ontology_term_id": terms})
    matcher = TypeMatcher(TYPES, IDS, ONTOLOGY)
    assert matcher.codes(obs).tolist() == [0, 0, 1, 2]
    assert matcher.codes(obs[["cell_type"]]).tolist() == [-1, 0, -1, 0]
    assert matcher.codes(obs[:0]).tolist() == []


def test_types_that_the_release_takes_for_the_same_are_found_by_their_own_labels_only():
    matcher = TypeMatcher(("T cell", "T lymphocyte", "B cell"), None, ONTOLOGY)
    assert matcher.by_text == ("T cell", "T lymphocyte")
    assert [matcher.match(label, None) for label in ("T cell", "T lymphocyte", "old T cell")] == [0, 1, -1]
    assert matcher.match("helper", "CL:0000001") == -1
    assert matcher.match("helper", "CL:0000002") == 2
