"""Adversarial losses on logits: generator, discriminator, R1 and its stand-in.

Logits may come from several heads (a list, tuple or dict of arrays `[b, ...]`):
each head is averaged over its own elements and the heads are summed, so adding
a head adds to the loss, as in the official code of GDD.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from distilljax import _checks
from distilljax.typing import Array, Float

Kind = Literal["softplus", "hinge"]
_KINDS = ("softplus", "hinge")
# One array [b, ...], or a list, tuple or dict of them: one per head.
Logits = Any


def _heads(fn: str, name: str, logits: Logits) -> list[jax.Array]:
  heads = jax.tree.leaves(logits)
  if not heads:
    _checks.fail(fn, name, "an array or a non-empty tree of them", "no array")
  for head in heads:
    _checks.min_rank(fn, name, head, 1, "[b, ...]")
    _checks.nonempty(fn, **{name: head})
    _checks.floating(fn, **{name: head})
    _checks.finite(fn, **{name: head})
    if jnp.shape(head)[0] != jnp.shape(heads[0])[0]:
      _checks.fail(
          fn,
          name,
          f"[b={jnp.shape(heads[0])[0]}, ...] like the first head",
          list(jnp.shape(head)),
      )
  return [_checks.at_least_float32(head) for head in heads]


def _row_mean(values: jax.Array) -> jax.Array:
  return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def _same_heads(
    fn: str,
    first: str,
    heads: list[jax.Array],
    second: str,
    others: list[jax.Array],
) -> None:
  """As many heads on both sides, and the same number of rows."""
  if len(heads) != len(others):
    _checks.fail(fn, second, f"{len(heads)} heads like {first}", len(others))
  if heads[0].shape[0] != others[0].shape[0]:
    _checks.fail(
        fn,
        second,
        f"[b={heads[0].shape[0]}, ...] like {first}",
        list(others[0].shape),
    )


def gan_generator_loss(
    fake_logits: Logits, *, kind: Kind = "softplus"
) -> Float[Array, "b"]:
  """What the generator pays for samples that the discriminator sees through.

  softplus (non-saturating): sum over heads of mean softplus(-fake).
  hinge: sum over heads of mean(-fake).
  Logits are high for "real". The gradient flows through the logits: take it
  with respect to the generator's parameters only.

  Args:
    fake_logits: logits of generated samples. Shape [b, ...], or a list, tuple
      or dict of such arrays, one per head.
    kind: "softplus" or "hinge".

  Returns:
    The loss, shape [b], at least float32: mean over the elements of a head, sum
    over heads. softplus: above 0; hinge: unbounded below.

  Raises:
    ValueError: unknown `kind`, no head, an empty head, heads that differ in b.
    TypeError: logits that are not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> gan_generator_loss(jnp.array([[1.0], [2.0]]), kind="hinge").tolist()
    [-1.0, -2.0]

  References:
    Yin et al., Improved Distribution Matching Distillation, 2024,
    arXiv:2405.14867, sec. 4.3; Zheng et al., Diffusion Models Are Innate
    One-Step Generators, 2024, arXiv:2405.20750; departures from the official
    code: none.
  """
  fn = "gan_generator_loss"
  _checks.one_of(fn, "kind", kind, _KINDS)
  penalty = jax.nn.softplus if kind == "softplus" else (lambda x: x)
  heads = _heads(fn, "fake_logits", fake_logits)
  return sum(_row_mean(penalty(-head)) for head in heads)


def gan_discriminator_loss(
    real_logits: Logits, fake_logits: Logits, *, kind: Kind = "softplus"
) -> Float[Array, "b"]:
  """What the discriminator pays for calling real fake and fake real.

  softplus: sum over heads of mean softplus(fake) + mean softplus(-real).
  hinge: sum over heads of mean relu(1 + fake) + mean relu(1 - real).
  Logits are high for "real". The gradient flows through the logits into head
  and features; the samples themselves are the caller's to detach, which costs
  nothing when the gradient is taken in the discriminator's parameters only.

  Args:
    real_logits: logits of data. Shape [b, ...], or a list, tuple or dict of
      such arrays, one per head.
    fake_logits: logits of generated samples, same heads and b.
    kind: "softplus" or "hinge".

  Returns:
    The loss, shape [b] (row i: real row i and fake row i), at least float32:
    mean over the elements of a head, sum over heads. At least 0.

  Raises:
    ValueError: unknown `kind`, no head, an empty head, other heads or another
      b in `fake_logits`.
    TypeError: logits that are not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> real, fake = jnp.array([3.0]), jnp.array([0.5])
    >>> gan_discriminator_loss(real, fake, kind="hinge").tolist()
    [1.5]

  References:
    Yin et al., Improved Distribution Matching Distillation, 2024,
    arXiv:2405.14867, sec. 4.3; Zheng et al., Diffusion Models Are Innate
    One-Step Generators, 2024, arXiv:2405.20750; departures from the official
    code: none.
  """
  fn = "gan_discriminator_loss"
  _checks.one_of(fn, "kind", kind, _KINDS)
  reals = _heads(fn, "real_logits", real_logits)
  fakes = _heads(fn, "fake_logits", fake_logits)
  _same_heads(fn, "real_logits", reals, "fake_logits", fakes)
  if kind == "softplus":
    penalty = jax.nn.softplus
  else:
    penalty = lambda x: jax.nn.relu(1 + x)
  return sum(
      _row_mean(penalty(-real)) + _row_mean(penalty(fake))
      for real, fake in zip(reals, fakes)
  )


def r1_penalty(
    logit_fn: Callable[[jax.Array], Logits],
    real: Float[Array, "b *s"],
    *,
    gamma: float = 1e-4,
    elements: Literal["sum", "mean"] = "sum",
) -> Float[Array, "b"]:
  """R1: the discriminator's squared slope at the data.

  gamma / 2 * sum over a sample's elements of (d sum(logits) / d x)^2, where all
  logits of all heads are summed before the derivative. The parameters inside
  `logit_fn` get their gradient through that derivative (second order); `real`
  is stop-gradient. A lazy penalty (every n-th step) is multiplied by n.

  Args:
    logit_fn: x -> logits of the discriminator: an array [b, ...] or a list,
      tuple or dict of them. Row i of the logits depends on row i of x only.
    real: data, as the discriminator sees it (augmented and noised or not is the
      caller's choice; GDD: neither). Shape [b, *s].
    gamma: strength; at least 0.
    elements: "sum" over a sample's elements as in the papers, so gamma belongs
      to a resolution; "mean" is invariant to it.

  Returns:
    The penalty, shape [b], at least float32; 0 where the logits are flat.

  Raises:
    ValueError: negative `gamma`, unknown `elements`, empty `real`, no head.
    TypeError: `real` is not floating.

  References:
    Mescheder et al., Which Training Methods for GANs do actually Converge?,
    2018, arXiv:1801.04406, eq. 9; constants from Zheng et al., Diffusion Models
    Are Innate One-Step Generators, 2024, arXiv:2405.20750.
  """
  fn = "r1_penalty"
  _checks.in_range(fn, "gamma", gamma, 0.0)
  _checks.one_of(fn, "elements", elements, ("sum", "mean"))
  _checks.min_rank(fn, "real", real, 1, "[b, ...]")
  _checks.nonempty(fn, real=real)
  _checks.floating(fn, real=real)
  _checks.finite(fn, real=real)

  def total(x):
    heads = _heads(fn, "logit_fn(real)", logit_fn(x))
    return sum(jnp.sum(head) for head in heads)

  slope = jax.grad(total)(jax.lax.stop_gradient(jnp.asarray(real)))
  squares = jnp.square(_checks.at_least_float32(slope))
  axes = tuple(range(1, squares.ndim))
  reduce = jnp.sum if elements == "sum" else jnp.mean
  return (0.5 * gamma) * reduce(squares, axis=axes)


def approximate_r1(
    real_logits: Logits, perturbed_logits: Logits
) -> Float[Array, "b"]:
  """R1 without a second derivative: how far the logits move when data does.

  sum over heads of mean (real - perturbed)^2, where `perturbed_logits` are
  those of x + std * noise: to first order std^2 times the mean over heads of
  |d logit / d x|^2. The gradient flows through both. Multiply by the weight
  (200 with std 0.1 in the peer's recipe).

  Args:
    real_logits: logits of the data at a noise level t. Shape [b, ...], or a
      list, tuple or dict of such arrays, one per head.
    perturbed_logits: logits of the perturbed data, noised again to the SAME
      level with the same noise (by the caller): the two then differ by the
      perturbation alone. Same shapes.

  Returns:
    The penalty, shape [b], at least float32; 0 where the logits agree.

  Raises:
    ValueError: other heads or shapes in `perturbed_logits`, an empty head.
    TypeError: logits that are not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> a, b = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 4.0]])
    >>> approximate_r1(a, b).tolist()
    [2.0]

  References:
    Lin et al., Diffusion Adversarial Post-Training for One-Step Video
    Generation, 2025, arXiv:2501.08316, sec. 3.3. Departure from the peer's
    code, which feeds perturbed clean data beside noised real data: we re-noise
    (its numbers come out when its logits are given).
  """
  fn = "approximate_r1"
  reals = _heads(fn, "real_logits", real_logits)
  others = _heads(fn, "perturbed_logits", perturbed_logits)
  _same_heads(fn, "real_logits", reals, "perturbed_logits", others)
  for real, other in zip(reals, others):
    _checks.same_shape(fn, real_logits=real, perturbed_logits=other)
  return sum(
      _row_mean(jnp.square(real - other)) for real, other in zip(reals, others)
  )
