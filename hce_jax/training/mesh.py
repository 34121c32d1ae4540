"""The devices as a one-axis mesh: batches are split over it, everything else lies on each device."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hce_jax.errors import ConfigError
from hce_jax.ops.batch_norm import part_sizes

AXIS = "data"


def data_mesh() -> Mesh:
    """Return a mesh of all devices with the single axis "data".

    The axis is Auto: inside ``jax.jit`` sums over a batch are reduced over the devices by the compiler.

    Examples
    --------
    >>> data_mesh().axis_names
    ('data',)
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))  # a host's rows lie together
    return Mesh(np.asarray(devices), (AXIS,), axis_types=(AxisType.Auto,))


def batch_sharding(mesh: Mesh, batch_size: int) -> NamedSharding:
    """Return the sharding of a batch: equal parts of its cells on each device.

    Raises
    ------
    ConfigError
        If the batch does not divide by the number of devices.

    Examples
    --------
    >>> batch_sharding(data_mesh(), 2048).spec
    P('data',)
    """
    if batch_size % mesh.size:
        raise ConfigError(
            f"config.batch_size is {batch_size}, which does not divide by the {mesh.size} devices; "
            f"pass --config.batch_size={max(batch_size // mesh.size, 1) * mesh.size}"
        )
    return NamedSharding(mesh, PartitionSpec(AXIS))


def check_ghost_batches(batch_size: int, virtual_batch_size: int, n_devices: int) -> None:
    """Check that every ghost batch lies on one device, so that its statistics need no word from the others.

    Raises
    ------
    ConfigError
        If one would lie on two.

    Examples
    --------
    >>> check_ghost_batches(2048, 256, n_devices=8)
    """
    of_device, of_part = batch_size // n_devices, part_sizes(batch_size, virtual_batch_size)[0]
    if n_devices > 1 and of_device % of_part:
        raise ConfigError(
            f"a ghost batch would lie on two devices: config.virtual_batch_size={virtual_batch_size} cuts "
            f"config.batch_size={batch_size} into ghost batches of {of_part} cells, and each of the {n_devices} "
            f"devices has {of_device}; pass --config.batch_size={n_devices * virtual_batch_size} or a multiple of it"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole.

    Examples
    --------
    >>> replicated(data_mesh()).is_fully_replicated
    True
    """
    return NamedSharding(mesh, PartitionSpec())
