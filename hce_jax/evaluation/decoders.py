"""Decoders: from the probabilities of a cell's types to the one type that is predicted.

Beside the most probable type they choose with the hierarchy in view, from the same probabilities, so that they work
with any checkpoint. Codes are those of the C types; :data:`UNASSIGNED` says that no type was found.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cached_property
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from hce_jax.errors import CheckpointError, ConfigError
from hce_jax.evaluation.temperature import tempered
from hce_jax.hierarchy import depths, ontology_distances, propagate

#: Names of the decoders; the first is the published one.
DECODERS = ("argmax", BACKOFF := "backoff", "min-distance")

#: Name of argmax with the confidence of tempered probabilities. It predicts nothing of its own: no flag asks for it.
TEMPERATURE = "temperature"

#: The code of no type at all.
UNASSIGNED = -1

#: What the rounding of float32 may take from a mass, which is at most 1: a root that holds all of it can come out as
#: 0.9999998. A mass that falls short of the confidence by no more than this still holds it.
ROUNDING = 1e-6


class Decoded(NamedTuple):
    """What was predicted for n cells.

    Attributes
    ----------
    codes
        Predicted types, not corrected; -1: unassigned.
    confidence
        The mass of the predicted type's subtree, in [0, 1]: of a type without descendants, its probability. 0 for an
        unassigned cell.
    """

    codes: Int[np.ndarray, " n"]
    confidence: Float[np.ndarray, " n"]


def shares(probabilities: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
    """Divide the probabilities of each cell by their sum; a row of zeros stays one.

    Raises
    ------
    CheckpointError
        If a cell's probabilities are not finite.

    Examples
    --------
    >>> shares(np.array([[0.5, 1.5], [0.0, 0.0]], np.float32)).tolist()
    [[0.25, 0.75], [0.0, 0.0]]
    """
    sum_n = probabilities.sum(axis=1, dtype=np.float32)
    if not np.isfinite(sum_n).all():
        n_bad = int(np.count_nonzero(~np.isfinite(sum_n)))
        raise CheckpointError(
            f"the model gives {n_bad} of {len(sum_n)} cells probabilities that are not numbers; its training has "
            f"failed, or the expression holds values that are not numbers: use another checkpoint, check the cells"
        )
    return probabilities.astype(np.float32) / np.where(sum_n > 0, sum_n, 1)[:, None]


@dataclasses.dataclass(frozen=True, eq=False)
class Decoders:
    r"""All decoders of one hierarchy.

    With the probabilities p of a cell and the mass of the subtree of type i,

    .. math:: m_i = \sum_j R_{ij}\, p_j

    they predict

    * ``argmax``: the type of the largest p, of equals the lowest code. As published.
    * ``backoff``: the deepest type (most ancestors) with m of at least ``confidence``, or that of its depth; of equally
      deep ones that of the larger m, then the lower code. If there is none: unassigned. (Selective prediction with
      partial rejection; Theunissen et al., Bioinformatics 2024, 10.1093/bioinformatics/btae128.)
    * ``min-distance``: the type i of the least expected distance :math:`\sum_j p_j d_{ij}`, with d the number of edges
      between two types (:func:`hce_jax.hierarchy.ontology_distances`); of equals the lowest code. (Conditional risk
      minimisation; Karthik et al., arXiv 2104.00795, who use the height of the lowest common ancestor for d.)

    Probabilities that do not sum to one, such as those of one-versus-rest classifiers, are divided by their sum before
    m and the expected distance are computed; ``argmax`` takes them as they are. Where all of them are 0, ``argmax`` and
    ``min-distance`` give type 0 with confidence 0.

    Where a temperature is known, there is also ``temperature``: the types of ``argmax``, with the mass that their
    subtrees have once p is tempered (:func:`hce_jax.evaluation.temperature.tempered`).

    Attributes
    ----------
    reachability
        R (c, c).
    confidence
        The mass that ``backoff`` asks for, in (0, 1]: of every type, or by depth (n_depths,), where infinity says that
        no type of that depth is given (:meth:`hce_jax.evaluation.calibration.Calibration.thresholds_at`). Float32 sums
        are allowed to fall short of it by 1e-6.
    temperature
        T of ``temperature``; None: it is left out.

    Raises
    ------
    ConfigError
        If the confidence is not in (0, 1], or not one for each depth; or the temperature is not above 0.

    Examples
    --------
    >>> decoders = Decoders(np.array([[1, 1, 1], [0, 1, 0], [0, 0, 1]]), confidence=0.7)  # 1 and 2 below 0
    >>> decoders.decode("argmax", np.array([[0.2, 0.45, 0.35]], np.float32)).codes.tolist()
    [1]
    >>> decoders.decode("backoff", np.array([[0.2, 0.45, 0.35]], np.float32)).codes.tolist()
    [0]
    """

    reachability: np.ndarray
    confidence: float | Float[np.ndarray, " d"] = 0.5
    temperature: float | None = None

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ConfigError(f"the temperature is {self.temperature}; it lies above 0, and 1 changes nothing")
        if isinstance(self.confidence, np.ndarray):
            n_depths = int(self._depths.max()) + 1
            if self.confidence.shape != (n_depths,) or not (self.confidence > 0).all():
                raise ConfigError(
                    f"the thresholds of the depths are {self.confidence.tolist()}; the hierarchy has {n_depths} depths "
                    f"and needs one above 0 for each"
                )
        elif not 0 < self.confidence <= 1:
            raise ConfigError(
                f"--confidence={self.confidence}: the share of the probability that back-off asks for lies above 0 and "
                f"is at most 1; give for example --confidence=0.5"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """The decoders of :meth:`decode_all`: the :data:`DECODERS`, and ``temperature`` where T is known."""
        return DECODERS if self.temperature is None else (*DECODERS, TEMPERATURE)

    def decode(self, name: str, probabilities: Float[np.ndarray, "n c"]) -> Decoded:
        """Predict the types of n cells with one decoder.

        Parameters
        ----------
        name
            One of :attr:`names`.
        probabilities
            Rows of cells, not negative.

        Raises
        ------
        ConfigError
            If there is no decoder of that name.
        CheckpointError
            If a cell's probabilities are not finite.

        Examples
        --------
        >>> Decoders(np.eye(2)).decode("argmax", np.array([[0.25, 0.75]], np.float32)).confidence.tolist()
        [0.75]
        """
        if name not in self.names:
            raise ConfigError(f"--decoder={name}: there is no such decoder; give one of {', '.join(self.names)}")
        return self._decode((name,), probabilities)[name]

    def decode_all(self, probabilities: Float[np.ndarray, "n c"]) -> dict[str, Decoded]:
        """Predict the types of n cells with every decoder, in the order of :attr:`names`, sharing the work.

        Parameters and errors as :meth:`decode`.

        Examples
        --------
        >>> list(Decoders(np.eye(2)).decode_all(np.array([[0.25, 0.75]], np.float32)))
        ['argmax', 'backoff', 'min-distance']
        """
        return self._decode(self.names, probabilities)

    def _decode(self, names: tuple[str, ...], probabilities_nc: Float[np.ndarray, "n c"]) -> dict[str, Decoded]:
        share_nc = shares(probabilities_nc)
        mass_nc = propagate(share_nc, self._reachability)
        choose = {
            "argmax": lambda: probabilities_nc.argmax(axis=1),
            "backoff": lambda: self._deepest(mass_nc),
            "min-distance": lambda: self._nearest(share_nc),
            TEMPERATURE: lambda: probabilities_nc.argmax(axis=1),
        }
        decoded = {}
        for name in names:
            codes_n = choose[name]()
            if name == TEMPERATURE and self.temperature is not None:
                mass_n = np.einsum("nc,nc->n", self._reachability[codes_n], tempered(share_nc, self.temperature))
            else:
                mass_n = mass_nc[np.arange(len(codes_n)), codes_n]
            confidence_n = np.clip(mass_n, 0, 1)
            decoded[name] = Decoded(codes_n, np.where(codes_n == UNASSIGNED, np.float32(0), confidence_n))
        return decoded

    def _deepest(self, mass_nc: Float[np.ndarray, "n c"]) -> Int[np.ndarray, " n"]:
        threshold = self.confidence[self._depths] if isinstance(self.confidence, np.ndarray) else self.confidence
        depth_nc = np.where(mass_nc >= threshold - ROUNDING, self._depths, -1)
        deepest_n = depth_nc.max(axis=1, keepdims=True)
        codes_n = np.where(depth_nc == deepest_n, mass_nc, -1).argmax(axis=1)
        return np.where(deepest_n[:, 0] < 0, UNASSIGNED, codes_n)

    def _nearest(self, share_nc: Float[np.ndarray, "n c"]) -> Int[np.ndarray, " n"]:
        expected_nc = share_nc @ self._distances
        # Distances that differ by rounding alone are equal, or a cell's type could depend on the cells it comes with.
        tolerance = ROUNDING * self._distances.max()
        return (expected_nc <= expected_nc.min(axis=1, keepdims=True) + tolerance).argmax(axis=1)

    @cached_property
    def _reachability(self) -> Float[np.ndarray, "c d"]:
        return np.asarray(self.reachability, np.float32)

    @cached_property
    def _depths(self) -> Int[np.ndarray, " c"]:
        return depths(self.reachability).astype(np.int16)

    @cached_property
    def _distances(self) -> Float[np.ndarray, "c d"]:
        return ontology_distances(self.reachability).astype(np.float32)
