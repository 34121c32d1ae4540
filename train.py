"""Train a cell-type classifier.

    python train.py --config configs/linear_hce.py --config.batch_size=4096

The store is the folder in DATA_PATH (or --config.data_path); without one, the built-in simulated atlas.
"""

import shlex

from ml_collections import config_flags

from hce_jax import command
from hce_jax.errors import UserError
from hce_jax.training import fit

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's configuration, a file in configs/.")


def main() -> None:
    """Train, and say where the result is and how to go on."""
    if _CONFIG.value is None:
        raise UserError("no configuration given; run: python train.py --config configs/linear_hce.py")
    result = fit(_CONFIG.value)
    if result.test is not None:
        print(f"test        macro F1 {result.test.f1_macro:.4f}, micro F1 {result.test.f1_micro:.4f}")
        print(f"next        python evaluate.py --split id --run {shlex.quote(str(result.run))}")


if __name__ == "__main__":
    command.run(main)
