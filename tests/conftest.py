"""What every test may use: golden vectors driven by their manifest, and the folder of real cells.

A golden test is marked with the kind of file it reads, has ``golden`` in its name, and is run once per such file:

    @pytest.mark.golden("trajectory", model="linear")
    def test_golden_trajectory(golden):
        golden.config["lr"], golden.arrays["x"]

Keywords restrict it to files whose hyper-parameters have these values.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# Shapes that broadcast by accident are an error in the tests. JAX reads this when it is first imported.
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# Most of the tests' time goes into compiling and little into what was compiled: XLA leaves its optimisations out, here
# and in the processes that tests start, but for golden tests. JAX_DISABLE_MOST_OPTIMIZATIONS=0 gives them to all tests.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

DEFAULT_GOLDEN_DIR = Path(__file__).parent / "golden"


@dataclasses.dataclass(frozen=True)
class GoldenFile:
    """One file of a golden folder, as its manifest describes it."""

    folder: Path
    name: str
    entry: dict[str, Any]

    @property
    def path(self) -> Path:
        return self.folder / self.name

    @property
    def kind(self) -> str:
        return self.entry["kind"]

    @property
    def config(self) -> dict[str, Any]:
        """The exact hyper-parameters (those inside the archive are rounded to float32)."""
        return self.entry.get("config", {})

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path, allow_pickle=False) as archive:
            return {key: archive[key] for key in archive.files}

    def beside(self, kind: str) -> list["GoldenFile"]:
        """Give the files of that kind in this file's folder and the folders below it."""
        return [file for file in golden_files(kind) if self.path.parent in file.path.parents]


def golden_dir() -> Path:
    return Path(os.environ.get("HCE_GOLDEN_DIR") or DEFAULT_GOLDEN_DIR)


@functools.cache
def golden_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise pytest.UsageError(f"{manifest} is not there; HCE_GOLDEN_DIR must name a folder of golden vectors")
    return json.loads(manifest.read_text())


def golden_files(kind: str | None = None, **config: object) -> list[GoldenFile]:
    """Give the golden files of a kind (of every kind) whose hyper-parameters include those given, by name."""
    folder = golden_dir()
    files = [GoldenFile(folder, name, entry) for name, entry in sorted(golden_manifest(folder).items())]
    return [file for file in files if kind in (None, file.kind) and config.items() <= file.config.items()]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "golden(kind, **config): run once per golden file of that kind, given as `golden`"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("golden")
    if marker is None or "golden" not in metafunc.function.__name__:
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: a golden test has the mark and 'golden' in its name")
    files = golden_files(*marker.args, **marker.kwargs)
    if not files and golden_dir() == DEFAULT_GOLDEN_DIR:
        raise pytest.UsageError(f"{metafunc.definition.nodeid}: tests/golden holds no such file ({marker})")
    cases = [pytest.param(file, id=file.name) for file in files]
    if not files:  # another folder need not hold every kind
        cases = [pytest.param(None, marks=pytest.mark.skip(f"HCE_GOLDEN_DIR holds no file of {marker.args}"))]
    metafunc.parametrize("golden", cases)


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Have what is compiled several times in a process, such as the same step for several runs, compiled once."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules that take longest, of training, so that of several workers none has to wait at the end."""
    items.sort(key=lambda item: "training" not in item.path.parts)


@pytest.fixture(autouse=True)
def compiled_as_for_users(request: pytest.FixtureRequest) -> Iterator[None]:
    """Have golden tests compiled with all optimisations: their tolerances were measured so."""
    import jax

    if "golden" not in request.fixturenames:
        yield
        return
    quick = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", quick)


@pytest.fixture(scope="session")
def real_dir() -> Path:
    """Give the folder of real cells, which does not come with the code."""
    folder = os.environ.get("HCE_REAL_DIR")
    if not folder:
        pytest.skip("HCE_REAL_DIR is not set: it names the folder of real cells")
    if not Path(folder).is_dir():
        pytest.fail(f"HCE_REAL_DIR is {folder}, which is no folder")
    return Path(folder)
