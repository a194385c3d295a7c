"""Meshes, and rules that say how networks are cut over them.

A mesh has the axes `data`, `fsdp`, `tensor` and `context`. Rows of a batch are
cut over `data` and `fsdp`, the tokens of a transformer's rows over `context`. A
rule maps names of parameter axes (`models.axes`) to mesh axes:

* "dp": nothing is cut;
* "fsdp": every matrix is cut over `fsdp`, once, along the first of its named
  axes that divides; the compiler gathers it where a layer uses it and
  scatters its gradient;
* "fsdp+tensor": first the inside of blocks (`mlp`, `heads`, `vocab`) over
  `tensor`, then the rest over `fsdp`;
* "fsdp+context": as "fsdp", over `fsdp` and `context` together.

A parameter that no table names is cut over `fsdp` along its longest axis that
divides. Vectors and arrays below `SMALL` numbers are never cut: gathering them
would cost more than it saves.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from distilljax import _checks
from distilljax.models import axes as axes_lib
from distilljax.typing import Params, PyTree

MESH_AXES = ("data", "fsdp", "tensor", "context")
_ALL = ("embed", "mlp", "heads", "vocab")
# rule -> (mesh axes, names of parameter axes they may cut, in order), in order.
RULES = {
  "dp": (),
  "fsdp": ((("fsdp",), _ALL),),
  "fsdp+tensor": ((("tensor",), _ALL[1:]), (("fsdp",), _ALL)),
  "fsdp+context": ((("fsdp", "context"), _ALL),),
}
SMALL = 1024

nearest_multiple = _checks.nearest_multiple


def make_mesh(
  devices: Sequence[Any] | None = None,
  *,
  data: int | None = None,
  fsdp: int | None = 1,
  tensor: int = 1,
  context: int = 1,
) -> jax.sharding.Mesh:
  """A mesh with the axes of `MESH_AXES` over all devices.

  Args:
    devices: devices in order; None is all of them.
    data: number of copies of what is cut; None is what the others leave.
    fsdp: number of parts of a network's state; None is what the others leave
      (then `data` is 1 where it is None too).
    tensor: number of parts of the inside of a block.
    context: number of parts of the tokens of a row.

  Returns:
    The mesh. With the default sizes it serves plain data parallelism.

  Raises:
    ValueError: the sizes do not make up the number of devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  count = len(devices)
  if fsdp is None and data is None:
    data = 1
  given = dict(zip(MESH_AXES, (data, fsdp, tensor, context), strict=True))
  known = {k: v for k, v in given.items() if v is not None}
  for name, size in known.items():
    if size < 1:
      _checks.fail("make_mesh", name, ">= 1", size)
  product = math.prod(known.values())
  text = " x ".join(f"{k}={v}" for k, v in known.items())
  if len(known) == len(given) and product != count:
    raise ValueError(
      f"make_mesh: {text} = {product} must be the number of devices, {count}"
    )
  if count % product:
    last, size = [(k, v) for k, v in known.items() if v > 1][-1]
    others = product // size
    fitting = [
      n for n in range(1, count + 1) if count % (n * others) == 0
    ]
    nearest = (
      f"; nearest: {last}={min(fitting, key=lambda n: abs(n - size))}"
      if fitting
      else ""
    )
    raise ValueError(
      f"make_mesh: {text} = {product} must divide the {count}"
      f" devices{nearest}"
    )
  sizes = [count // product if v is None else v for v in given.values()]
  return jax.make_mesh(
    sizes, MESH_AXES, (AxisType.Auto,) * len(sizes), devices=devices
  )


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def rows(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The leading axis is cut over the mesh's axes `data` and `fsdp`."""
  cut = tuple(a for a in ("data", "fsdp") if a in mesh.axis_names)
  return NamedSharding(mesh, PartitionSpec(cut if len(cut) > 1 else cut[0]))


def row_parts(mesh: jax.sharding.Mesh) -> int:
  """Number of parts that the rows of a batch are cut in.

  Args:
    mesh: the mesh.

  Returns:
    The product of its axes `data` and `fsdp`.
  """
  return math.prod(mesh.shape.get(a, 1) for a in ("data", "fsdp"))


@functools.cache
def row_shard(mesh: jax.sharding.Mesh) -> tuple[int, int]:
  """Which part of every batch this process has to bring.

  Processes that hold the same rows (their devices differ along `tensor` and
  `context` only) get the same answer.

  Args:
    mesh: the mesh.

  Returns:
    (index, count): this process brings part `index` of `count` equal parts of
    the rows, in order.

  Raises:
    ValueError: this process's rows are not one part of equal ones.
  """
  parts = row_parts(mesh)
  if jax.process_count() == 1:
    return 0, 1
  places = rows(mesh).addressable_devices_indices_map((parts,))
  mine = sorted({i[0].indices(parts)[0] for i in places.values()})
  first, size = mine[0], len(mine)
  if mine != list(range(first, first + size)) or parts % size or first % size:
    raise ValueError(
      f"mesh: a process must hold neighbouring parts of the rows, got {mine}"
      f" of {parts}; choose fsdp x tensor x context that divides, or is a"
      f" multiple of, the {jax.local_device_count()} devices of a process"
    )
  return first // size, parts // size


def rule_of(
  networks: Mapping[str, str | None],
  rules: str | Mapping[str, str],
  mesh: jax.sharding.Mesh,
) -> dict[str, str]:
  """The rule of every network.

  Args:
    networks: name -> the network that it follows (an EMA), or None.
    rules: one rule for all, or a rule by network. A network that is not named
      has the rule of the one it follows, else "dp".
    mesh: the mesh, which must have the axes that the rules name.

  Returns:
    Rule by network.

  Raises:
    ValueError: unknown rule or network, or a mesh without an axis of a rule.
  """
  if isinstance(rules, str):
    rules = dict.fromkeys(networks, rules)
  for network, rule in rules.items():
    _checks.one_of("rules", "network", network, networks)
    _checks.one_of("make_step", "rules", rule, RULES)
    for axis in itertools.chain.from_iterable(axes for axes, _ in RULES[rule]):
      if axis not in mesh.axis_names:
        raise ValueError(
          f"rules: {rule!r} needs the mesh axis {axis!r}, got a mesh of"
          f" {mesh.axis_names}; make it with train.make_mesh({axis}=...)"
        )
  if "data" not in mesh.axis_names:
    raise ValueError(
      f"rules: rows need the mesh axis 'data', got a mesh of {mesh.axis_names};"
      " make it with train.make_mesh()"
    )
  return {
    name: rules.get(name) or rules.get(source) or "dp"
    for name, source in networks.items()
  }


def _spec(rule, path, shape, mesh, table) -> PartitionSpec:
  """Where one parameter lies."""
  if len(shape) < 2 or math.prod(shape) < SMALL:
    return PartitionSpec()
  names = axes_lib.axis_names(path.partition("/")[2], len(shape), table)
  cut: list[Any] = [None] * len(shape)
  for mesh_axes, wanted in RULES[rule]:
    mesh_axes = tuple(a for a in mesh_axes if mesh.shape[a] > 1)
    parts = math.prod(mesh.shape[a] for a in mesh_axes)
    if parts == 1:
      continue
    if names is None:
      # Unknown: the inside of a block cannot be told from the rest.
      candidates = sorted(range(len(shape)), key=lambda i: -shape[i])
      candidates = [] if mesh_axes == ("tensor",) else candidates
    else:
      candidates = [
        i for w in wanted for i, n in enumerate(names) if n == w
      ]
    candidates = [i for i in candidates if cut[i] is None]
    fitting = [i for i in candidates if shape[i] % parts == 0]
    if candidates and not fitting:
      i = candidates[0]
      axis = f"axis {i}" if names is None else names[i]
      raise ValueError(
        f"rules: {path} {list(shape)} must have an axis divisible by the"
        f" {parts} devices of mesh axis {' x '.join(map(repr, mesh_axes))}, got"
        f" {axis}={shape[i]}; nearest: {nearest_multiple(shape[i], parts)}"
      )
    if fitting:
      cut[fitting[0]] = mesh_axes if len(mesh_axes) > 1 else mesh_axes[0]
  while cut and cut[-1] is None:
    cut.pop()
  return PartitionSpec(*cut)


def _path(keys: Any) -> str:
  return jax.tree_util.keystr(keys, simple=True, separator="/")


def shardings(
  network: str,
  params: Params,
  rule: str,
  mesh: jax.sharding.Mesh,
  table: axes_lib.AxisTable = (),
) -> PyTree:
  """Where the parameters of one network lie.

  Args:
    network: its name, for messages.
    params: arrays or `jax.ShapeDtypeStruct`s.
    rule: a name in `RULES`.
    mesh: the mesh.
    table: names of axes, looked at before `models.axes.AXES`.

  Returns:
    A tree like `params` of `NamedSharding`s.

  Raises:
    ValueError: a parameter with no axis that divides.
  """
  return jax.tree_util.tree_map_with_path(
    lambda keys, x: NamedSharding(
      mesh, _spec(rule, f"{network}/{_path(keys)}", x.shape, mesh, table)
    ),
    params,
  )


def like_params(tree: PyTree, params: Params, places: PyTree) -> PyTree:
  """Where an optimizer's state lies: a leaf that mirrors a parameter as it.

  A leaf mirrors the parameter whose path ends its own and whose shape it has;
  others (counts, factored moments) are replicated.

  Args:
    tree: the optimizer's state, arrays or shapes.
    params: the parameters, arrays or shapes.
    places: their shardings.

  Returns:
    A tree like `tree` of `NamedSharding`s.
  """
  leaves = jax.tree_util.tree_leaves_with_path(params)
  known = {
    _path(keys): (leaf.shape, place)
    for (keys, leaf), place in zip(leaves, jax.tree.leaves(places))
  }
  whole = replicated(jax.tree.leaves(places)[0].mesh)

  def place(keys, leaf):
    for i in range(len(keys)):
      shape, found = known.get(_path(keys[i:]), (None, None))
      if shape == leaf.shape:
        return found
    return whole

  return jax.tree_util.tree_map_with_path(place, tree)


def put_rows(batch: PyTree, mesh: jax.sharding.Mesh) -> PyTree:
  """Host rows of this process -> global arrays, cut over the data axis.

  Args:
    batch: pytree of NumPy arrays with a common leading axis: this process's
      rows, see `row_shard` (with one process: the whole batch).
    mesh: the mesh.

  Returns:
    The same pytree of global arrays.

  Raises:
    ValueError: the rows do not divide over the devices.
  """
  sharding = rows(mesh)
  _, count = row_shard(mesh)
  local = row_parts(mesh) // count
  for name, array in batch.items():
    if np.shape(array)[0] % local:
      raise ValueError(
        f"batch: {name} must have rows divisible by {local} devices, got"
        f" {np.shape(array)[0]}; nearest:"
        f" {nearest_multiple(np.shape(array)[0], local)}"
      )
  if jax.process_count() == 1:
    return jax.device_put(dict(batch), sharding)
  return {
    k: jax.make_array_from_process_local_data(sharding, np.asarray(v))
    for k, v in batch.items()
  }


def gather(tree: PyTree) -> PyTree:
  """Global arrays as NumPy arrays, whole on every process.

  Every process must call it; what is cut over processes is collected.

  Args:
    tree: pytree of arrays.

  Returns:
    The tree on the host.
  """

  def whole(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
      return x
    if not x.is_fully_replicated:
      x = jax.jit(lambda x: x, out_shardings=replicated(x.sharding.mesh))(x)
    return x.addressable_data(0)

  return jax.device_get(jax.tree.map(whole, tree))


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
