"""A profile of some training steps, for TensorBoard."""

from pathlib import Path
from typing import Any

import jax

from hce_jax.training.hosts import say

#: Steps before: they are compiled, and wait for the first cells.
_WARM_UP = 5


class Profile:
    """Records ``n_steps`` training steps, once the first five are over; nothing if ``n_steps`` is 0.

    Parameters
    ----------
    folder
        Where TensorBoard's profile plugin looks: the folder of a run.
    n_steps
        How many steps.

    Examples
    --------
    >>> profile = Profile(Path("run"), n_steps=0)
    >>> profile.after_step(None)
    """

    def __init__(self, folder: Path, n_steps: int):
        self._folder, self._n_steps, self._taken = folder, n_steps, 0

    def after_step(self, result: Any) -> None:
        """Take notice of a step, given what it computes."""
        if not self._n_steps:
            return
        self._taken += 1
        if self._taken == _WARM_UP:
            jax.block_until_ready(result)
            jax.profiler.start_trace(str(self._folder))
        elif self._taken == _WARM_UP + self._n_steps:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Write what was recorded, if training ends before all steps were."""
        if self._n_steps and self._taken >= _WARM_UP:
            jax.profiler.stop_trace()
            say(f"profile     {self._folder} (tensorboard --logdir, with tensorboard-plugin-profile)")
            self._n_steps = 0
