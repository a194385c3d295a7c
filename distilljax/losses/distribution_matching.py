"""Distribution matching: directions, the loss that carries them, the critic.

A `*_direction` is the gradient to DESCEND on a sample, stop-gradient as a
whole; `surrogate_loss(x, direction)` turns it into values whose gradient it is.
`denoising_loss` trains the fake score that the directions read.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from distilljax import _checks
from distilljax.typing import Array, Bool, Float

Elements = Literal["mean", "sum", "none"]
_ELEMENTS = ("mean", "sum", "none")
Form = Literal["square", "linear"]
_FORMS = ("square", "linear")
PredictionKind = Literal["x0", "epsilon", "score", "velocity", "v"]
_PREDICTION_KINDS = ("x0", "epsilon", "score", "velocity", "v")
# A number per row [b], or one number for all rows.
PerRow = Any


def _arrays(fn: str, **arrays: Any) -> list[jax.Array]:
  """Checks samples [b, *s] of one shape; gives them in one dtype >= float32."""
  for name, array in arrays.items():
    _checks.min_rank(fn, name, array, 1, "[b, ...]")
  _checks.same_shape(fn, **arrays)
  _checks.nonempty(fn, **arrays)
  _checks.floating(fn, **arrays)
  _checks.finite(fn, **arrays)
  wide = [_checks.at_least_float32(array) for array in arrays.values()]
  dtype = max((array.dtype for array in wide), key=lambda d: d.itemsize)
  return [array.astype(dtype) for array in wide]


def _rows(fn: str, name: str, value: PerRow, x: jax.Array) -> jax.Array:
  """A number or [b] as a constant that broadcasts over `x` [b, *s]."""
  if jnp.ndim(value) > 0:
    _checks.per_row(fn, "x", x, **{name: value})
  _checks.finite(fn, **{name: value})
  value = jax.lax.stop_gradient(jnp.asarray(value).astype(x.dtype))
  return _checks.expand_like(value, x)


def _row_mean(values: jax.Array) -> jax.Array:
  """Mean over the non-batch axes, which stay as axes of length 1."""
  axes = tuple(range(1, values.ndim))
  return jnp.mean(values, axis=axes, keepdims=True)


def _reduce(values: jax.Array, elements: Elements) -> jax.Array:
  """Over the elements of a row: mean, sum, or nothing."""
  if elements == "none":
    return values
  axes = tuple(range(1, values.ndim))
  if elements == "mean":
    return jnp.mean(values, axis=axes)
  return jnp.sum(values, axis=axes)


def surrogate_loss(
    x: Float[Array, "b *s"],
    direction: Float[Array, "b *s"],
    *,
    elements: Elements = "mean",
    form: Form = "square",
    where: Bool[Array, "b *s"] | None = None,
) -> Float[Array, "b ..."]:
  """Values whose gradient with respect to `x` is a given direction.

  square: 0.5 (x - sg(x - direction))^2, of value 0.5 direction^2.
  linear: sg(direction) * x, the form in which SiD, Diff-Instruct and
  Distillation-DPO print their losses.
  Both have the gradient sg(direction) at every element; descending moves `x`
  along -direction. The square is written so that its gradient is the direction
  exactly, where the difference x - (x - direction) would lose the digits by
  which x exceeds the direction.

  Args:
    x: samples that carry the gradient. Shape [b, *s].
    direction: gradient to descend; stop-gradient. Shape [b, *s].
    elements: over the elements of a row, "mean" (DMD: the gradient is
      direction / elements), "sum" (VSD, SDS: the gradient is the direction), or
      "none" (no reduction: for `masked_mean` over a mask of the whole batch).
    form: "square" or "linear".
    where: elements that count; None counts all. What is not selected gives 0,
      with zero gradient even where it is NaN, and "mean" divides by the row's
      selected elements (a row without any gives 0). Shape [b, *s], bool.

  Returns:
    The loss, shape [b] ([b, *s] with elements="none"), at least float32.
    square: at least 0, reached where the direction is 0.

  Raises:
    ValueError: shapes that differ, an empty batch, unknown `elements`, `form`.
    TypeError: arrays that are not floating, a mask that is not bool.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> x, d = jnp.array([[1.0, 2.0]]), jnp.array([[4.0, -2.0]])
    >>> jax.grad(lambda x: surrogate_loss(x, d)[0])(x).tolist()
    [[2.0, -1.0]]

  References:
    Yin et al., One-step Diffusion with Distribution Matching Distillation,
    2023, arXiv:2311.18828, eq. 7; Wang et al., ProlificDreamer, 2023,
    arXiv:2305.16213, eq. 9. Departure: the mask divides by the row's own count
    (Self-Forcing: by the batch's; that is elements="none" and `masked_mean`).
  """
  fn = "surrogate_loss"
  _checks.one_of(fn, "elements", elements, _ELEMENTS)
  _checks.one_of(fn, "form", form, _FORMS)
  if where is None:
    x, direction = _arrays(fn, x=x, direction=direction)
  else:
    _checks.same_shape(fn, x=x, where=where)
    _checks.boolean(fn, where=where)
    # Before the checks: an element that does not count may be NaN.
    x = jnp.where(where, x, jnp.zeros_like(x))
    direction = jnp.where(where, direction, jnp.zeros_like(direction))
    x, direction = _arrays(fn, x=x, direction=direction)
  direction = jax.lax.stop_gradient(direction)
  if form == "square":
    values = 0.5 * jnp.square((x - jax.lax.stop_gradient(x)) + direction)
  else:
    values = direction * x
  if where is None or elements != "mean":
    return _reduce(values, elements)
  count = _reduce(where.astype(values.dtype), "sum")
  return _reduce(values, "sum") / jnp.maximum(count, 1)


def dmd_direction(
    x: Float[Array, "b *s"],
    real_x0: Float[Array, "b *s"],
    fake_x0: Float[Array, "b *s"],
    *,
    eps: float = 1e-6,
    floor: float = 0.0,
    weight: PerRow = None,
) -> Float[Array, "b *s"]:
  """Distribution matching: from the fake score's denoising to the teacher's.

  weight * (fake_x0 - real_x0) / (max(mean |x - real_x0|, floor) + eps), the
  mean over a row's elements. To DESCEND: it moves x towards real_x0 and away
  from fake_x0, and is the gradient of KL(student || teacher) at the noise level
  of the two denoisings, up to a positive factor. All of it is stop-gradient.

  Args:
    x: clean samples of the student. Shape [b, *s].
    real_x0: the teacher's x0 estimate (guided, if the teacher is) at x noised
      to some level. Shape [b, *s].
    fake_x0: the fake score's x0 estimate at the same noised x. Shape [b, *s].
    eps: added to the normaliser; 0 is DMD2's own code. At least 0.
    floor: least value of the mean; 1e-4 in Phased DMD's trainer, 1e-5 in rCM.
      At least 0.
    weight: one factor per row, as f-distill's `f_divergence_weight`; None is 1.
      Shape [b] or [].

  Returns:
    The direction, shape [b, *s], at least float32; 0 where the two agree.

  Raises:
    ValueError: shapes that differ, an empty batch, negative `eps` or `floor`.
    TypeError: arrays that are not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> x, real, fake = jnp.full((3, 1, 2), 1.0) * jnp.array([[[1.0]], [[3.0]],
    ...     [[4.0]]])
    >>> dmd_direction(x, real, fake, eps=0.0).tolist()
    [[0.5, 0.5]]

  References:
    Yin et al., Improved Distribution Matching Distillation, 2024,
    arXiv:2405.14867 (the loss of arXiv:2311.18828, eq. 7 and 8). Departures
    from the official code: eps in the normaliser, at least float32, and no
    nan_to_num (a NaN stays one).
  """
  fn = "dmd_direction"
  _checks.in_range(fn, "eps", eps, 0.0)
  _checks.in_range(fn, "floor", floor, 0.0)
  x, real_x0, fake_x0 = _arrays(fn, x=x, real_x0=real_x0, fake_x0=fake_x0)
  scale = jnp.maximum(_row_mean(jnp.abs(x - real_x0)), floor) + eps
  direction = (fake_x0 - real_x0) / scale
  if weight is not None:
    direction = direction * _rows(fn, "weight", weight, x)
  return jax.lax.stop_gradient(direction)


def denoising_weight(
    sigma: PerRow,
    alpha: PerRow = None,
    *,
    kind: Literal["edm", "alpha", "inverse"],
    sigma_data: float = 0.5,
    maximum: float | None = None,
) -> Float[Array, "*b"]:
  """The papers' weights of a denoising loss, as functions of the noise level.

  edm: 1 / sigma^2 + 1 / sigma_data^2 (an x0 loss of EDM: DMD2, SiD).
  alpha: alpha^2 (an epsilon loss of SwiftBrush's LoRA teacher).
  inverse: 1 / sigma^2 (an x0 loss of rCM's critic with sigma = sin(angle); a
  velocity loss of Phased DMD with sigma_{t|s}, maximum 10).

  Args:
    sigma: noise level, above 0 for "edm" and "inverse". Shape [*b].
    alpha: signal level, only for "alpha". Shape [*b].
    kind: "edm", "alpha" or "inverse".
    sigma_data: EDM's standard deviation of the data; above 0.
    maximum: upper clip of the weight; None is none.

  Returns:
    The weight, shape [*b], at least float32, stop-gradient.

  Raises:
    ValueError: unknown `kind`, `alpha` missing, `sigma_data` not above 0.

  References:
    Karras et al., Elucidating the Design Space of Diffusion-Based Generative
    Models, 2022, arXiv:2206.00364, table 1; Nguyen and Tran, SwiftBrush, 2023,
    arXiv:2312.05239; arXiv:2510.27684 (clip of 10: from a secondary summary).
  """
  fn = "denoising_weight"
  _checks.one_of(fn, "kind", kind, ("edm", "alpha", "inverse"))
  _checks.in_range(fn, "sigma_data", sigma_data, 0.0, open_low=True)
  if kind == "alpha":
    if alpha is None:
      _checks.fail(fn, "alpha", "given with kind='alpha'", None)
    weight = jnp.square(_checks.at_least_float32(alpha))
  else:
    _checks.in_range(fn, "sigma", sigma, 0.0, open_low=True)
    weight = 1 / jnp.square(_checks.at_least_float32(sigma))
    if kind == "edm":
      weight = weight + 1 / sigma_data**2
  if maximum is not None:
    weight = jnp.minimum(weight, maximum)
  return jax.lax.stop_gradient(weight)


def denoising_loss(
    prediction: Float[Array, "b *s"],
    x0: Float[Array, "b *s"],
    noise: Float[Array, "b *s"] | None = None,
    *,
    kind: PredictionKind = "x0",
    alpha: PerRow = None,
    sigma: PerRow = None,
    alpha_derivative: PerRow = -1.0,
    sigma_derivative: PerRow = 1.0,
    weight: PerRow = None,
    elements: Elements = "mean",
) -> Float[Array, "b ..."]:
  """Denoising score matching: what trains a fake score, or a teacher.

  weight * (prediction - target)^2 with, for x_t = alpha x0 + sigma noise,
    x0: x0                          epsilon: noise
    score: -noise / sigma           v: alpha noise - sigma x0
    velocity: alpha' x0 + sigma' noise (as it stands: noise - x0).
  The target is stop-gradient, so a student's samples may be given as `x0`.
  Any other target (the sub-interval velocity of Phased DMD) is given as `x0`
  with kind="x0", which is plain weighted regression.

  Args:
    prediction: the network's output at x_t, of the kind `kind`. Shape [b, *s].
    x0: clean samples, frozen. Shape [b, *s].
    noise: the unit noise in x_t; not needed for kind="x0". Shape [b, *s].
    kind: what the network predicts.
    alpha: signal level, for "v" only. Shape [b] or [].
    sigma: noise level, for "v" and "score" (there above 0). Shape [b] or [].
    alpha_derivative: d alpha / d t, for "velocity". Shape [b] or [].
    sigma_derivative: d sigma / d t, for "velocity". Shape [b] or [].
    weight: factor per row (see `denoising_weight`); None is 1. Shape [b] or [].
    elements: over the elements of a row, "mean", "sum" or "none".

  Returns:
    The loss, shape [b] ([b, *s] with elements="none"), at least float32; 0
    where the prediction is the target.

  Raises:
    ValueError: shapes that differ, an empty batch, unknown `kind` or
      `elements`, an argument that `kind` needs and that is missing.
    TypeError: arrays that are not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> x0, noise = jnp.array([[1.0]]), jnp.array([[3.0]])
    >>> denoising_loss(jnp.array([[0.0]]), x0, noise, kind="velocity").tolist()
    [4.0]

  References:
    Vincent, A Connection Between Score Matching and Denoising Autoencoders,
    2011; Salimans and Ho, Progressive Distillation, 2022, arXiv:2202.00512 (v);
    Yin et al., 2024, arXiv:2405.14867, sec. 4.2; departures: none.
  """
  fn = "denoising_loss"
  _checks.one_of(fn, "kind", kind, _PREDICTION_KINDS)
  _checks.one_of(fn, "elements", elements, _ELEMENTS)
  needed = {
      "x0": {},
      "epsilon": {"noise": noise},
      "score": {"noise": noise, "sigma": sigma},
      "velocity": {"noise": noise},
      "v": {"noise": noise, "alpha": alpha, "sigma": sigma},
  }[kind]
  for name, value in needed.items():
    if value is None:
      _checks.fail(fn, name, f"given with kind={kind!r}", None)
  if kind == "x0":
    prediction, target = _arrays(fn, prediction=prediction, x0=x0)
  else:
    prediction, x0, noise = _arrays(
        fn, prediction=prediction, x0=x0, noise=noise
    )
    if kind == "epsilon":
      target = noise
    elif kind == "score":
      _checks.in_range(fn, "sigma", sigma, 0.0, open_low=True)
      target = -noise / _rows(fn, "sigma", sigma, x0)
    elif kind == "velocity":
      target = (
          _rows(fn, "alpha_derivative", alpha_derivative, x0) * x0
          + _rows(fn, "sigma_derivative", sigma_derivative, x0) * noise
      )
    else:
      target = (
          _rows(fn, "alpha", alpha, x0) * noise
          - _rows(fn, "sigma", sigma, x0) * x0
      )
  values = jnp.square(prediction - jax.lax.stop_gradient(target))
  if weight is not None:
    values = values * _rows(fn, "weight", weight, values)
  return _reduce(values, elements)
