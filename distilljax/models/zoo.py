"""Networks by name, from plain values as they stand in a config."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp

from distilljax import _checks
from distilljax.models import (
    dit,
    head,
    layers,
    mlp,
    network,
    transformer,
    unet,
)

_MODULES = {
    "dit": dit.DiT,
    "head": head.Head,
    "mlp": mlp.MLP,
    "transformer": transformer.Transformer,
    "unet": unet.UNet,
}


def make(kind: str, key: jax.Array, **hyper: Any) -> network.Network:
  """A network of the zoo with fresh parameters.

  "mlp", "unet" and "dit" share one call form: `apply_fn(params, x, t, *,
  label=None, r=None, features=False)`. All compute in the dtype of their
  parameters
  (float32 as made here) and return at least float32.

  Args:
    kind: "mlp", "unet", "dit", "transformer" (tokens [b, l] -> logits [b, l,
      v]) or "head" (features -> logits [b]).
    key: random key of the initial values.
    **hyper: hyper-parameters of that module, plain values; see the classes
      `MLP`, `UNet`, `DiT`, `Transformer`, `Head`. A list stands for a tuple.

  Returns:
    `Network(apply_fn, params)`. The call may be traced: `jax.jit(lambda key:
    make(kind, key).params)` initialises straight into a sharding.

  Raises:
    ValueError: unknown kind, or unknown or missing hyper-parameter (with the
      nearest valid name).

  Example:
    >>> import jax
    >>> net = make("mlp", jax.random.key(0), dim=2, width=8, depth=1)
    >>> x = jax.numpy.zeros((4, 2))
    >>> net.apply_fn(net.params, x, jax.numpy.ones(4)).shape
    (4, 2)
  """
  _checks.one_of("make", "kind", kind, _MODULES)
  signature = inspect.signature(_MODULES[kind].__init__).parameters
  known = [k for k in signature if k not in ("self", "rngs")]
  for name in hyper:
    _checks.one_of(f"make({kind!r})", "hyper-parameter", name, known)
  for name in known:
    if signature[name].default is inspect.Parameter.empty and name not in hyper:
      _checks.fail(f"make({kind!r})", name, "given", "nothing")
  hyper = {k: tuple(v) if isinstance(v, list) else v for k, v in hyper.items()}
  apply_fns = []

  def build(draws):
    made = network.from_nnx(_MODULES[kind](rngs=draws, **hyper))
    apply_fns.append(made.apply_fn)
    return made.params

  count = layers.Draws()
  jax.eval_shape(lambda: build(count))

  @jax.jit
  def init(key):
    values = jax.random.normal(key, (count.used,), jnp.float32)
    return build(layers.Draws(values))

  return network.Network(apply_fns[0], init(key))
