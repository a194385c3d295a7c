"""What a distillation method is: named networks, losses, a schedule.

A file in `distilljax/methods` builds one `Method`; everything else in this
package serves any of them and knows nothing about any paper.
"""

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from distilljax.train.metrics import Mean
from distilljax.typing import Array, Params, PyTree


@dataclasses.dataclass(frozen=True)
class Trained:
  """A network with an optimizer and a loss of its own."""


@dataclasses.dataclass(frozen=True)
class Frozen:
  """A network that is read, never updated, and not saved in checkpoints."""


@dataclasses.dataclass(frozen=True)
class Ema:
  """A network that follows a trained one: decay * ema + (1 - decay) * source.

  It moves only at steps where its source was updated, and starts as its copy.

  Attributes:
    of: name of the trained network.
    decay: a number in [0, 1], or a function from the step to one; 0 is a copy.
  """

  of: str
  decay: float | Callable[[Array], Array] = 0.999


Role: TypeAlias = Trained | Frozen | Ema


class Context(NamedTuple):
  """What a method's functions may know besides parameters and rows.

  Attributes:
    step: number of steps done in this stage. Scalar int.
    key: the step's key: the same on every device, process and micro-batch.
    updates: names of the networks updated at this step (static).
    carry: the method's small extra state.
  """

  step: Array
  key: Array
  updates: tuple[str, ...]
  carry: Any = None


class Schedule(NamedTuple):
  """Who is updated when: `first` is played once, then `cycle` for ever.

  Attributes:
    cycle: one tuple of network names a step, repeated.
    first: entries (names, number of steps) played before the cycle.
  """

  cycle: tuple[tuple[str, ...], ...]
  first: tuple[tuple[tuple[str, ...], int], ...] = ()

  def updates(self, step: int) -> tuple[str, ...]:
    """Names of the networks updated at `step` (counted from 0)."""
    for names, steps in self.first:
      if step < steps:
        return names
      step -= steps
    return self.cycle[step % len(self.cycle)]

  def entries(self) -> list[tuple[str, ...]]:
    """The distinct entries: one compiled program each."""
    return list(
      dict.fromkeys((*[names for names, _ in self.first], *self.cycle))
    )


Batch: TypeAlias = Mapping[str, Array]
ParamsByName: TypeAlias = Mapping[str, Params]
# (params, batch, context) -> (terms, metrics)
LossFn: TypeAlias = Callable[
  [ParamsByName, Batch, Context], tuple[dict[str, Mean], dict[str, Mean]]
]


class Method(NamedTuple):
  """One paper, as data.

  Attributes:
    name: slug = file = config prefix = doc page = test name.
    paper: "arXiv:<id>".
    networks: role of every network by name.
    losses: one per trained network: (params, batch, context) ->
      (terms, metrics), dicts of `Mean`. The objective is the sum over the terms
      of sum / (global count); weights are inside the sums.
    schedule: who is updated at which step.
    sample: (params, inputs, key, *, steps) -> outputs: how the student is used.
    collect: host, before the step: (params, batch, context) -> batch.
    prepare: traced, first thing in the step, on the whole batch: (params,
      batch, context) -> (batch, carry). Its batch holds rows only.
    carry: () -> first value of the carry.
    gradients: (loss, params, batch, context, accumulate) -> (grads, metrics);
      None is the gradient of the global mean.
    couples_rows: the loss is not a sum over rows: accumulation is refused.
  """

  name: str
  paper: str
  networks: Mapping[str, Role]
  losses: Mapping[str, LossFn]
  schedule: Schedule
  sample: Callable[..., PyTree]
  collect: Callable[..., Batch] | None = None
  prepare: Callable[..., tuple[Batch, Any]] | None = None
  carry: Callable[[], Any] | None = None
  gradients: Callable[..., Any] | None = None
  couples_rows: bool = False

  def named(self, role: type[Role]) -> list[str]:
    """Names of the networks with that role, sorted."""
    return sorted(n for n, r in self.networks.items() if isinstance(r, role))


def check_method(method: Method) -> None:
  """Raises a one-line `ValueError` for a method that contradicts itself."""
  trained = set(method.named(Trained))
  if set(method.losses) != trained:
    raise ValueError(
      f"{method.name}: losses must be given for the trained networks"
      f" {sorted(trained)}, got {sorted(method.losses)}"
    )
  for entry in method.schedule.entries():
    if not entry or not set(entry) <= trained:
      raise ValueError(
        f"{method.name}: schedule must name trained networks"
        f" {sorted(trained)}, got {entry}"
      )
  for name in method.named(Ema):
    if method.networks[name].of not in trained:
      raise ValueError(
        f"{method.name}: network {name!r} must follow one of"
        f" {sorted(trained)}, got {method.networks[name].of!r}"
      )


def named_key(key: Array, name: str) -> Array:
  """The key of one named draw: `key` (one, or one a row) folded with a name.

  Losses that draw under the same name draw the same numbers; different names
  are independent. Never `split` a key that is also folded: `split(k, n)[i]` is
  `fold_in(k, i)`.

  Args:
    key: typed key or keys, shape [] or [b].
    name: any text, such as "critic/noise".

  Returns:
    Keys of the same shape.
  """
  word = zlib.crc32(name.encode())
  if key.ndim == 0:
    return jax.random.fold_in(key, word)
  return jax.vmap(lambda k: jax.random.fold_in(k, word))(key)


def row_keys(key: Array, rows: int) -> Array:
  """One key a row of the global batch. Shape [rows].

  Args:
    key: the step's key.
    rows: rows of the global batch.

  Returns:
    Typed keys. Shape [rows].
  """
  base = named_key(key, "rows")
  return jax.vmap(lambda i: jax.random.fold_in(base, i))(jnp.arange(rows))


def draw(
  sampler: Callable[..., PyTree],
  keys: Array,
  name: str,
  shape: tuple[int, ...] = (),
) -> PyTree:
  """One draw a row: `sampler(key, shape)` under each row's key and `name`.

  Args:
    sampler: such as `jax.random.normal` or a time sampler of `processes`.
    keys: the batch's row keys, shape [b].
    name: name of the draw.
    shape: shape of one row's draw.

  Returns:
    Array [b, *shape], or a tuple of them where the sampler gives a tuple.
  """
  return jax.vmap(lambda k: sampler(k, shape))(named_key(keys, name))
