"""Several hosts (processes) that train one model together, and SIGTERM, on which all of them must agree."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

import jax
import numpy as np
from jax.experimental import multihost_utils

from hce_jax.errors import ConfigError, Preempted, UserError

#: Steps from one moment at which hosts agree to the next: agreeing waits for the devices.
_AGREE_EVERY = 20
#: What JAX's error says where another host has gone.
_LOST_HOST = ("Gloo", "closed by peer", "coordination service", "heartbeat", "UNAVAILABLE", "Connection reset")
_LOST = "another host has ended or cannot be reached; the same command on all hosts goes on from the newest save"
#: Seconds that the hosts wait for each other at the start.
_PATIENCE = 300
#: Seconds after which a host that failed ends, if the others have not failed too: they may be waiting for it.
_LEAVE_AFTER = 5


def connect(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Join the other hosts, before any computation; one host alone has nothing to do.

    Cloud TPU pods and Slurm steps are recognised by JAX. Elsewhere all three are given, or stand in the environment as
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Parameters
    ----------
    coordinator_address
        host:port of process 0.
    num_processes
        How many there are.
    process_id
        Which this one is, from 0.

    Raises
    ------
    ConfigError
        If only some of the three are known, one of them is impossible, or the port is in use. If the hosts do not all
        meet in five minutes, the process ends with the same line and exit code as for such an error.

    Examples
    --------
    >>> connect(None, None, None)  # doctest: +SKIP
    """
    address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = num_processes if num_processes is not None else _from_environment("JAX_NUM_PROCESSES")
    index = process_id if process_id is not None else _from_environment("JAX_PROCESS_ID")
    known = [value is not None for value in (address, count, index)]
    if any(known) and not all(known):
        raise ConfigError(
            "to train on several hosts give all of --coordinator_address, --num_processes and --process_id "
            "(or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID)"
        )
    if not any(known) and os.environ.get("SLURM_NTASKS", "1") == "1" and not _on_cloud_tpu():
        return
    if all(known):
        _check_place(address, count, index)  # type: ignore[arg-type]
    where = (
        f"process {index} of {count} did not meet the others at {address}" if all(known) else "the hosts did not meet"
    )
    remedy = "start all of them with the same address and count, each with a --process_id of its own"
    jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM from Preemption
    # Where JAX gives up waiting it aborts, with pages of C++, so this is done before.
    giving_up = _end_later(_PATIENCE, 2, f"error: {where} in {_PATIENCE} seconds; {remedy}\n")
    try:
        jax.distributed.initialize(address, count, index, initialization_timeout=2 * _PATIENCE)
    except (ValueError, RuntimeError) as error:
        if not any(known):
            return  # a Slurm allocation without a step, a TPU machine of its own: one host
        raise ConfigError(f"{where}: {error}; {remedy}") from error
    finally:
        giving_up.cancel()


def _check_place(address: str, count: int, index: int) -> None:
    """Check what JAX answers with a crash."""
    if not 0 <= index < count:
        raise ConfigError(f"--process_id={index} is not below --num_processes={count}; they are counted from 0")
    port = address.rpartition(":")[2]
    if ":" not in address or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--coordinator_address={address} is not of the form host:port")
    if index == 0:
        try:
            socket.create_connection(("localhost", int(port)), timeout=1).close()
        except OSError:
            return  # nobody is there, as it should be
        raise ConfigError(
            f"port {port} of this machine is in use, by another process with --process_id=0 or another program; give "
            "all processes another --coordinator_address"
        )


@contextmanager
def leaving() -> Iterator[None]:
    """Leave the other hosts soon where the block fails on this one; JAX itself would keep all waiting for minutes.

    Examples
    --------
    >>> with leaving():
    ...     pass
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() > 1:
            _end_later(_LEAVE_AFTER, 2 if isinstance(error, UserError) else 1)
            if isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error) for word in _LOST_HOST):
                print(f"error: {_LOST}", file=sys.stderr, flush=True)
                raise SystemExit(1) from error
        raise


def _end_later(seconds: float, code: int, message: str = "") -> threading.Timer:
    """End the process whatever it is doing then, unless the timer is cancelled before."""

    def end() -> None:
        print(message, end="", file=sys.stderr, flush=True)
        os._exit(code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    return timer


def _from_environment(name: str) -> int | None:
    value = os.environ.get(name)
    if value is not None and not value.isdecimal():
        raise ConfigError(f"the environment variable {name} is {value!r}; it must be a number")
    return None if value is None else int(value)


def _on_cloud_tpu() -> bool:
    return any(os.path.exists(f"/dev/{name}") for name in ("accel0", "vfio/0")) and not os.environ.get("JAX_PLATFORMS")


def is_first() -> bool:
    """Tell whether this host writes and speaks for all.

    Examples
    --------
    >>> is_first()
    True
    """
    return jax.process_index() == 0


def say(text: str) -> None:
    """Print a line, on the first host.

    Examples
    --------
    >>> say("epoch 3")
    epoch 3
    """
    if is_first():
        print(text, flush=True)


def on_first(work: Callable[[], Sequence[int]], n_numbers: int) -> list[int]:
    """Do something on the first host only; return the numbers it gives on all hosts.

    Raises
    ------
    ConfigError
        On the other hosts, where the first one raised something.

    Examples
    --------
    >>> on_first(lambda: [3, 4], n_numbers=2)
    [3, 4]
    """
    if jax.process_count() == 1:
        return list(work())
    error, numbers = None, [0] * n_numbers
    if is_first():
        try:
            numbers = list(work())
        except Exception as raised:  # noqa: BLE001 (raised again when the others know of it)
            error = raised
    failed, *numbers = multihost_utils.broadcast_one_to_all(np.array([error is not None, *numbers])).tolist()
    if error is not None:
        raise error
    if failed:
        raise ConfigError("the first host could not begin; see its message")
    return numbers


class Preemption:
    """Notices SIGTERM while its block runs, and tells all hosts of it at the same step.

    Outside the main thread, where Python cannot notice signals, it notices none.

    Examples
    --------
    >>> with Preemption() as preemption:
    ...     preemption.check(step=0)
    False
    """

    def __init__(self) -> None:
        self._noticed = False

    def __enter__(self) -> "Preemption":
        """Begin to notice."""
        if threading.current_thread() is threading.main_thread():
            self._earlier = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the signal as it was."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._earlier)

    def _notice(self, *_: object) -> None:
        self._noticed = True

    def check(self, step: int, save_due: bool = False) -> bool:
        """Tell whether a save is due on the first host; every host calls this after the same steps.

        Raises
        ------
        Preempted
            If any host was told to end.
        """
        noticed = self._noticed
        if jax.process_count() > 1:
            if step % _AGREE_EVERY:
                return False
            told = np.asarray(multihost_utils.process_allgather(np.array([save_due and is_first(), noticed])))
            save_due, noticed = (bool(told.reshape(-1, 2)[:, which].any()) for which in (0, 1))
        if noticed:
            raise Preempted
        return save_due
