"""A CellTypist model as a classifier, so that it is evaluated on the same cells and in the same files as ours.

CellTypist is optional: ``pip install 'hce_jax[bench]'``.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from sklearn.exceptions import InconsistentVersionWarning

from hce_jax.errors import CheckpointError
from hce_jax.hierarchy import CellOntology
from hce_jax.input import Expression
from hce_jax.store import SideFiles
from hce_jax.store.type_matching import TypeMatcher
from hce_jax.typing import Float

#: Scaled expression is cut off here, as in :meth:`celltypist.classifier.Classifier.celltype`.
_LARGEST = 10
#: With less than this share of the model's genes a user is warned.
_FEW_GENES = 0.5
#: Names that a message lists.
_MOST_NAMES = 5
#: A best class keeps at least this probability: the least that is not flushed to zero anywhere.
_LEAST = np.finfo(np.float32).tiny


class CellTypistClassifier:
    r"""A CellTypist model (Domínguez Conde et al., Science 2022, 10.1126/science.abl5197) for a store's cell types.

    A model is a pickle: **opening it runs the code in it**. It is said on stderr.

    The probabilities are CellTypist's, of one logistic regression per class, so that those of a cell need not sum to 1:

    .. math:: p_k = \sigma\Big(b_k + \sum_g w_{kg} \min\Big(\frac{x_g - m_g}{s_g}, 10\Big)\Big)

    with x the expression (sf-log1p) of the genes g that model and store share, found by name or by id, whichever finds
    more. CellTypist leaves the other genes of the model out of the sum. What a gene adds that is
    not expressed is computed once, for all cells; the rest of the sum runs over expressed genes only.

    A class is the store's type of the same text; else the one that it stands for in the Cell Ontology, by label, exact
    synonym or id, or as a plural ("Classical monocytes"). Classes that are integers are the store's codes: the
    published models were trained on them (scTab, ``train_celltypist.ipynb``). Of several classes for one type the most
    probable counts; a type without a class has probability 0. Classes that are none of the types are left out, so that
    a cell whose best class is one of them gets the best of the others (the published script calls it wrong).

    The best type of a cell is CellTypist's also where float32 no longer tells its probability from another's or from 0
    (scores of 20, or of -100, which are common): the best is kept above the others, by the least that float32 can tell.

    Parameters
    ----------
    path
        The model (.pkl).
    side
        The store's genes and cell types.

    Raises
    ------
    CheckpointError
        If CellTypist is not installed, the file is no CellTypist model, or model and store share no gene or no type.

    Examples
    --------
    >>> model = CellTypistClassifier("model.pkl", open_store("store").side)  # doctest: +SKIP
    >>> model.predict_block(Expression(split.read_block(0))).shape  # doctest: +SKIP
    (512, 164)
    """

    model_type = "celltypist"
    reads_sparse = True

    def __init__(self, path: str | Path, side: SideFiles):
        self.path, self.side = Path(path), side
        self.title = f"{self.model_type}, {self.path.name}"
        self._model = _load(self.path)
        self._code_k = self._codes_of_classes(self._model.cell_types)
        self._columns, shared = self._shared_genes([str(gene) for gene in self._model.features])
        self._mean_g, self._scale_g, self._unexpressed_g = _keep_genes(self._model, shared)

    def predict_block(self, cells: Expression) -> Float[np.ndarray, "n c"]:
        """Return the probability of each type for some cells; several threads may ask at a time.

        Examples
        --------
        >>> model.predict_block(Expression(split.read_block(0))).shape  # doctest: +SKIP
        (512, 164)
        """
        x = cells.x[:, self._columns].astype(np.float64)
        gene = x.indices
        scaled = np.minimum((x.data - self._mean_g[gene]) / self._scale_g[gene], _LARGEST)
        x.data = scaled - self._unexpressed_g[gene]
        score_nk, p_nk, _ = self._model.predict_labels_and_prob(x)
        return self._of_types(score_nk, p_nk)

    def _of_types(self, score_nk: np.ndarray, p_nk: np.ndarray) -> Float[np.ndarray, "n c"]:
        """Bring the probabilities of classes into the order of the store's types, float32."""
        kept = np.flatnonzero(self._code_k >= 0)
        p_nc = np.zeros((len(p_nk), self.side.n_types), np.float32)
        for column in kept:
            code = self._code_k[column]
            p_nc[:, code] = np.maximum(p_nc[:, code], p_nk[:, column])
        row_n, best_n = np.arange(len(p_nc)), self._code_k[kept[score_nk[:, kept].argmax(axis=1)]]
        best_p_n = np.maximum(p_nc[row_n, best_n], _LEAST)
        p_nc = np.minimum(p_nc, np.nextafter(best_p_n, np.float32(0))[:, None])
        p_nc[row_n, best_n] = best_p_n
        return p_nc

    def _shared_genes(self, features: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Find the genes that model and store share: their columns in the store, and in the model."""
        place = {gene: index for index, gene in enumerate(features)}
        found: dict[str, int] = {}
        for names in (self.side.gene_names, self.side.gene_ids):
            first: dict[str, int] = {}  # of genes with the same name CellTypist, too, takes the first
            for column, name in enumerate(names):
                if name in place:
                    first.setdefault(name, column)
            found = max(found, first, key=len)
        if not found:
            raise CheckpointError(
                f"none of the {len(features):,} genes of {self.path} ({', '.join(features[:2])}, ...) is a gene of "
                f"{self.side.path}, by name ({', '.join(self.side.gene_names[:2])}, ...) or by id "
                f"({', '.join(self.side.gene_ids[:2])}, ...); evaluate it on cells with its genes"
            )
        if len(found) < _FEW_GENES * len(features):
            few = f"only {len(found):,} of the {len(features):,} genes of {self.path}"
            print(f"{self.side.path} has {few}; CellTypist leaves out the others", file=sys.stderr)
        return np.array([*found.values()]), np.array([place[name] for name in found])

    def _codes_of_classes(self, classes: np.ndarray) -> np.ndarray:
        """Find the code of each class's type, -1 if it is none of the store's."""
        n_types, where = self.side.n_types, self.side.path
        if classes.dtype.kind in "iu":
            print(f"{self.path}: its classes are integers, taken as the codes of {where}", file=sys.stderr)
            code_k = np.where((classes >= 0) & (classes < n_types), classes, -1).astype(np.int64)
        else:
            matcher = TypeMatcher(self.side.labels, self.side.cl_ids, CellOntology.open())
            meant = (
                (matcher.match(name, None), matcher.match(name.removesuffix("s"), None)) for name in map(str, classes)
            )
            code_k = np.array([code if code >= 0 else code_of_singular for code, code_of_singular in meant])
        others = [str(name) for name, code in zip(classes, code_k, strict=True) if code < 0]
        some = ", ".join(others[:_MOST_NAMES]) + (", ..." if len(others) > _MOST_NAMES else "")
        if len(others) == len(classes):
            raise CheckpointError(
                f"none of the {len(classes):,} classes of {self.path} ({some}) is a cell type of {where}; evaluate it "
                "on cells with its types, or train it on the labels or Cell Ontology ids of these"
            )
        if others:
            what = f"{len(others):,} of the {len(classes):,} classes of {self.path} are no types of {where}"
            print(f"{what} and are left out: {some}", file=sys.stderr)
        return code_k


def _keep_genes(model: Any, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Leave a model these genes only; return their means, scales, and what a gene that is not expressed is scaled to.

    The last one is moved into the intercept, so that the model is to be given what a gene has more than that: nothing
    for most genes of a cell.
    """
    classifier, scaler = model.classifier, model.scaler
    scale_g = scaler.scale_[kept]
    mean_g = scaler.mean_[kept] if scaler.with_mean else np.zeros_like(scale_g)
    unexpressed_g = np.minimum(-mean_g / scale_g, _LARGEST)
    classifier.coef_, classifier.n_features_in_ = classifier.coef_[:, kept], len(kept)
    classifier.intercept_ = classifier.intercept_ + classifier.coef_ @ unexpressed_g
    return mean_g, scale_g, unexpressed_g


def _load(path: Path) -> Any:
    """Open a model of CellTypist."""
    if not path.is_file():
        raise CheckpointError(f"{path} is no file; name the file of a CellTypist model (.pkl)")
    celltypist = _import_celltypist()
    print(f"opening {path}: a CellTypist model is a pickle and can run any code; use those you trust", file=sys.stderr)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            # A name without a folder CellTypist would look up among the models that it offers for download.
            model = celltypist.models.Model.load(str(path.absolute()))
        if len({len(model.features), len(model.scaler.scale_), model.classifier.coef_.shape[1]}) > 1:
            raise ValueError("its genes, coefficients and scales do not have the same number")
    except Exception as error:
        reason = error.__context__ or error
        raise CheckpointError(f"{path} is no CellTypist model ({type(reason).__name__}: {reason})") from error
    old = [each.message for each in caught if isinstance(each.message, InconsistentVersionWarning)]
    if old:
        print(f"{path} was trained with scikit-learn {old[0].original_sklearn_version}, not with ours", file=sys.stderr)
    return model


def _import_celltypist() -> ModuleType:
    """Import CellTypist without what its import changes for all others: warnings and logging."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            celltypist = importlib.import_module("celltypist")
    except ImportError as error:
        raise CheckpointError(f"a CellTypist model needs CellTypist ({error}): pip install 'hce_jax[bench]'") from error
    except OSError as error:
        raise CheckpointError(f"CellTypist cannot make its folder ({error}); set CELLTYPIST_FOLDER") from error
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    return celltypist
