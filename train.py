"""Train a cell-type classifier, or go on with a training that was stopped: it is the same command.

    python train.py --config configs/linear_hce.py --config.batch_size=4096

The store is the folder in DATA_PATH (or --config.data_path); without one, the built-in simulated atlas.
"""

import shlex

from absl import flags
from ml_collections import config_flags

from hce_jax import command
from hce_jax.errors import Preempted, UserError
from hce_jax.training import fit
from hce_jax.training.hosts import connect, leaving, say

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run's configuration, a file in configs/.")
_NEW_RUN = flags.DEFINE_bool("new_run", False, "Begin a new run, though one with this configuration is there.")
_RESUME_FROM = flags.DEFINE_integer(
    "resume_from", None, "Step of the save to go on from; the newest if not given.", lower_bound=1
)
_COORDINATOR = flags.DEFINE_string("coordinator_address", None, "Several hosts: host:port of process 0.")
_N_PROCESSES = flags.DEFINE_integer("num_processes", None, "Several hosts: how many processes.", lower_bound=1)
_PROCESS = flags.DEFINE_integer("process_id", None, "Several hosts: which process this is, from 0.", lower_bound=0)


def main() -> None:
    """Train, and say where the result is and how to go on."""
    if _CONFIG.value is None:
        raise UserError("no configuration given; run: python train.py --config configs/linear_hce.py")
    if _NEW_RUN.value and _RESUME_FROM.value:
        raise UserError("--new_run and --resume_from exclude each other; give one of them")
    connect(_COORDINATOR.value, _N_PROCESSES.value, _PROCESS.value)
    try:
        with leaving():
            results = fit(_CONFIG.value, new_run=_NEW_RUN.value, resume_from=_RESUME_FROM.value)
    except Preempted as told:
        say(str(told))
        return
    for result in results:
        if result.test is not None:
            which = f"{result.run.parts[-3]}/{result.run.name}  " if len(results) > 1 else ""
            say(f"test        {which}macro F1 {result.test.f1_macro:.4f}, micro F1 {result.test.f1_micro:.4f}")
    runs = ",".join(shlex.quote(str(result.run)) for result in results)
    say(f"next        python evaluate.py --split id --run {runs}")


if __name__ == "__main__":
    command.run(main)
