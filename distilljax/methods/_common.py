"""What method files need beside losses, processes and train features."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distilljax import _checks, processes
from distilljax.typing import Array, Params


def hyper_parameters(
  slug: str, defaults: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
  """DEFAULTS with the given values; one line for a name it does not have."""
  for name in given:
    if name not in defaults:
      raise ValueError(
        f"{slug}: unknown hyper-parameter {name!r}"
        f"{_checks.nearest(name, defaults)}"
      )
  return {**defaults, **given}


def networks_for(
  slug: str, apply_fns: Mapping[str, Callable[..., Any]], needed: list[str]
) -> list[Callable[..., Any]]:
  """The apply functions of the needed networks, in order."""
  if missing := [n for n in needed if n not in apply_fns]:
    raise ValueError(
      f"{slug}: apply_fns must have {needed}, got none for {missing}"
    )
  return [apply_fns[n] for n in needed]


def conditioning(batch: Mapping[str, Array]) -> dict[str, Array]:
  """The keyword arguments a network gets from a batch: its label, if any."""
  return {"label": batch["label"]} if "label" in batch else {}


def guided(
  apply_fn: Callable[..., Array],
  params: Params,
  weight: float,
  null_label: int | None,
) -> Callable[..., Array]:
  """`fn(x, t, **conditioning)` with classifier-free guidance of `weight`.

  uncond + weight (cond - uncond); weight 1 is one plain conditional call.
  """

  def fn(x, t, **cond):
    if weight == 1.0 or "label" not in cond:
      return apply_fn(params, x, t, **cond)
    null = jnp.full_like(cond["label"], null_label)
    with_label = apply_fn(params, x, t, **cond)
    without = apply_fn(params, x, t, **{**cond, "label": null})
    return processes.guide(without, with_label, weight)

  return fn


def check_guidance(slug: str, weight: float, null_label: int | None) -> None:
  """Guidance other than 1 needs the null label."""
  _checks.in_range(slug, "guidance", weight, 0)
  if weight != 1.0 and null_label is None:
    _checks.fail(slug, "null_label", "given where guidance is not 1", None)


def start_noise(noise: Array, path: processes.NoisePath) -> Array:
  """The state at t = 1 from unit noise."""
  return noise * path.sigma(jnp.float32(1.0))


def jitted(fn: Callable[..., Any]) -> Callable[..., Any]:
  """One program for every call of a sampler's network."""
  return jax.jit(fn)
