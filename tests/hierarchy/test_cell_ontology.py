import gzip
import importlib.metadata
import itertools
import logging
import warnings

import networkx as nx
import numpy as np
import pandas as pd
import pytest
from cellxgene_ontology_guide.ontology_parser import OntologyParser
from cellxgene_ontology_guide.supported_versions import load_ontology_file

from hce_jax.errors import OntologyError
from hce_jax.hierarchy import CellOntology, Mapped
from hce_jax.hierarchy.cell_ontology import DEPTH_WITNESSES, PUBLISHED_DEPTH, Term, _terms_of_guide

HEAD = "format-version: 1.2\ndata-version: cl/releases/2020-02-02/cl-toy.owl\nontology: cl\n"

#: Ten current types (ids 0 to 9) and what has become of others (89 and on).
TOY = (
    HEAD
    + r"""
[Term]
id: CL:0000000
name: cell

[Term]
id: CL:0000001
name: moving cell
is_a: CL:0000000 ! cell

[Term]
id: CL:0000002
name: Hollow cell
synonym: "vesicle" BROAD []
synonym: "the \"bubble\"" EXACT [PMID:1, "EXACT"]
is_a: CL:0000000 {source="PMID:1"} ! cell
is_a: GO:0000001 ! a thing that is not a cell

[Term]
id: CL:0000003
name: swimming balloon
alt_id: CL:0000095
alt_id: GO:0000009
synonym: "zeppelin" EXACT abbreviation []
synonym: "airship" RELATED []
is_a: CL:0000001 ! moving cell
is_a: CL:0000002 ! Hollow cell

[Term]
id: CL:0000004
name: small balloon
synonym: "floater" EXACT []
is_a: CL:0000003
relationship: part_of CL:0000005 ! a relation, but no is_a
relationship: develops_from CL:0000006

[Term]
id: CL:0000005
name: nest cell
synonym: "floater" EXACT []
synonym: "bare one" EXACT []
is_a: CL:0000000

[Term]
id: CL:0000006
name: twin
is_a: CL:0000000

[Term]
id: CL:0000007
name: twin
is_a: CL:0000000

[Term]
id: CL:0000008
name: left cell
synonym: "LEFTY" EXACT []
synonym: "moving cell" EXACT []
is_a: CL:0000000

[Term]
id: CL:0000009
name: LEFT CELL
is_a: CL:0000000

[Term]
id: CL:0000090
name: obsolete blimp
is_obsolete: true
replaced_by: CL:0000091

[Term]
id: CL:0000091
name: obsolete dirigible
is_obsolete: true
replaced_by: CL:0000095

[Term]
id: CL:0000092
name: obsolete dough
is_obsolete: true
consider: CL:0000001
consider: CL:0000004

[Term]
id: CL:0000093
name: obsolete round
is_obsolete: true
replaced_by: CL:0000094

[Term]
id: CL:0000094
name: obsolete about
is_obsolete: true
replaced_by: CL:0000093

[Term]
id: CL:0000096
name: obsolete trunk
is_obsolete: true
replaced_by: PO:0000079

[Term]
id: CL:0000097
name: obsolete split
is_obsolete: true
replaced_by: CL:0000004
replaced_by: CL:0000005

[Term]
id: CL:0000089
name: OBSOLETE: dwelling
is_obsolete: true
replaced_by: CL:0000005

[Term]
id: CL:0000098
name: OBSOLETE: bare one
is_obsolete: true

[Term]
id: CL:0000099
name: obsolete vesicle
is_obsolete: true
replaced_by: CL:0000002

[Term]
id: GO:0000001
name: a thing that is not a cell
is_a: CL:0000005

[Typedef]
id: part_of
name: part of
is_transitive: true
"""
)

#: The is_a edges above between types, by hand: (child, parent).
TOY_EDGES = [(1, 0), (2, 0), (3, 1), (3, 2), (4, 3), (5, 0), (6, 0), (7, 0), (8, 0), (9, 0)]


def cl(number):
    return f"CL:{number:07d}"


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    path = tmp_path_factory.mktemp("ontology") / "toy.obo"
    path.write_text(TOY, encoding="utf-8")
    return CellOntology.open(path)


@pytest.fixture(scope="module")
def default():
    return CellOntology.open()


@pytest.fixture(scope="module")
def published(real_dir):
    """The release of 2022-12-15, with which the published list and hierarchy are reproduced."""
    return CellOntology.open(real_dir / "ontology" / "cl-simple-2022-12-15.obo.gz")


@pytest.fixture(scope="module")
def types(real_dir):
    """The 164 published types."""
    return pd.read_csv(real_dir / "sctab_cell_types.csv", keep_default_na=False)


def refused(call, *args):
    """Return the message of the OntologyError, which is one line."""
    with pytest.raises(OntologyError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- the closure


def test_the_closure_of_a_small_file_is_that_of_its_is_a_edges_between_cell_types(toy):
    graph = nx.DiGraph([(cl(child), cl(parent)) for child, parent in TOY_EDGES])
    for each in graph:
        assert toy.ancestors(each) == nx.descendants(graph, each)
        assert toy.descendants(each) == nx.ancestors(graph, each)
    assert toy.ancestors(cl(4)) == {cl(3), cl(2), cl(1), cl(0)}  # not 5 (part_of, and through GO), not itself
    expected = nx.to_numpy_array(
        nx.transitive_closure(graph.reverse(), reflexive=True), nodelist=[cl(i) for i in range(10)]
    )
    order = [4, 0, 7, 2, 3, 1]
    reach = toy.reachability([cl(i) for i in order])
    assert reach.dtype == np.float32
    np.testing.assert_array_equal(reach, expected[np.ix_(order, order)])


@pytest.mark.parametrize("seed", range(3))
def test_the_closure_of_a_random_file_is_networkx_s(tmp_path, seed):
    rng = np.random.default_rng(seed)
    graph = nx.DiGraph()
    graph.add_nodes_from(rng.permutation(40).tolist())
    names = list(graph)
    graph.add_edges_from((names[i], names[j]) for i in range(40) for j in range(i + 1, 40) if rng.random() < 0.08)
    stanzas = [
        "\n".join(["[Term]", f"id: {cl(node)}", f"name: type {node}", *(f"is_a: {cl(up)}" for up in graph.pred[node])])
        for node in sorted(graph)
    ]
    (tmp_path / "random.obo").write_text("\n\n".join([HEAD, *stanzas]))
    ontology = CellOntology.open(tmp_path / "random.obo")
    chosen = rng.permutation(40)[:25].tolist()
    closure = nx.to_numpy_array(nx.transitive_closure(graph, reflexive=True), nodelist=chosen)
    np.testing.assert_array_equal(ontology.reachability([cl(each) for each in chosen]), closure)


@pytest.mark.parametrize(("release", "schema"), [("2026-03-26", "7.1.0"), ("2025-07-30", "7.0.0")])
def test_the_closure_of_a_release_of_the_package_is_the_package_s(release, schema):
    ontology = CellOntology.open(release)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        oracle = OntologyParser(schema_version=schema)
    theirs = oracle.map_term_ancestors(list(ontology.terms))
    assert len(theirs) > 3000
    extra = {each: set(theirs[each]) ^ ontology.ancestors(each) for each in theirs}
    extra = {ontology.label(each): differs for each, differs in extra.items() if differs}
    # The package reaches "cell" from eight parts of cells by way of terms outside the Cell Ontology.
    assert len(extra) == 8
    assert all(label.split()[-1] in ("cytoplasm", "nucleus", "heterochromatin") for label in extra)
    assert all(differs == {"CL:0000000"} for differs in extra.values())
    for each in ("CL:0000542", "CL:0000540"):
        assert ontology.descendants(each) == set(oracle.get_term_descendants(each))


def test_a_thousand_types_of_the_default_release_and_their_closure(default):
    ids = [each for each, term in default.terms.items() if not term.obsolete][:1000]
    reach = default.reachability(ids)
    position = {each: index for index, each in enumerate(ids)}
    for each in ids[::100]:
        below = {ids[index] for index in np.flatnonzero(reach[position[each]])}
        assert below == {each} | (default.descendants(each) & set(ids))


# ---------------------------------------------------------------------------------------------------- releases


def test_the_default_is_a_pinned_release_and_others_of_the_package_open_without_a_warning(default):
    guide = f"cellxgene-ontology-guide {importlib.metadata.version('cellxgene-ontology-guide')}"
    assert (default.release, default.source) == ("2026-03-26", guide)
    assert str(default) == f"Cell Ontology 2026-03-26 ({guide})"
    older = CellOntology.open("2025-07-30")
    assert (older.release, older.source) == ("2025-07-30", guide)
    assert CellOntology.open("v2025-07-30").release == "2025-07-30"
    assert len(older.terms) < len(default.terms)


@pytest.mark.parametrize(
    ("version", "release"),
    [
        ("cl/releases/2022-12-15/cl-simple.owl", "2022-12-15"),
        ("releases/2022-12-15", "2022-12-15"),
        ("v2022-12-15", "2022-12-15"),
        ("v3.1", "3.1"),
        ("mine", "mine"),
    ],
)
def test_the_release_of_a_file_is_what_its_data_version_says_and_its_source_is_its_name(tmp_path, version, release):
    text = TOY.replace("cl/releases/2020-02-02/cl-toy.owl", version)
    with gzip.open(tmp_path / "mine.obo.gz", "wt", encoding="utf-8") as file:
        file.write(text)
    ontology = CellOntology.open(str(tmp_path / "mine.obo.gz"))
    assert (ontology.release, ontology.source) == (release, "mine.obo.gz")


def test_an_unknown_release_or_file_is_answered_with_what_there_is(tmp_path):
    for spec in ("2022-12-15", "latest", tmp_path, tmp_path / "absent.obo", "http://example.org/cl.obo"):
        message = refused(CellOntology.open, spec)
        assert f"'{spec}'" in message
        assert "carries 2025-07-30, 2026-03-26" in message
        assert "path of an OBO file" in message


TERM = "\n[Term]\nid: CL:0000001\nname: a\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        pytest.param(b"", "does not begin with a format-version", id="empty"),
        pytest.param(b"\n \n", "does not begin with a format-version", id="blank"),
        pytest.param(b"cell,label\n1,2\n", "no whole OBO file", id="a table"),
        pytest.param(b'<?xml version="1.0"?>\n<owl/>\n', "no whole OBO file", id="OWL"),
        pytest.param(b"PK\x03\x04\xff\xfe\x00", "no whole OBO file", id="binary"),
        pytest.param(gzip.compress(TOY.encode()), "no whole OBO file", id="compressed, and named as if it were not"),
        pytest.param(TERM.encode(), "does not begin with a format-version", id="no head"),
        pytest.param(HEAD.encode(), "holds no terms of the Cell Ontology", id="no terms"),
        pytest.param((HEAD + "\n[Term]\nid: GO:0000001\nname: a\n").encode(), "holds no terms", id="another ontology"),
        pytest.param((HEAD + "\n[Term]\nname: a\n").encode(), "a term without an id", id="no id"),
        pytest.param((HEAD + TERM + "is_a\n").encode(), "no whole OBO file", id="half a line"),
        pytest.param((HEAD + TERM + "relationship: x\n").encode(), "no whole OBO file", id="half a relation"),
        pytest.param(
            (HEAD + TERM + "is_a: CL:0000002\n").encode(),
            "puts CL:0000001 below CL:0000002, which it does not hold; is the file whole?",
            id="cut off",
        ),
        pytest.param(
            (HEAD + TERM + "is_a: CL:0000002\n\n[Term]\nid: CL:0000002\nname: b\nis_a: CL:0000001\n").encode(),
            "has a cycle of is_a: CL:000000",
            id="cycle",
        ),
        pytest.param(b"format-version: 1.2\n" + TERM.encode(), "data-version", id="no release"),
    ],
)
def test_a_file_that_is_no_sound_obo_file_is_refused_in_one_line(tmp_path, content, says, caplog, capfd):
    path = tmp_path / "bad.obo"
    path.write_bytes(content)
    message = refused(CellOntology.open, path)
    assert says in message
    assert str(path) in message
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
    assert logging.root.manager.disable == logging.NOTSET


@pytest.mark.parametrize("content", [TOY.encode(), gzip.compress(TOY.encode())[:-40], b"\x1f\x8b" + b"\x08" * 50])
def test_a_damaged_compressed_file_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "bad.obo.gz").write_bytes(content)
    assert "no whole OBO file" in refused(CellOntology.open, tmp_path / "bad.obo.gz")


# ---------------------------------------------------------------------------------------------------- names


def test_labels_and_ids_may_be_mixed_and_current_ones_are_not_recorded(toy):
    found = toy.resolve(["small balloon", "CL:0000001", "Hollow cell", "LEFT CELL", "left cell"])
    assert found.cl_ids == (cl(4), cl(1), cl(2), cl(9), cl(8))
    assert found.mapped == ()
    assert toy.resolve([]).cl_ids == ()


@pytest.mark.parametrize(
    ("name", "number", "why"),
    [
        pytest.param("CL:0000090", 3, "obsolete, replaced", id="an obsolete id, by two steps and a merged one"),
        pytest.param("obsolete blimp", 3, "obsolete, replaced", id="its label"),
        pytest.param("blimp", 3, "obsolete, replaced", id="the label it had"),
        pytest.param("dwelling", 5, "obsolete, replaced", id="the label it had before a shouted OBSOLETE:"),
        pytest.param("Blimp", 3, "obsolete, replaced", id="in another case"),
        pytest.param("CL:0000095", 3, "merged", id="alt_id"),
        pytest.param("zeppelin", 3, "synonym", id="exact synonym of a kind"),
        pytest.param('the "bubble"', 2, "synonym", id="exact synonym with escaped quotation marks"),
        pytest.param("hollow cell", 2, "letter case or blanks", id="label in small letters"),
        pytest.param("Zeppelin", 3, "synonym, letter case or blanks", id="synonym with a capital"),
        pytest.param("lefty", 8, "synonym, letter case or blanks", id="synonym in small letters"),
        pytest.param("bare one", 5, "synonym", id="synonym, and obsolete elsewhere without a replacement"),
        pytest.param("vesicle", 2, "obsolete, replaced", id="the broad synonym that was a type"),
    ],
)
def test_other_names_of_a_type_are_followed_and_recorded(toy, name, number, why):
    found = toy.resolve(["cell", name])
    assert found.cl_ids == (cl(0), cl(number))
    assert found.mapped == (Mapped(name, cl(number), toy.label(cl(number)), why),)
    assert toy.find(name) == found.mapped[0]


def test_only_ids_of_the_cell_ontology_are_held(toy):
    assert set(toy.terms) == {cl(number) for number in (*range(10), *range(89, 100))}


def test_a_label_comes_before_a_synonym_of_another_type(toy):
    assert toy.find("moving cell") == Mapped("moving cell", cl(1), "moving cell", "")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        pytest.param("airship", '"airship" is no label, exact synonym or id', id="a synonym that is not exact"),
        pytest.param("Small baloon", '; the nearest: "small balloon", "swimming balloon"', id="near two labels"),
        pytest.param("zepelin", '; the nearest: "swimming balloon"', id="near a synonym"),
        pytest.param("TWINN", '; the nearest: "twin"', id="near in another case"),
        pytest.param("CL:0000077", '"CL:0000077" is no label, exact synonym or id', id="unknown id"),
        pytest.param("GO:0000001", '"GO:0000001" is no label', id="id of another ontology"),
        pytest.param("CL:3", '"CL:3" is no label', id="too short for an id"),
        pytest.param("", '"" is no label', id="empty"),
        pytest.param("twin", "2 types, CL:0000006 (twin), CL:0000007 (twin): give the id of one", id="equal labels"),
        pytest.param("floater", "CL:0000004 (small balloon), CL:0000005 (nest cell)", id="synonym of two types"),
        pytest.param("Left Cell", "CL:0000008 (left cell), CL:0000009 (LEFT CELL)", id="labels equal but for case"),
        pytest.param(
            "CL:0000092",
            "CL:0000092 (obsolete dough) is obsolete and no current type replaces it; "
            "consider CL:0000001 (moving cell), CL:0000004 (small balloon)",
            id="obsolete id, things to consider",
        ),
        pytest.param("dough", "CL:0000092 (obsolete dough) is obsolete", id="obsolete label"),
        pytest.param("round", "replaces it (replaced by CL:0000094 (obsolete about))", id="replaced in a circle"),
        pytest.param("CL:0000096", "replaces it (replaced by PO:0000079)", id="replaced by another ontology's"),
        pytest.param(
            "split", "; consider CL:0000004 (small balloon), CL:0000005 (nest cell)", id="replaced by two types"
        ),
    ],
)
def test_a_name_without_a_single_current_type_is_refused_with_what_to_do(toy, name, says):
    message = refused(toy.resolve, ["cell", name])
    assert message.startswith("Cell Ontology 2020-02-02 (toy.obo): ")
    assert says in message
    assert toy.find(name) is None
    assert toy.explain(name) in message


def test_of_several_unusable_names_the_first_are_explained_and_all_are_counted(toy):
    message = refused(toy.resolve, ["cell", "twinn", "xyz 1", "dough", "xyz 2", "xyz 3"])
    assert "5 of 6 names cannot be used" in message
    assert all(f'"{name}"' in message for name in ("twinn", "xyz 1", "twin"))
    assert "CL:0000092 (obsolete dough)" in message
    assert message.endswith("; and 2 more")
    assert "xyz 2" not in message


def test_suggestions_are_at_most_three_current_labels(default):
    message = default.explain("Naive CD4 T cells")
    assert 1 <= message.count('"') / 2 - 1 <= 3
    assert '"macrophage"' in default.explain("macrofage")


def test_an_unknown_id_is_refused_wherever_it_is_given(toy):
    for call in (toy.label, toy.ancestors, toy.descendants, lambda each: toy.reachability([cl(0), each])):
        assert '"CL:0000077" is no id of the Cell Ontology 2020-02-02' in refused(call, "CL:0000077")
    assert "merged into CL:0000003 (swimming balloon)" in refused(toy.label, cl(95))


def test_an_id_given_twice_has_no_reachability_matrix(toy):
    message = refused(toy.reachability, [cl(4), cl(0), cl(4)])
    assert "CL:0000004 (small balloon) is given twice, as types 0 and 2" in message


def test_an_obsolete_id_is_a_type_without_relations(toy):
    np.testing.assert_array_equal(toy.reachability([cl(0), cl(90), cl(3)]), [[1, 0, 1], [0, 1, 0], [0, 0, 1]])
    assert toy.label(cl(90)) == "obsolete blimp"


# ---------------------------------------------------------------------------------------------------- published depth


def a_chain_with_witnesses(shallow=None):
    """Eight types, one below the other, and the witnesses below the last; one of them below the last but one."""
    chain = [cl(9000000 + step) for step in range(PUBLISHED_DEPTH + 1)]
    terms = {each: Term(each, (above,)) for above, each in itertools.pairwise(chain)}
    terms |= {witness: Term(witness, (chain[-2 if witness == shallow else -1],)) for witness in DEPTH_WITNESSES}
    return CellOntology("1", "a chain", {chain[0]: Term("top"), **terms})


def test_the_depth_is_the_published_one_only_where_every_witness_is_deep_enough(toy, default):
    assert a_chain_with_witnesses().has_published_depth
    for witness in DEPTH_WITNESSES:
        assert not a_chain_with_witnesses(shallow=witness).has_published_depth
    assert not default.has_published_depth
    assert not toy.has_published_depth  # it lacks the witnesses


# ---------------------------------------------------------------------------------------------------- real data


def test_the_witnesses_of_the_published_depth_say_what_all_164_types_say(published, types):
    every = {"2022-12-15": published}
    for release in ("2025-02-13", "2025-04-10", "2025-07-30", "2026-03-26"):  # all files in the package
        file = load_ontology_file(f"CL-ontology-v{release}.json.zst")
        every[release] = CellOntology(release, "the package", _terms_of_guide(file))
    assert set(DEPTH_WITNESSES) <= set(types["cl_id"])
    depths = {name: [len(each.ancestors(cl_id)) for cl_id in types["cl_id"]] for name, each in every.items()}
    assert depths["2022-12-15"] == list(types["n_ancestors_cl_simple_2022_12_15"])
    verdicts = {name: min(depth) > PUBLISHED_DEPTH for name, depth in depths.items()}
    assert {name: each.has_published_depth for name, each in every.items()} == verdicts
    assert [name for name, verdict in verdicts.items() if verdict] == ["2022-12-15"]
    assert sum(depth <= PUBLISHED_DEPTH for depth in depths["2026-03-26"]) == 30


@pytest.mark.parametrize("column", ["cl_id", "label"])
def test_the_release_of_2022_gives_the_published_hierarchy(real_dir, published, types, column):
    assert (published.release, published.source) == ("2022-12-15", "cl-simple-2022-12-15.obo.gz")
    found = published.resolve(list(types[column]))
    assert found.cl_ids == tuple(types["cl_id"])
    assert found.mapped == ()
    reach = published.reachability(found.cl_ids)
    np.testing.assert_array_equal(reach, np.load(real_dir / "child_matrix_164.npy"))
    assert int(reach.sum()) - 164 == 381


def test_the_default_release_takes_obsolete_ids_as_they_are_and_resolve_replaces_them(real_dir, default, types):
    as_they_are = default.reachability(list(types["cl_id"]))
    expected = np.load(real_dir / "ontology" / "child_matrix_164_cl_2026-03-26_by_id.npy")
    np.testing.assert_array_equal(as_they_are, expected)
    assert int(as_they_are.sum()) - 164 == 380
    found = default.resolve(list(types["cl_id"]))
    assert {(one.given, one.cl_id, one.why) for one in found.mapped} == {
        ("CL:4023070", "CL:4023064", "obsolete, replaced"),
        ("CL:0000651", "CL:0002181", "obsolete, replaced"),
    }
    assert int(default.reachability(found.cl_ids).sum()) - 164 == 384


def test_of_the_18_labels_that_the_default_release_changed_11_are_still_understood(default, types):
    changed = types[types["label_in_cl_2026_03_26"] != types["label"]]
    lost = [label for label in types["label"] if not (one := default.find(label)) or one.why]
    assert lost == list(changed["label"])
    assert len(lost) == 18
    understood = {label: one for label in lost if (one := default.find(label))}
    assert sorted(one.why for one in understood.values()) == ["obsolete, replaced"] * 2 + ["synonym"] * 9
    ids = dict(zip(types["label"], types["cl_id"], strict=True))
    assert all(one.cl_id == ids[label] for label, one in understood.items() if one.why == "synonym")
    assert "7 of 164 names cannot be used" in refused(default.resolve, list(types["label"]))
