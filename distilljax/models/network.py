"""Networks as pairs (apply_fn, params), and the adapters that make them.

This file and the zoo beside it are the only places of the library that know
Flax: everything else sees a function and a plain nested dict of arrays.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from distilljax import _checks
from distilljax.typing import Params


class Network(NamedTuple):
  """A network: `apply_fn(params, *inputs, **conditioning)` and its parameters.

  Attributes:
    apply_fn: pure function; the first argument is a tree like `params`.
    params: plain nested dict of arrays.
  """

  apply_fn: Callable[..., Any]
  params: Params


def from_callable(fn: Callable[..., Any], params: Params) -> Network:
  """A network from a pure function `fn(params, *inputs, **conditioning)`.

  Args:
    fn: the function; it may be of any library that can be called this way.
    params: nested dict of arrays (an empty dict for a closed form).

  Returns:
    The pair, unchanged.

  Raises:
    TypeError: `fn` cannot be called, or `params` is not a dict.
  """
  if not callable(fn):
    raise TypeError(
        f"from_callable: fn must be a function, got {type(fn).__name__}"
    )
  if not isinstance(params, dict):
    raise TypeError(
        "from_callable: params must be a nested dict of arrays, got"
        f" {type(params).__name__}"
    )
  return Network(fn, params)


def _names(tree: Any) -> Any:
  """The dict with every key a string: checkpoints and rules go by name."""
  if not isinstance(tree, dict):
    return tree
  return {str(k): _names(v) for k, v in tree.items()}


def _keys(tree: Any) -> Any:
  """The original keys of a dict, level by level: name -> (key, subtree)."""
  if not isinstance(tree, dict):
    return None
  return {str(k): (k, _keys(v)) for k, v in tree.items()}


def _restore(params: Any, keys: Any) -> Any:
  if keys is None:
    return params
  return {k: _restore(params[name], sub) for name, (k, sub) in keys.items()}


def from_nnx(module: Any) -> Network:
  """A network from an `flax.nnx.Module`.

  `nnx.Param`s become the nested dict, every key a string (the entries of an
  `nnx.List` are "0", "1", ...). Other variables, such as batch statistics, are
  constants of `apply_fn`: what a call writes to them is lost, so the module
  must be in evaluation mode.

  Args:
    module: the module; its `__call__` becomes `apply_fn`.

  Returns:
    `Network(apply_fn, params)`; `apply_fn` works under jit, grad, jvp and vmap.
    If the module has a `linear_head` (parameters -> `kernels.Head`), so has
    `apply_fn`: language methods then compare hidden states, not logits.

  Raises:
    TypeError: `module` is not an NNX module.
    ValueError: a dropout or batch norm inside is in training mode.
  """
  if not isinstance(module, nnx.Module):
    raise TypeError(
        f"from_nnx: module must be a flax.nnx.Module, got"
        f" {type(module).__name__}"
    )
  for path, inner in nnx.iter_modules(module):
    training = (
        isinstance(inner, nnx.Dropout) and not inner.deterministic
    ) or getattr(inner, "use_running_average", None) is False
    if training:
      _checks.fail(
          "from_nnx",
          "module",
          "in evaluation mode (call module.eval() first)",
          f"{type(inner).__name__} at {'/'.join(map(str, path)) or 'the top'}"
          " in training mode",
      )
  graphdef, params, constants = nnx.split(module, nnx.Param, ...)
  params = nnx.to_pure_dict(params)
  constants = nnx.to_pure_dict(constants)
  keys = _keys(params)

  def apply_fn(params, *inputs, **conditioning):
    merged = nnx.merge(graphdef, _restore(params, keys), constants)
    return merged(*inputs, **conditioning)

  if hasattr(module, "linear_head"):
    apply_fn.linear_head = module.linear_head
  return Network(apply_fn, _names(params))


def from_linen(module: Any, variables: Mapping[str, Any]) -> Network:
  """A network from a `flax.linen.Module` and the variables of its `init`.

  Args:
    module: the module; `module.apply` becomes `apply_fn`, with no mutable
      collection and no rngs of its own.
    variables: what `module.init` returned. Collections other than "params" are
      constants of `apply_fn`.

  Returns:
    `Network(apply_fn, params)`, params a plain nested dict.

  Raises:
    TypeError: `module` has no `apply`.
    ValueError: `variables` has no collection "params".
  """
  if not callable(getattr(module, "apply", None)):
    raise TypeError(
        "from_linen: module must be a flax.linen.Module, got"
        f" {type(module).__name__}"
    )
  if "params" not in variables:
    _checks.fail(
        "from_linen",
        "variables",
        "the result of module.init, with a collection 'params'",
        sorted(variables),
    )
  variables = _plain(variables)
  params = variables.pop("params")

  def apply_fn(params, *inputs, **conditioning):
    return module.apply(
        {"params": params, **variables}, *inputs, **conditioning
    )

  return Network(apply_fn, params)


def _plain(tree: Any) -> Any:
  """Mappings (FrozenDict too) as dicts; boxed (partitioned) leaves unboxed."""
  if hasattr(tree, "items"):
    return {k: _plain(v) for k, v in tree.items()}
  return tree.unbox() if hasattr(tree, "unbox") else tree


def count_params(params: Params) -> int:
  """Number of scalars in a tree of arrays (or of `jax.ShapeDtypeStruct`s).

  Args:
    params: nested dict of arrays or shapes.

  Returns:
    The number of scalars, an int.
  """
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def _flat(tree: Params) -> dict[str, Any]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
      jax.tree_util.keystr(path, simple=True, separator="/"): leaf
      for path, leaf in leaves
  }


def transfer(source_params: Params, target_params: Params) -> Params:
  """The target's tree with every leaf of the source copied into it.

  What the source lacks (a second time input, a discriminator head) keeps the
  target's own initial value. The zoo initialises those additions such that they
  change nothing, so the result gives exactly the source's output before
  training. If the target was made by `with_head` and the source was not, the
  source goes into the backbone.

  Args:
    source_params: the teacher's parameters, nested dict.
    target_params: the student's or critic's initial parameters, nested dict.

  Returns:
    A tree like `target_params`; every leaf is a copy, nothing is shared.

  Raises:
    ValueError: a leaf of the source is missing in the target, or has another
      shape or dtype there.
  """
  name = "transfer"
  if _is_headed(target_params) and not _is_headed(source_params):
    return {
        "backbone": transfer(source_params, target_params["backbone"]),
        "head": jax.tree.map(lambda a: jnp.array(a), target_params["head"]),
    }
  source, target = _flat(source_params), _flat(target_params)
  for path, leaf in source.items():
    if path not in target:
      _checks.fail(
          name,
          "target_params",
          f"a tree with the source's leaf {path!r}",
          f"none{_checks.nearest(path, target)}",
      )
    if tuple(leaf.shape) != tuple(target[path].shape):
      _checks.fail(
          name,
          f"target_params[{path!r}]",
          f"{list(leaf.shape)} like the source",
          list(target[path].shape),
      )
    if leaf.dtype != target[path].dtype:
      _checks.fail(
          name,
          f"target_params[{path!r}]",
          f"{leaf.dtype} like the source (cast one of them first)",
          target[path].dtype,
      )
  _, structure = jax.tree.flatten(target_params)
  return jax.tree.unflatten(
      structure,
      [jnp.array(source.get(path, leaf)) for path, leaf in target.items()],
  )


def _is_headed(params: Params) -> bool:
  return isinstance(params, dict) and set(params) == {"backbone", "head"}


def with_head(backbone: Network, head: Network) -> Network:
  """A network whose features also feed a head, in one tree.

  Args:
    backbone: a network that takes `features=True` (all of the zoo do).
    head: `head.apply_fn(head_params, features) -> logits`.

  Returns:
    Network with params {"backbone": ..., "head": ...}. A plain call is the
    backbone's; `logits=True` returns (prediction, logits) from one forward,
    `features=True` (prediction, features).

  Raises:
    ValueError: at a call, both `logits` and `features` are asked for.
  """

  def apply_fn(params, *inputs, logits=False, features=False, **conditioning):
    if logits and features:
      _checks.fail(
          "with_head", "logits and features", "asked for one at a time", "both"
      )
    out = backbone.apply_fn(
        params["backbone"],
        *inputs,
        **conditioning,
        **({"features": True} if logits or features else {}),
    )
    if not logits:
      return out
    prediction, hidden = out
    return prediction, head.apply_fn(params["head"], hidden)

  return Network(
      apply_fn, {"backbone": backbone.params, "head": head.params}
  )


def feature_dim(network: Network, sample_shape: tuple[int, ...]) -> int:
  """Width (last axis) of the features a zoo network gives for such samples.

  Args:
    network: a network of the zoo, or one with the same call form.
    sample_shape: shape of one sample without the batch axis, e.g. (14, 14, 1).

  Returns:
    The `features` that a head for this network must be made with.
  """
  x = jax.ShapeDtypeStruct((1, *sample_shape), jnp.float32)
  t = jax.ShapeDtypeStruct((1,), jnp.float32)
  _, features = jax.eval_shape(
      lambda params, x, t: network.apply_fn(params, x, t, features=True),
      network.params,
      x,
      t,
  )
  return features.shape[-1]

