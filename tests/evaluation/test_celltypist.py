import logging
import pickle
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from hce_jax.errors import CheckpointError
from hce_jax.evaluation.celltypist import CellTypistClassifier
from hce_jax.input import Expression
from hce_jax.preprocess.normalize import normalize_log1p
from hce_jax.store import Block, SideFiles

N_GENES, N_CELLS = 40, 90
GENE_NAMES = tuple(f"GENE{i}" for i in range(N_GENES))
GENE_IDS = tuple(f"ENSG{i:011d}" for i in range(N_GENES))
LABELS = ("neuron", "B cell", "T cell", "macrophage")
CL_IDS = ("CL:0000540", "CL:0000236", "CL:0000084", "CL:0000235")


@pytest.fixture(scope="module")
def celltypist(tmp_path_factory):
    """CellTypist, without what its import does to all others."""
    patch = pytest.MonkeyPatch()
    patch.setenv("CELLTYPIST_FOLDER", str(tmp_path_factory.mktemp("celltypist")))
    handlers, level = logging.root.handlers[:], logging.root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("celltypist")
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)
    yield module
    patch.undo()


def side(labels=LABELS, cl_ids=None, names=GENE_NAMES, ids=GENE_IDS):
    eye = np.eye(len(labels), dtype=np.float32)
    return SideFiles(Path("store"), ids, names, labels, cl_ids, eye, {})


def simulated(n_types, seed=0, n_cells=N_CELLS):
    """Return types and sf-log1p expression of cells, each type with some genes of its own."""
    rng = np.random.default_rng(seed)
    type_n = np.arange(n_cells) % n_types
    mean = 1 + 30 * (np.arange(N_GENES) % n_types == type_n[:, None])
    counts = rng.poisson(mean).astype(np.float32)
    return type_n, np.asarray(normalize_log1p(counts), np.float32)


def trained(celltypist, classes, genes=GENE_NAMES, x=None, type_n=None, **settings):
    """Train a model on cells of some classes; many small steps give it the large scores of real ones."""
    if x is None:
        type_n, x = simulated(len(classes))
    data = anndata.AnnData(X=x, var=pd.DataFrame(index=list(genes)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return celltypist.train(data, labels=np.array(classes)[type_n], use_SGD=True, random_state=0, **settings)


@pytest.fixture
def saved(celltypist, tmp_path):
    def save(classes, **settings):
        path = tmp_path / "model.pkl"
        trained(celltypist, classes, **settings).write(str(path))
        return path

    return save


def cells(x):
    return Expression(Block.of_values(x, {"cell_type": np.zeros(len(x), np.int64)}))


def annotated(celltypist, path, x, genes=GENE_NAMES):
    """Return what CellTypist itself says: labels, and probabilities by class."""
    data = anndata.AnnData(X=x, var=pd.DataFrame(index=list(genes)))
    result = celltypist.annotate(data, model=str(path), majority_voting=False)
    return result.predicted_labels["predicted_labels"].to_numpy(), result.probability_matrix


@pytest.mark.parametrize("with_mean", [True, False])
def test_probabilities_are_those_of_celltypist_in_the_order_of_the_store(with_mean, celltypist, tmp_path):
    model, path = trained(celltypist, ["T cell", "neuron", "B cell"], with_mean=with_mean), tmp_path / "model.pkl"
    model.scaler.scale_[:20] /= 20  # scaled expression above 10
    model.scaler.mean_[0] = -5  # and that of a gene that is not expressed
    model.write(str(path))
    classifier = CellTypistClassifier(path, side())
    _, x = simulated(3, seed=1)
    x = np.round(x)  # other than in training: mistakes, and genes that are not expressed
    x[0] = 0
    labels, probabilities = annotated(celltypist, path, x)
    given = classifier.predict_block(cells(x))
    assert given.shape == (N_CELLS, 4)
    assert given.dtype == np.float32
    assert [LABELS[code] for code in given.argmax(axis=1)] == list(labels)
    np.testing.assert_allclose(given[:, :3], probabilities[["neuron", "B cell", "T cell"]], rtol=1e-5, atol=1e-30)
    assert not given[:, 3].any()  # macrophage: no class
    assert (classifier.model_type, classifier.title) == ("celltypist", "celltypist, model.pkl")
    assert classifier.side.labels == LABELS


def test_model_of_two_classes(celltypist, saved):
    path = saved(["T cell", "B cell"])
    _, x = simulated(2, seed=1)
    labels, probabilities = annotated(celltypist, path, x)
    given = CellTypistClassifier(path, side()).predict_block(cells(x))
    assert [LABELS[code] for code in given.argmax(axis=1)] == list(labels)
    np.testing.assert_allclose(given[:, 1:3], probabilities[["B cell", "T cell"]], rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("offset", [-2000.0, 2000.0], ids=["all probabilities 0", "all probabilities 1"])
def test_best_type_is_kept_where_float32_cannot_tell(offset, celltypist, tmp_path):
    model = trained(celltypist, ["T cell", "neuron", "B cell"])
    model.classifier.intercept_ = model.classifier.intercept_ + offset
    model.write(str(tmp_path / "model.pkl"))
    _, x = simulated(3, seed=1)
    labels, probabilities = annotated(celltypist, tmp_path / "model.pkl", x)
    assert len(np.unique(probabilities.to_numpy().astype(np.float32))) == 1  # the premise
    given = CellTypistClassifier(tmp_path / "model.pkl", side()).predict_block(cells(x))
    assert [LABELS[code] for code in given.argmax(axis=1)] == list(labels)
    assert given.min() >= 0
    assert given.max() <= 1
    np.testing.assert_allclose(given[:, :3], offset > 0, atol=1e-6)


def test_genes_are_found_by_name_or_by_id_whichever_finds_more(celltypist, saved):
    """The store has other genes too, in another order; the model's names of two genes it lacks."""
    _, x = simulated(3, seed=1)
    order = np.random.default_rng(2).permutation(N_GENES)[2:]
    path = saved(["T cell", "neuron", "B cell"], genes=GENE_IDS)
    ids, names = ([genes[gene] for gene in order] for genes in (GENE_IDS, GENE_NAMES))
    names[0] = GENE_IDS[0]  # found by name, alone
    x_store = np.insert(x[:, order], 5, 0.5, axis=1)
    store = side(ids=(*ids[:5], "other", *ids[5:]), names=(*names[:5], "other", *names[5:]))
    given = CellTypistClassifier(path, store).predict_block(cells(x_store))
    _, probabilities = annotated(celltypist, path, x[:, order], genes=ids)
    np.testing.assert_allclose(given[:, :3], probabilities[["neuron", "B cell", "T cell"]], rtol=1e-5, atol=1e-30)


def test_few_shared_genes_are_said_and_none_refused(saved, capsys):
    path = saved(["T cell", "neuron"])
    few = tuple(GENE_NAMES[i] if i < 3 else f"other{i}" for i in range(N_GENES))
    CellTypistClassifier(path, side(names=few))
    assert "store has only 3 of the 40 genes of" in capsys.readouterr().err
    CellTypistClassifier(path, side())
    assert "leaves out" not in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"none of the 40 genes of .*model\.pkl \(GENE0, GENE1, \.\.\.\)"):
        CellTypistClassifier(path, side(names=tuple(f"other{i}" for i in range(N_GENES))))


@pytest.mark.parametrize("cl_ids", [None, CL_IDS], ids=["store without ids", "store with ids"])
def test_classes_go_by_text_then_by_ontology(cl_ids, celltypist, saved, capsys):
    # An id, the exact label, an exact synonym, a plural, and what the store has not.
    classes = ["CL:0000084", "macrophage", "nerve cell", "B cells", "doublet"]
    path = saved(classes)
    _, x = simulated(5, seed=1)
    given = CellTypistClassifier(path, side(cl_ids=cl_ids)).predict_block(cells(x))
    assert f"1 of the 5 classes of {path} are no types of store and are left out: doublet" in capsys.readouterr().err
    labels, probabilities = annotated(celltypist, path, x)
    of_store = probabilities[["nerve cell", "B cells", "CL:0000084", "macrophage"]]
    known = labels != "doublet"
    assert 0 < known.sum() < len(known)
    assert (given.argmax(axis=1) == of_store.to_numpy().argmax(axis=1))[~known].all()  # the best of the others
    assert [of_store.columns[code] for code in given[known].argmax(axis=1)] == list(labels[known])
    np.testing.assert_allclose(given, of_store, rtol=1e-5, atol=1e-30)


def test_class_that_ends_in_s_is_no_plural(saved):
    store = side(labels=("epithelial cell of esophagus", "T cell"))
    path = saved(["Epithelial cell of Esophagus", "other"])
    given = CellTypistClassifier(path, store).predict_block(cells(simulated(2)[1]))
    assert given[:, 0].any()


def test_most_probable_of_several_classes_for_a_type_counts(celltypist, saved):
    path = saved(["T cell", "T cells", "neuron"])
    _, x = simulated(3, seed=1)
    given = CellTypistClassifier(path, side()).predict_block(cells(x))
    _, probabilities = annotated(celltypist, path, x)
    np.testing.assert_allclose(given[:, 2], probabilities[["T cell", "T cells"]].max(axis=1), rtol=1e-5, atol=1e-30)


def test_integer_classes_are_codes_as_in_the_published_models(celltypist, saved, capsys):
    path = saved([2, 0, 17])
    _, x = simulated(3, seed=1)
    given = CellTypistClassifier(path, side()).predict_block(cells(x))
    said = capsys.readouterr().err
    assert "its classes are integers, taken as the codes of store" in said
    assert "1 of the 3 classes" in said
    _, probabilities = annotated(celltypist, path, x)
    np.testing.assert_allclose(given[:, [2, 0]], probabilities[[2, 0]], rtol=1e-5, atol=1e-30)
    assert not given[:, [1, 3]].any()


def test_numbers_as_text_are_no_codes(saved):
    with pytest.raises(CheckpointError, match=r"none of the 2 classes of .* \(0, 1\) is a cell type of store"):
        CellTypistClassifier(saved(["0", "1"]), side())


def test_several_threads_may_ask(saved):
    classifier = CellTypistClassifier(saved(["T cell", "neuron", "B cell"]), side())
    blocks = [cells(simulated(3, seed=seed)[1]) for seed in range(8)]
    alone = [classifier.predict_block(block) for block in blocks]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(classifier.predict_block, blocks))
    np.testing.assert_array_equal(together, alone)


def test_opening_says_that_it_runs_code_and_nothing_else(saved, capsys, caplog):
    path = saved(["T cell", "neuron"])
    capsys.readouterr()
    caplog.clear()
    classifier = CellTypistClassifier(path, side())
    classifier.predict_block(cells(simulated(2)[1]))
    said = capsys.readouterr()
    assert said.err == f"opening {path}: a CellTypist model is a pickle and can run any code; use those you trust\n"
    assert said.out == ""
    assert not caplog.records


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("ImportError('no scanpy')", r"needs CellTypist \(no scanpy\): pip install 'hce_jax\[bench\]'$"),
        ("PermissionError('read-only home')", r"cannot make its folder \(read-only home\); set CELLTYPIST_FOLDER"),
    ],
)
def test_import_that_fails_is_one_line_and_leaves_logging_and_warnings_alone(fails, message, monkeypatch, tmp_path):
    """A module in place of CellTypist, which does to others what that does."""
    does = "import logging, warnings; logging.basicConfig(level=10, force=True); warnings.simplefilter('ignore')"
    (tmp_path / "celltypist.py").write_text(f"{does}; raise {fails}")
    (tmp_path / "model.pkl").touch()
    monkeypatch.delitem(sys.modules, "celltypist", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    root = logging.getLogger()
    before = root.handlers[:], root.level, warnings.filters[:]
    with pytest.raises(CheckpointError, match=message):
        CellTypistClassifier(tmp_path / "model.pkl", side())
    assert (root.handlers[:], root.level, warnings.filters[:]) == before


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"hello", "UnpicklingError"),
        (pickle.dumps([1, 2]), "TypeError"),
        (pickle.dumps({"Model": "a", "Scaler_": "b"}), "KeyError: 'description'"),
        (pickle.dumps({"Model": "a", "Scaler_": "b", "description": {}}), "AttributeError"),
    ],
    ids=["no pickle", "a list", "a dict", "no classifier"],
)
def test_another_file_is_refused_in_one_line(content, reason, celltypist, tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"model.pkl is no CellTypist model \\({reason}"):
        CellTypistClassifier(path, side())


def test_model_that_contradicts_itself_is_refused(celltypist, tmp_path):
    model = trained(celltypist, ["T cell", "neuron"])
    model.classifier.features = model.classifier.features[1:]
    model.write(str(tmp_path / "model.pkl"))
    with pytest.raises(CheckpointError, match=r"model\.pkl is no CellTypist model \(ValueError: its genes"):
        CellTypistClassifier(tmp_path / "model.pkl", side())


def test_other_version_of_scikit_learn_is_said(saved, capsys):
    path = saved(["T cell", "neuron"])
    import sklearn

    current = sklearn.__version__.encode()
    content = path.read_bytes()
    assert current in content
    path.write_bytes(content.replace(current, b"0" * len(current)))
    CellTypistClassifier(path, side())
    assert f"trained with scikit-learn {'0' * len(current)}, not with ours" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["absent.pkl", "."])
def test_missing_file_is_refused(name, tmp_path, capsys):
    with pytest.raises(CheckpointError, match="is no file; name the file of a CellTypist model"):
        CellTypistClassifier(tmp_path / name, side())
    assert "opening" not in capsys.readouterr().err


def test_without_celltypist_the_user_is_told_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "celltypist", None)
    (tmp_path / "model.pkl").touch()
    with pytest.raises(CheckpointError, match=r"pip install 'hce_jax\[bench\]'$"):
        CellTypistClassifier(tmp_path / "model.pkl", side())
