"""The built-in simulated atlas: where it lies, and that nobody can take it for real cells."""

import sys
import time
from pathlib import Path

from hce_jax.errors import StoreError
from hce_jax.store.simulate import simulate_atlas

BUILTIN_ATLAS = Path("data") / "simulated_v1"


def builtin_atlas() -> Path:
    """Return the folder of the simulated atlas, below the working directory; make it when it is not there yet.

    Says on standard error, every time, that the cells are simulated.

    Raises
    ------
    StoreError
        If it cannot be written.

    Examples
    --------
    >>> builtin_atlas()  # doctest: +SKIP
    PosixPath('data/simulated_v1')
    """
    print(
        "DATA_PATH is not set: using the built-in SIMULATED atlas. Its cells, genes and studies are made up; "
        "scores on it say nothing about real cells.",
        file=sys.stderr,
    )
    if not BUILTIN_ATLAS.is_dir():
        print(f"making {BUILTIN_ATLAS} (once, about 10 s) ...", file=sys.stderr)
        start = time.perf_counter()
        try:
            simulate_atlas(BUILTIN_ATLAS)
        except StoreError:
            if not BUILTIN_ATLAS.is_dir():  # else another process was quicker: the same atlas, bit for bit
                raise
        print(f"made {BUILTIN_ATLAS} in {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return BUILTIN_ATLAS
