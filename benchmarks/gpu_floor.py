"""What a step cannot do without, and how long a card takes for that at least."""

from typing import NamedTuple

from benchmarks.step import HYPER_PARAMETERS

#: Models that are trained on augmented cells, as published.
AUGMENTED = ("mlp", "tabnet")


class Card(NamedTuple):
    """Measured rates of the device.

    Attributes
    ----------
    bandwidth
        Bytes a second, read and written, of a copy in its memory.
    link
        Bytes a second from the host.
    operations
        Of matrix products a second, by precision.
    """

    bandwidth: float
    link: float
    operations: dict[str, float]


class Needs(NamedTuple):
    """What a step cannot do without: bytes in device memory, operations of matrix products, bytes from the host."""

    memory: float
    operations: float
    link: float

    def floor(self, card: Card, precision: str) -> tuple[float, str]:
        """Return the seconds that they take at least, and which of them it is."""
        return max(
            (self.memory / card.bandwidth, "memory"),
            (self.operations / card.operations[precision], "operations"),
            (self.link / card.link, "link"),
        )


def n_parameters(model: str, genes: int, types: int) -> int:
    """Return the number of parameters.

    With w = n_d + n_a, TabNet has kernels g x 2w (one, shared), w x 2w (every other gated layer), n_a x g (attention)
    and n_d x c, and two numbers a feature for every batch norm.
    """
    hyper = HYPER_PARAMETERS
    if model == "linear":
        return genes * types + types
    if model == "mlp":
        hidden, layers = hyper["hidden_size"], hyper["n_hidden"]
        return genes * hidden + (layers - 1) * hidden**2 + 3 * layers * hidden + hidden * types + types
    width, steps = hyper["n_d"] + hyper["n_a"], hyper["n_steps"]
    own, shared = hyper["n_independent"], hyper["n_shared"]
    gated = genes * 2 * width + (shared - 1 + own * (steps + 1)) * 2 * width**2
    norms = 2 * genes + (steps + 1) * (shared + own) * 4 * width + steps * 2 * genes
    return gated + norms + steps * hyper["n_a"] * genes + hyper["n_d"] * types


def product_sizes(model: str, genes: int, types: int) -> list[tuple[int, int, bool]]:
    """Return the matrix products of the forward pass: (width in, width out, whether the input has a gradient).

    TabNet's first shared layer is applied once to the cells, which have no gradient, and in each step to the selected
    cells, which have one (that of the mask).
    """
    hyper = HYPER_PARAMETERS
    if model == "linear":
        return [(genes, types, False)]
    if model == "mlp":
        hidden = hyper["hidden_size"]
        return [(genes, hidden, False), *[(hidden, hidden, True)] * (hyper["n_hidden"] - 1), (hidden, types, True)]
    width = hyper["n_d"] + hyper["n_a"]
    further = [(width, 2 * width, True)] * (hyper["n_shared"] + hyper["n_independent"] - 1)
    step = [(hyper["n_a"], genes, True), (genes, 2 * width, True), *further]
    return [(genes, 2 * width, False), *further, *step * hyper["n_steps"], (hyper["n_d"], types, True)]


def needs(
    model: str, task: str, batch: int, genes: int, types: int, packed_bytes: int, vectors: int, members: int = 1
) -> Needs:
    """Return the least that a step of training or inference moves and computes.

    Operations: a product of (b, i) with (i, o) takes 2 b i o; its backward pass as many for the gradient of the weights
    and as many for that of the input, where there is one. Attention weights and expression are taken as dense, as the
    matrix units do. TabNet with one step at batch 2,048: 1.8e11.

    Bytes in device memory, each input read once and each output written once, and nothing between them (a dense batch
    of (b, g) is no input): the packed cells; in training, three float32 numbers a parameter (itself, and AdamW's two
    moments), read and written, and the augmentation vectors that are drawn, at most as many as cells; in inference the
    parameters, and the probabilities. From the host: the packed cells.
    """
    sizes, count = product_sizes(model, genes, types), n_parameters(model, genes, types)
    if task == "inference":
        operations = sum(2 * batch * n_in * n_out for n_in, n_out, _ in sizes)
        return Needs(packed_bytes + 4 * count + 4 * batch * types, operations, packed_bytes)
    operations = sum(2 * batch * n_in * n_out * (2 + with_gradient) for n_in, n_out, with_gradient in sizes)
    drawn = 4 * genes * min(batch, vectors) if model in AUGMENTED else 0
    return Needs(packed_bytes + drawn + members * 24 * count, members * operations, packed_bytes)
