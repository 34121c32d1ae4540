"""Time of one training step against PyTorch, on this machine: forward, backward, clip, AdamW.

    python benchmarks/step.py                         the table of the documentation (pip install 'hce_jax[bench]')
    python benchmarks/step.py --models tabnet --steps 3
    python benchmarks/step.py --genes 200 --types 9 --batch_size 64      small, to see that it runs

Every contender runs in a process of its own, for its peak memory, and the contenders of a model take turns step by
step, so that whatever else the machine does hits them alike. The peers are torch.nn (linear, MLP) and pytorch-tabnet
4.0's TabNetNoEmbeddings (from 4.1 on it also multiplies every mask with an identity of genes x genes), with the same
hyper-parameters, loss and optimiser; those that are not installed are left out. Data are random with one gene in ten
expressed. Peak memory is the resident set of the process, or the device's on a GPU.
"""

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CONTENDERS = ("hce_jax", "torch", "torch.compile")
MODELS = ("linear", "mlp", "tabnet")
# The published hyper-parameters; learning rate and decay by model.
HYPER_PARAMETERS: dict[str, Any] = {
    "hidden_size": 128, "n_hidden": 8, "dropout": 0.1,
    "n_d": 128, "n_a": 64, "n_steps": 1, "gamma": 1.3, "n_independent": 5, "n_shared": 3, "virtual_batch_size": 256,
    "momentum": 0.02, "mask_type": "entmax", "lambda_sparse": 1e-5,
}  # fmt: skip
OPTIMIZER = {"linear": (5e-4, 0.01), "mlp": (2e-3, 0.05), "tabnet": (5e-3, 0.05)}
CLIP_NORM = 1.0

Step = Callable[[], None]


def make_data(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return x (b, g), targets (b,) and the reachability matrix of a random tree (c, c)."""
    rng = np.random.default_rng(0)
    shape = (args.batch_size, args.genes)
    x = np.where(rng.random(shape, np.float32) < 0.1, 5 * rng.random(shape, np.float32), np.float32(0))
    reachability = np.eye(args.types, dtype=np.float32)
    for child in range(1, args.types):
        reachability[:, child] = np.maximum(reachability[:, child], reachability[:, rng.integers(child)])
    return x, rng.integers(0, args.types, args.batch_size), reachability


def jax_step(args: argparse.Namespace, model_type: str) -> Step:
    """Return the package's own training step on a batch that lies on the device."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from hce_jax.input import batch_of_values, dense_batch
    from hce_jax.models import build_model
    from hce_jax.training.mesh import batch_sharding, data_mesh
    from hce_jax.training.optim import published_optimizer, step_schedule
    from hce_jax.training.steps import Objective, init_state, make_train_step
    from hce_jax.typing import resolve_precision

    x, targets, reachability = make_data(args)
    config = {"model_type": model_type, **HYPER_PARAMETERS}
    precision = resolve_precision(args.precision)
    model = build_model(config, args.genes, args.types, nnx.Rngs(0), precision=precision)
    learning_rate, weight_decay = OPTIMIZER[model_type]
    optimizer = published_optimizer(step_schedule(learning_rate, 0.9, 1, 1000), weight_decay, CLIP_NORM)
    graphdef, state = init_state([model], optimizer)
    objective = Objective(jnp.asarray(reachability), jnp.ones(args.types), True, 1e-6)
    train_step = make_train_step(graphdef, [objective], optimizer, jax.random.split(jax.random.key(0), 1))
    packed = jax.device_put(batch_of_values(x, targets))
    sharding = batch_sharding(data_mesh(), args.batch_size)

    def step() -> None:
        nonlocal state
        state, _ = train_step(state, dense_batch(packed, sharding))
        jax.block_until_ready(state)

    return step


def torch_step(args: argparse.Namespace, model_type: str, compiled: bool) -> Step:
    """Return the same step written with torch.nn and pytorch-tabnet."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.precision != "float32" and device == "cuda":
        torch.set_float32_matmul_precision("high")
    model = torch_model(args, model_type).to(device)
    learning_rate, weight_decay = OPTIMIZER[model_type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay)
    x, targets, reachability = (torch.from_numpy(array).to(device) for array in make_data(args))

    def loss_of() -> torch.Tensor:
        output = model(x)
        logits, m_loss = output if isinstance(output, tuple) else (output, 0.0)
        mass = torch.softmax(logits, 1) @ reachability.T
        picked = mass.gather(1, targets[:, None])
        return -torch.log(picked + 1e-6).mean() - HYPER_PARAMETERS["lambda_sparse"] * m_loss

    if compiled:
        loss_of = torch.compile(loss_of)

    def step() -> None:
        optimizer.zero_grad()
        loss_of().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return step


def torch_model(args: argparse.Namespace, model_type: str) -> Any:
    """Return the peer's network."""
    import torch

    hyper = HYPER_PARAMETERS
    if model_type == "linear":
        return torch.nn.Linear(args.genes, args.types)
    if model_type == "mlp":
        layers: list[torch.nn.Module] = []
        for index in range(hyper["n_hidden"]):
            width = hyper["hidden_size"]
            layers += [torch.nn.Linear(width if index else args.genes, width), torch.nn.BatchNorm1d(width),
                       torch.nn.SiLU(), torch.nn.Dropout(hyper["dropout"])]  # fmt: skip
        return torch.nn.Sequential(*layers, torch.nn.Linear(hyper["hidden_size"], args.types))
    from pytorch_tabnet.tab_network import TabNetNoEmbeddings

    others = ("hidden_size", "n_hidden", "dropout", "lambda_sparse")
    return TabNetNoEmbeddings(args.genes, args.types, **{k: v for k, v in hyper.items() if k not in others})


def peak_memory(contender: str) -> int:
    """Return the peak of this process in bytes: of the GPU if there is one, else resident."""
    if contender == "hce_jax":
        import jax

        statistics_of_device = jax.devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in statistics_of_device:
            return statistics_of_device["peak_bytes_in_use"]
    else:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def work(args: argparse.Namespace, contender: str, model_type: str) -> None:
    """Be one contender: make the step, then run it once for every line on standard input and tell the time."""
    step = jax_step(args, model_type) if contender == "hce_jax" else torch_step(
        args, model_type, compiled=contender == "torch.compile"
    )  # fmt: skip
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak_memory(contender)}), flush=True)


class Contender:
    """A process that makes a step whenever asked."""

    def __init__(self, name: str, model_type: str):
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name, "--models", model_type]
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(Path(__file__).resolve().parent.parent), environment.get("PYTHONPATH", "")]
        )
        self.name, self.peak = name, 0
        self.seconds: list[float] = []
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def step(self) -> bool:
        """Ask for a step; return whether the process still lives."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write("step\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            return False
        self.seconds.append(answer["seconds"])
        self.peak = answer["peak"]
        return True

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()


def available() -> list[str]:
    """Return the contenders that can run here."""
    found = ["hce_jax"]
    if importlib.util.find_spec("torch"):
        found += ["torch", "torch.compile"]
    return found


def compare(args: argparse.Namespace, model_type: str) -> list[str]:
    """Let the contenders of one model take turns; return the rows of the table."""
    names = [name for name in args.contenders if name in available()]
    if model_type == "tabnet" and not importlib.util.find_spec("pytorch_tabnet"):
        names = names[:1]
    contenders = [Contender(name, model_type) for name in names]
    for _ in range(args.steps + 2):  # the first compiles, the second warms up
        contenders = [contender for contender in contenders if contender.step()]
    for contender in contenders:
        contender.close()
    medians = {contender.name: statistics.median(contender.seconds[2:]) for contender in contenders}
    rows = []
    for contender in contenders:
        median = medians[contender.name]
        ratio = f"{medians['torch'] / median:5.2f}x" if "torch" in medians else "     -"
        rows.append(
            f"{model_type:8}{contender.name:15}{1e3 * median:10.1f}{1e3 * min(contender.seconds[2:]):10.1f}{ratio:>10}"
            f"{args.batch_size / median:12,.0f}{contender.peak / 1e9:10.2f}{contender.seconds[0] - median:11.1f}"
        )
    return rows


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--batch_size", type=int, default=2048)
    parser.add_argument("--genes", type=int, default=19_331)
    parser.add_argument("--types", type=int, default=164)
    parser.add_argument("--steps", type=int, default=7, help="timed steps, after two that are not")
    parser.add_argument("--precision", choices=("float32", "tf32", "bf16"), default="float32")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Print the table, or be one of the contenders."""
    args = parse_args()
    if args.worker:
        work(args, args.worker, args.models[0])
        return
    print(f"{os.cpu_count()} CPU cores; batch {args.batch_size}, {args.genes:,} genes, {args.types} types, "
          f"{args.precision}; median of {args.steps} steps")  # fmt: skip
    print(f"{'model':8}{'contender':15}{'median ms':>10}{'min ms':>10}{'speed-up':>10}{'cells/s':>12}{'peak GB':>10}"
          f"{'compile s':>11}")  # fmt: skip
    for model_type in args.models:
        print("\n".join(compare(args, model_type)), flush=True)


if __name__ == "__main__":
    main()
