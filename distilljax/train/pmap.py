"""The train step for codebases that still live in pmap.

Such code keeps a copy of every array on every device, stacked along a leading
axis [device, ...], and cuts a batch in [device, rows, ...]. The adapter here
relabels these arrays as global ones, runs the one train step, and labels its
results back, in a single program: no number moves for it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

from distilljax import _checks
from distilljax.train import method as method_lib
from distilljax.train import sharding
from distilljax.train.metrics import Mean
from distilljax.train.step import State, make_step
from distilljax.typing import Array, Params, PyTree


class PmapStep:
  """A `Step` whose arrays are stacked. Made by `make_pmap_step`.

  Attributes:
    step: the step inside.
  """

  def __init__(self, step):
    self.step = step
    mesh = step.mesh
    self._count = mesh.size
    self._stacked = NamedSharding(mesh, PartitionSpec("data"))
    self.jitted = jax.jit(
      self._run,
      static_argnums=0,
      donate_argnums=1,
      in_shardings=self._stacked,
      out_shardings=self._stacked,
    )

  def __call__(
    self,
    updates: tuple[str, ...],
    state: State,
    frozen: Mapping[str, Params],
    batch: Mapping[str, Any],
  ) -> tuple[State, dict[str, Mean]]:
    """One step; every argument and result is [device, ...]."""
    for name, rows in batch.items():
      if rows.ndim < 2 or rows.shape[0] != self._count:
        _checks.fail(
          "pmap step",
          f"batch[{name!r}]",
          f"[device={self._count}, rows, ...]",
          list(rows.shape),
        )
      if rows.shape[1] % self.step.accumulation:
        _checks.fail(
          "pmap step",
          f"batch[{name!r}]",
          f"of rows a device divisible by accumulation"
          f" {self.step.accumulation}",
          rows.shape[1],
        )
    return self.jitted(updates, state, dict(frozen), batch)

  def init(self, params: Mapping[str, Params], key: Array) -> State:
    """The first state, stacked; `params` are plain arrays, see `Step.init`."""
    return self.stack(self.step.init(params, key))

  def stack(self, tree: PyTree) -> PyTree:
    """Plain or replicated arrays -> a copy a device, [device, ...].

    Args:
      tree: frozen networks, for example.
    """
    whole = sharding.replicated(self.step.mesh)
    return jax.jit(self._label, out_shardings=self._stacked)(
      jax.device_put(tree, whole)
    )

  def unstack(self, tree: PyTree) -> PyTree:
    """The inverse of `stack`: the arrays of the first device.

    Args:
      tree: a state, metrics, ...
    """
    return jax.tree.map(lambda x: x[0], tree)

  def _map(self, fn, tree, before, after):
    return jax.shard_map(
      lambda tree: jax.tree.map(fn, tree),
      mesh=self.step.mesh,
      in_specs=before,
      out_specs=after,
      check_vma=False,
    )(tree)

  def _label(self, tree):
    """Replicated -> stacked."""
    return self._map(
      lambda x: x[None], tree, PartitionSpec(), PartitionSpec("data")
    )

  def _unlabel(self, tree):
    """Stacked -> replicated."""
    return self._map(
      lambda x: x[0], tree, PartitionSpec("data"), PartitionSpec()
    )

  def _run(self, updates, state, frozen, batch):
    rows = jax.tree.map(
      lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), batch
    )
    rows = jax.lax.with_sharding_constraint(
      rows, sharding.rows(self.step.mesh)
    )
    out = self.step.traced(
      updates, self._unlabel(state), self._unlabel(frozen), rows
    )
    return self._label(out)


def make_pmap_step(
  method: method_lib.Method,
  optimizers: Mapping[str, optax.GradientTransformation],
  devices: Sequence[Any] | None = None,
  **options: Any,
) -> PmapStep:
  """`make_step` for arrays as `jax.pmap` and `flax.jax_utils.replicate` make.

  The same program as `make_step` on as many devices, and the same numbers: row
  i of device d is row d * rows + i of the batch. Losses see global arrays, so
  there is no axis name. Networks are replicated; cut ones need `make_step`.

  Args:
    method: the method.
    optimizers: an optax transformation for every trained network by name.
    devices: devices in order; None is all of them.
    **options: keyword arguments of `make_step`, without `axes`.

  Returns:
    A `PmapStep`: callable `(updates, state, frozen, batch) -> (state, metrics)`
    on stacked arrays, with `init`, `stack` and `unstack`.

  Raises:
    ValueError: as `make_step`, or more than one process.
  """
  if jax.process_count() > 1:
    raise ValueError(
      "make_pmap_step: must run in one process, got"
      f" {jax.process_count()}; use make_step"
    )
  mesh = sharding.make_mesh(devices)
  return PmapStep(make_step(method, optimizers, mesh, "dp", **options))
