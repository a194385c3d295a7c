"""Meshes and placements: plain data parallelism over every device."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from distilljax.typing import PyTree

RULES = ("dp",)


def make_mesh(devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
  """A mesh with the axis `data` over all devices (or those given).

  Args:
    devices: devices in order; None is all of them.

  Returns:
    A mesh of one axis.
  """
  devices = jax.devices() if devices is None else list(devices)
  return jax.make_mesh(
    (len(devices),), ("data",), (AxisType.Auto,), devices=devices
  )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def rows(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The leading axis is cut over the mesh's data axis."""
  return NamedSharding(mesh, PartitionSpec("data"))


def put_rows(batch: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
  """Host rows of this process -> global arrays, cut over the data axis.

  Args:
    batch: pytree of NumPy arrays with a common leading axis: this process's
      rows (with one process: the whole batch).
    mesh: the mesh.

  Returns:
    The same pytree of global arrays.

  Raises:
    ValueError: the rows do not divide over the devices.
  """
  sharding = rows(mesh)
  local = len(mesh.local_devices)
  for name, array in batch.items():
    if np.shape(array)[0] % local:
      raise ValueError(
        f"batch: {name} must have rows divisible by {local} devices, got"
        f" {np.shape(array)[0]}; nearest:"
        f" {max(1, round(np.shape(array)[0] / local)) * local}"
      )
  if jax.process_count() == 1:
    return jax.device_put(dict(batch), sharding)
  return {
    k: jax.make_array_from_process_local_data(sharding, np.asarray(v))
    for k, v in batch.items()
  }


def _own_rows(array: jax.Array) -> np.ndarray:
  """This process's rows of a global array whose leading axis is cut."""
  if jax.process_count() == 1:
    return np.asarray(array)
  parts = {s.index[0].start or 0: s.data for s in array.addressable_shards}
  return np.concatenate([np.asarray(parts[i]) for i in sorted(parts)])


def map_rows(fn: Callable[..., np.ndarray], *arrays: jax.Array) -> jax.Array:
  """Applies a host function to this process's rows: NumPy in, NumPy out.

  What `collect` scores rollouts with: no process sees another one's rows, and
  every process must call it.

  Args:
    fn: fn(*rows) -> an array with as many rows.
    *arrays: global arrays with a common leading axis, placed alike.

  Returns:
    A global array, its rows placed as those of the first argument.
  """
  made = np.asarray(fn(*(_own_rows(a) for a in arrays)))
  if jax.process_count() == 1:
    placed = getattr(arrays[0], "sharding", None)
    return jax.device_put(made, placed)
  return jax.make_array_from_process_local_data(arrays[0].sharding, made)
