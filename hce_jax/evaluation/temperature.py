r"""Temperature scaling: one number that makes a model more or less sure of itself.

The probabilities p of a cell become sharper (T < 1) or flatter (T > 1), and keep their order (Guo et al., ICML 2017,
arXiv 1706.04599, who divide the logits by T; the logarithm of p is the logits but for a constant of the cell):

.. math:: p^{(T)} = softmax(\ln p / T)

T is the most likely one of labelled cells. A label y may be coarse, and is then satisfied by every type below it, so
that the likelihood is that of the label's subtree, as in the hierarchical cross entropy without its epsilon:

.. math:: \min_T\ -\frac{1}{n} \sum_{cells} \ln \sum_{j:\, R_{yj} = 1} p^{(T)}_j, \quad 0.05 \le T \le 20

A probability of 0 has no logarithm. Softmax in float32 gives 0 to all that is below the smallest normal number
(1.2e-38), which is therefore the most that a 0 can have been, and what it counts as: no gap between two logits is made
larger than it was.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize_scalar

#: The lowest and the highest temperature. A model that is right of every cell, however sure, would have 0.
TEMPERATURES = (0.05, 20.0)
#: Logarithms of the temperatures that are tried first. With coarse labels the likelihood may have several peaks; from
#: one of these to the next, a factor of 1.6, it is taken to have one.
_STEPS = np.log(TEMPERATURES[1]) / 6 * np.arange(-6, 7)
#: What a share of 0 counts as.
_LEAST_SHARE = np.finfo(np.float32).tiny


def tempered(share: Float[np.ndarray, "n c"], temperature: float) -> Float[np.ndarray, "n c"]:
    """Make probabilities sharper or flatter.

    Parameters
    ----------
    share
        Probabilities of each cell, float32 that sum to one; a row of zeros stays one.
    temperature
        T, above 0; 1 changes nothing.

    Examples
    --------
    >>> tempered(np.array([[0.2, 0.8]], np.float32), 0.5).round(3)
    array([[0.059, 0.941]], dtype=float32)
    """
    log_nc = _log(share) / np.float32(temperature)
    power_nc = np.exp(log_nc - log_nc.max(axis=1, keepdims=True)) * share.any(axis=1, keepdims=True)
    return power_nc / np.maximum(power_nc.sum(axis=1, keepdims=True), 1)


class _Batch(NamedTuple):
    """Some cells: ln p inside and outside of the label's subtree, each beside the largest there, and the gap of these.

    The gap is kept apart, so that a likelihood that is the same at any temperature comes out as the same.
    """

    gap: Float[np.ndarray, " n"]
    inside: Float[np.ndarray, "n c"]
    outside: Float[np.ndarray, "n c"]


class TemperatureFit:
    """Collects labelled cells, and finds their most likely temperature.

    Parameters
    ----------
    reachability
        R (c, c).

    Examples
    --------
    >>> fit = TemperatureFit(np.eye(2))
    >>> fit.add(np.array([[0.9, 0.1]] * 10, np.float32), np.array([0] * 7 + [1] * 3))  # 0.9 is right in 7 of 10
    >>> round(fit.temperature(), 3)  # ln 9 / ln (7 / 3)
    2.593
    """

    def __init__(self, reachability: np.ndarray):
        self._reach = np.asarray(reachability) > 0
        self._batches: list[_Batch] = []

    def add(self, share: Float[np.ndarray, "n c"], labels: Int[np.ndarray, " n"]) -> None:
        """Take some cells, 8 bytes a type of each.

        Parameters
        ----------
        share
            Probabilities of each cell, float32 that sum to one.
        labels
            Codes.
        """
        below_nc = self._reach[labels]
        tells_n = ~below_nc.all(axis=1)  # a label above all types is satisfied at any temperature
        log_nc, below_nc = _log(share[tells_n]), below_nc[tells_n]
        if len(log_nc):
            inside_n, inside_nc = _largest_first(log_nc, below_nc)
            outside_n, outside_nc = _largest_first(log_nc, ~below_nc)
            self._batches.append(_Batch(outside_n.astype(np.float64) - inside_n, inside_nc, outside_nc))

    def loss(self, temperature: float) -> float:
        """Return the mean of minus the logarithm of the mass of the label's subtree; of no cells 0."""
        # With the mass inside and outside of the subtree: -ln(i / (i + o)) = ln(1 + o / i), exact also where o is tiny.
        odds = [
            gap_n / temperature + _log_sum(outside_nc, temperature) - _log_sum(inside_nc, temperature)
            for gap_n, inside_nc, outside_nc in self._batches
        ]
        return float(np.logaddexp(0, np.concatenate(odds)).mean()) if odds else 0.0

    def temperature(self) -> float:
        """Return the most likely temperature; of equally likely ones the nearest to 1.

        It is an end of the range where the likelihood grows up to there.
        """
        losses = {step: self.loss(np.exp(step)) for step in sorted(_STEPS.tolist(), key=abs)}
        best = min(losses, key=losses.__getitem__)
        width = _STEPS[1] - _STEPS[0]
        around = np.clip((best - width, best + width), _STEPS[0], _STEPS[-1])
        refined = minimize_scalar(
            lambda step: self.loss(np.exp(step)), bounds=around, method="bounded", options={"xatol": 1e-4}
        )
        found = refined.x if refined.fun < losses[best] else best
        return round(float(np.exp(found)), 6)  # the ends, and 1, come out as themselves


def _largest_first(
    log_nc: Float[np.ndarray, "n c"], chosen_nc: Bool[np.ndarray, "n c"]
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "n c"]]:
    """Return the largest of the chosen logarithms of each cell, and by how much the others are below it."""
    chosen_nc = np.where(chosen_nc, log_nc, np.float32(-np.inf))
    largest_n = chosen_nc.max(axis=1)
    return largest_n, chosen_nc - largest_n[:, None]


def _log_sum(log_nc: Float[np.ndarray, "n c"], temperature: float) -> Float[np.ndarray, " n"]:
    return np.log(np.exp(log_nc / np.float32(temperature)).sum(axis=1, dtype=np.float64))


def _log(share_nc: Float[np.ndarray, "n c"]) -> Float[np.ndarray, "n c"]:
    return np.log(np.maximum(share_nc, _LEAST_SHARE))
