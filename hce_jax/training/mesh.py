"""The devices as a one-axis mesh: batches are split over it, everything else lies on each device."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from hce_jax.errors import ConfigError

AXIS = "data"


def data_mesh() -> Mesh:
    """Return a mesh of all devices with the single axis "data".

    The axis is Auto: inside ``jax.jit`` sums over a batch are reduced over the devices by the compiler.

    Examples
    --------
    >>> data_mesh().axis_names
    ('data',)
    """
    return Mesh(np.asarray(jax.devices()), (AXIS,), axis_types=(AxisType.Auto,))


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


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole.

    Examples
    --------
    >>> replicated(data_mesh()).is_fully_replicated
    True
    """
    return NamedSharding(mesh, PartitionSpec())
