"""The published models in torch.nn, as peers of a measurement: a process that takes stretches of steps when asked.

TabNet is written here after its description (docstrings of hce_jax/models/tabnet.py), in the way that the published
network goes about it: batch norms over dense matrices, ghost batches one after the other, 1.5-entmax by sorting. Its
modules are named as ours, so that weights can be carried over.

    python benchmarks/peers.py --genes 200 --types 9        then requests as JSON, a line each, on standard input
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.step import CLIP_NORM, HYPER_PARAMETERS, OPTIMIZER, torch_model

#: Different batches, taken in turn.
N_BATCHES = 4


class GhostNorm(nn.Module):
    """A batch norm over each ghost batch: ``torch.chunk`` into as many parts as hold the virtual batch size."""

    def __init__(self, width: int, virtual_batch_size: int, momentum: float):
        super().__init__()
        self.virtual_batch_size = virtual_batch_size
        self.norm = nn.BatchNorm1d(width, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (b, h)."""
        if not self.training:
            return self.norm(x)
        return torch.cat([self.norm(part) for part in x.chunk(max(len(x) // self.virtual_batch_size, 1))])


class Entmax15(torch.autograd.Function):
    """1.5-entmax of each row by sorting (Peters, Niculae and Martins 2019, arXiv:1905.05702, algorithm 2)."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        """Return p = max(z/2 - tau, 0)^2, tau being the last of the thresholds of growing supports that fits."""
        z = (z - z.amax(1, keepdim=True)) / 2
        ordered = z.sort(dim=1, descending=True).values
        size = torch.arange(1, z.shape[1] + 1, device=z.device, dtype=z.dtype)
        mean, mean_square = ordered.cumsum(1) / size, ordered.square().cumsum(1) / size
        excess = (1 - size * (mean_square - mean.square())) / size
        thresholds = mean - excess.clamp(min=0).sqrt()
        support = (thresholds <= ordered).sum(1, keepdim=True)
        p = (z - thresholds.gather(1, support - 1)).clamp(min=0).square()
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        """Return s g - s (sum s g) / (sum s) with s = sqrt(p)."""
        (p,) = ctx.saved_tensors
        s = p.sqrt()
        return s * (g - (s * g).sum(1, keepdim=True) / s.sum(1, keepdim=True))


class Transformer(nn.Module):
    """Feature transformer: gated layers, the shared ones first; all but the first are residual, times sqrt(1/2)."""

    def __init__(self, kernels: list[nn.Module], norms: list[nn.Module]):
        super().__init__()
        self.kernels, self.norms = nn.ModuleList(kernels), nn.ModuleList(norms)

    def forward(self, x: Tensor, shared: nn.ModuleList) -> Tensor:
        """Transform x (b, g) to (b, n_d + n_a)."""
        layers = zip([*shared, *self.kernels], self.norms, strict=True)
        for number, (kernel, norm) in enumerate(layers):
            gated = nn.functional.glu(norm(kernel(x)))
            x = (x + gated) * math.sqrt(0.5) if number else gated
        return x


class Attention(nn.Module):
    """Scores of the genes: linear and ghost norm."""

    def __init__(self, kernel: nn.Module, norm: nn.Module):
        super().__init__()
        self.kernel, self.norm = kernel, norm

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores (b, g) of the attended (b, n_a)."""
        return self.norm(self.kernel(x))


class TabNet(nn.Module):
    """TabNet with 1.5-entmax: logits (b, c) and the mean of sum_g M log(M + 1e-15) over cells and steps."""

    def __init__(self, genes: int, types: int, hyper: dict[str, Any]):
        super().__init__()
        self.n_d, self.gamma = hyper["n_d"], hyper["gamma"]
        width = hyper["n_d"] + hyper["n_a"]

        def kernels(count: int, n_in: int) -> list[nn.Module]:
            return [nn.Linear(width if layer else n_in, 2 * width, bias=False) for layer in range(count)]

        def norm(features: int) -> GhostNorm:
            return GhostNorm(features, hyper["virtual_batch_size"], hyper["momentum"])

        def transformer() -> Transformer:
            layers = hyper["n_shared"] + hyper["n_independent"]
            own = kernels(hyper["n_independent"], width if hyper["n_shared"] else genes)
            return Transformer(own, [norm(2 * width) for _ in range(layers)])

        steps = range(hyper["n_steps"])
        self.input_norm = nn.BatchNorm1d(genes, momentum=0.01)
        self.shared_kernels = nn.ModuleList(kernels(hyper["n_shared"], genes))
        self.splitter = transformer()
        self.transformers = nn.ModuleList([transformer() for _ in steps])
        self.attentions = nn.ModuleList(
            [Attention(nn.Linear(hyper["n_a"], genes, bias=False), norm(genes)) for _ in steps]
        )
        self.head = nn.Linear(hyper["n_d"], types, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Classify x (b, g)."""
        x = self.input_norm(x)
        attended = self.splitter(x, self.shared_kernels)[:, self.n_d :]
        prior, embedding, negative_entropy = torch.ones_like(x), 0.0, 0.0
        for attention, transformer in zip(self.attentions, self.transformers, strict=True):
            mask = Entmax15.apply(attention(attended).float() * prior)
            negative_entropy = negative_entropy + (mask * (mask + 1e-15).log()).sum(1).mean()
            prior = prior * (self.gamma - mask)
            out = transformer(mask * x, self.shared_kernels)
            embedding = embedding + out[:, : self.n_d].relu()
            attended = out[:, self.n_d :]
        return self.head(embedding), negative_entropy / len(self.attentions)


def hierarchical_loss(logits: Tensor, targets: Tensor, reachability: Tensor, weights: Tensor) -> Tensor:
    """Return the published loss: -log of the probability of each label's subtree, in the weighted mean."""
    mass = torch.softmax(logits.float(), 1) @ reachability.T
    losses = -torch.log(mass.gather(1, targets[:, None])[:, 0] + 1e-6)
    return (losses * weights[targets]).sum() / weights[targets].sum()


class Request(NamedTuple):
    """What a peer is asked to prepare.

    Attributes
    ----------
    model, precision, batch
        As in a row of the table; tf32 is the published ``set_float32_matmul_precision("high")``, bf16 autocast.
    task
        ``training`` or ``inference``.
    compiled
        With torch.compile.
    """

    model: str
    precision: str
    batch: int
    task: str
    compiled: bool


class Peers:
    """Makes the steps of the peers, on batches of dense float32 cells that lie on the device already."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.generator = torch.Generator(self.device).manual_seed(0)

    def cells(self, n: int) -> tuple[Tensor, Tensor]:
        """Draw cells with one gene in nine expressed, and their types."""
        where = {"device": self.device, "generator": self.generator}
        x = torch.rand(n, self.args.genes, **where)
        x = torch.where(x < 0.113, 40 * x, 0)
        return x, torch.randint(self.args.types, (n,), **where)

    def network(self, model: str) -> nn.Module:
        """Return a new network."""
        made = (
            TabNet(self.args.genes, self.args.types, HYPER_PARAMETERS)
            if model == "tabnet"
            else torch_model(self.args, model)
        )
        return made.to(self.device)

    def prepare(self, request: Request) -> Callable[[Tensor, Tensor], Tensor]:
        """Return one step, (x, targets) -> a tensor that is complete when the step is."""
        torch.set_float32_matmul_precision("highest" if request.precision == "float32" else "high")
        network = self.network(request.model)
        half = request.precision == "bf16"
        lower = (lambda: torch.autocast(self.device.type, torch.bfloat16)) if half else nullcontext
        if request.task == "inference":
            return self._inference(network.eval(), lower, request.compiled)
        return self._training(network, lower, request)

    def _inference(self, network: nn.Module, lower: Callable[[], Any], compiled: bool) -> Callable[..., Tensor]:
        def probabilities(x: Tensor, targets: Tensor) -> Tensor:
            with torch.no_grad(), lower():
                output = network(x)
                logits = output[0] if isinstance(output, tuple) else output
                return torch.softmax(logits.float(), 1)

        return torch.compile(probabilities) if compiled else probabilities

    def _training(self, network: nn.Module, lower: Callable[[], Any], request: Request) -> Callable[..., Tensor]:
        rate, decay = OPTIMIZER[request.model]
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=decay)
        reachability = torch.eye(self.args.types, device=self.device)
        weights = torch.ones(self.args.types, device=self.device)

        def loss_of(x: Tensor, targets: Tensor) -> Tensor:
            with lower():
                output = network(x)
            logits, negative_entropy = output if isinstance(output, tuple) else (output, 0.0)
            loss = hierarchical_loss(logits, targets, reachability, weights)
            return loss - HYPER_PARAMETERS["lambda_sparse"] * negative_entropy

        compiled = torch.compile(loss_of) if request.compiled else loss_of

        def step(x: Tensor, targets: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss = compiled(x, targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), CLIP_NORM)
            optimizer.step()
            return loss.detach()

        return step

    def wait(self) -> None:
        """Wait until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class Stretches:
    """Steps of one peer, over several batches in turn; the result of a step is read when the next is under way."""

    def __init__(self, peers: Peers, request: Request):
        self._peers, self._step = peers, peers.prepare(request)
        self._batches = [peers.cells(request.batch) for _ in range(N_BATCHES)]

    def run(self, n_steps: int) -> float:
        """Take some steps; return the seconds until the last is complete."""
        self._peers.wait()
        began = time.perf_counter()
        earlier = None
        for number in range(n_steps):
            result = self._step(*self._batches[number % N_BATCHES])
            if earlier is not None:
                earlier.cpu()
            earlier = result
        self._peers.wait()
        return time.perf_counter() - began


def serve(peers: Peers, requests: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Answer each request: ``{"prepare": {...}}``, then ``{"run": n}`` as often as wanted."""
    current: Stretches | None = None
    for line in requests:
        request = json.loads(line)
        began = time.perf_counter()
        try:
            if "prepare" in request:
                current = None  # its memory is free before the next takes some
                current = Stretches(peers, Request(**request["prepare"]))
                current.run(1)
                yield {"seconds": time.perf_counter() - began, "torch": torch.__version__}
            elif current is not None:
                yield {"seconds": current.run(request["run"])}
            else:
                yield {"error": "nothing is prepared"}
        except Exception as error:  # noqa: BLE001 (out of memory, no compiler: the caller says so and goes on)
            yield {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}


def main() -> None:
    """Answer requests until there are none."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genes", type=int, required=True)
    parser.add_argument("--types", type=int, required=True)
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    for answer in serve(Peers(parser.parse_args()), sys.stdin):
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
