"""Distribution matching: directions, the loss that carries them, the critic.

A `*_direction` is the gradient to DESCEND on a sample, stop-gradient as a
whole; `surrogate_loss(x, direction)` turns it into values whose gradient it is.
`denoising_loss` trains the fake score that the directions read.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from distilljax import _checks
from distilljax.typing import Array, Bool, Float, Int, Number

Elements = Literal["mean", "sum", "none"]
_ELEMENTS = ("mean", "sum", "none")
Form = Literal["square", "linear"]
_FORMS = ("square", "linear")
PredictionKind = Literal["x0", "epsilon", "score", "velocity", "v"]
_PREDICTION_KINDS = ("x0", "epsilon", "score", "velocity", "v")
# A number per row [b], or one number for all rows.
PerRow = Any
# (alpha, sigma, alpha', sigma') of a noise path at some times, each [b] or []:
# what `processes.NoisePath.coefficients` returns.
PathAt = tuple[Any, Any, Any, Any]


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


def _path_at(
    fn: str, name: str, at: PathAt, x: jax.Array
) -> tuple[jax.Array, ...]:
  """The four coefficients as constants that broadcast over `x` [b, *s]."""
  at = tuple(at)
  if len(at) != 4:
    _checks.fail(fn, name, "(alpha, sigma, alpha', sigma')", f"{len(at)} items")
  parts = ("alpha", "sigma", "alpha_prime", "sigma_prime")
  return tuple(
      _rows(fn, f"{name}.{part}", value, x) for part, value in zip(parts, at)
  )


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
    eps: Number = 1e-6,
    floor: Number = 0.0,
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
    sigma_data: Number = 0.5,
    maximum: Number | None = None,
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
    coefficients: PathAt | None = None,
    *,
    kind: PredictionKind = "x0",
    weight: PerRow = None,
    elements: Elements = "mean",
) -> Float[Array, "b ..."]:
  """Denoising score matching: what trains a fake score, or a teacher.

  weight * (prediction - target)^2 with, for x_t = alpha x0 + sigma noise,
    x0: x0                          epsilon: noise
    score: -noise / sigma           v: alpha noise - sigma x0
    velocity: alpha' x0 + sigma' noise (without coefficients: noise - x0).
  The target is stop-gradient, so a student's samples may be given as `x0`.
  Any other target (the sub-interval velocity of Phased DMD) is given as `x0`
  with kind="x0", which is plain weighted regression.

  Args:
    prediction: the network's output at x_t, of the kind `kind`. Shape [b, *s].
    x0: clean samples, frozen. Shape [b, *s].
    noise: the unit noise in x_t; not needed for kind="x0". Shape [b, *s].
    coefficients: the path at t, (alpha, sigma, alpha', sigma'), each [b] or [],
      as `path.coefficients(t)` gives them; needed for "score" and "v". None is
      the straight path for "velocity".
    kind: what the network predicts.
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
  if kind in ("score", "v") and coefficients is None:
    _checks.fail(fn, "coefficients", f"given with kind={kind!r}", None)
  if kind == "x0":
    prediction, target = _arrays(fn, prediction=prediction, x0=x0)
  else:
    if noise is None:
      _checks.fail(fn, "noise", f"given with kind={kind!r}", None)
    prediction, x0, noise = _arrays(
        fn, prediction=prediction, x0=x0, noise=noise
    )
    if kind == "epsilon":
      target = noise
    elif coefficients is None:
      target = noise - x0
    else:
      alpha, sigma, alpha_prime, sigma_prime = _path_at(
          fn, "coefficients", coefficients, x0
      )
      if kind == "score":
        target = -noise / sigma
      elif kind == "v":
        target = alpha * noise - sigma * x0
      else:
        target = alpha_prime * x0 + sigma_prime * noise
  values = jnp.square(prediction - jax.lax.stop_gradient(target))
  if weight is not None:
    values = values * _rows(fn, "weight", weight, values)
  return _reduce(values, elements)


def vsd_direction(
    teacher_epsilon: Float[Array, "b *s"],
    fake_epsilon: Float[Array, "b *s"],
    sigma: PerRow,
    *,
    power: Number = 2.0,
    clip: Number | None = None,
) -> Float[Array, "b *s"]:
  """Variational score distillation: the teacher's noise against the critic's.

  sigma^power * (teacher_epsilon - fake_epsilon), clipped to [-clip, clip]. To
  DESCEND on the sample that was noised; stop-gradient as a whole, so no
  network is differentiated. The papers sum it over the elements of a sample
  (`surrogate_loss(..., elements="sum")`); SwiftBrush takes the mean.

  Args:
    teacher_epsilon: the (guided) teacher's noise estimate at x_t. Shape
      [b, *s].
    fake_epsilon: that of the network which follows the samples' own
      distribution (a LoRA of the teacher). Shape [b, *s].
    sigma: noise level of x_t. Shape [b] or [].
    power: 2 in ProlificDreamer and SwiftBrush (sigma^2 = 1 - alpha^2 there), 0
      for no weight.
    clip: bound on every element, after the weight; None is none. Above 0.

  Returns:
    The direction, shape [b, *s], at least float32; 0 where the two agree.

  Raises:
    ValueError: shapes that differ, an empty batch, `clip` not above 0.
    TypeError: arrays that are not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> vsd_direction(jnp.array([[3.0]]), jnp.array([[1.0]]), 0.5).tolist()
    [[0.5]]

  References:
    Wang et al., ProlificDreamer, 2023, arXiv:2305.16213, eq. 9; Nguyen and
    Tran, SwiftBrush, 2023, arXiv:2312.05239. Departure from the official code:
    no nan_to_num.
  """
  fn = "vsd_direction"
  return _noise_direction(
      fn,
      sigma,
      power,
      clip,
      teacher_epsilon=teacher_epsilon,
      fake_epsilon=fake_epsilon,
  )


def sds_direction(
    teacher_epsilon: Float[Array, "b *s"],
    noise: Float[Array, "b *s"],
    sigma: PerRow,
    *,
    power: Number = 2.0,
    clip: Number | None = None,
) -> Float[Array, "b *s"]:
  """Score distillation sampling: the teacher's noise against the true one.

  sigma^power * (teacher_epsilon - noise), clipped to [-clip, clip]:
  `vsd_direction` with the score of a point mass at the sample in place of the
  critic's, which seeks modes. To DESCEND; stop-gradient as a whole.

  Args:
    teacher_epsilon: the (guided) teacher's noise estimate at x_t. Shape
      [b, *s].
    noise: the unit noise in x_t. Shape [b, *s].
    sigma: noise level of x_t. Shape [b] or [].
    power: exponent of the weight.
    clip: bound on every element, after the weight; None is none. Above 0.

  Returns:
    The direction, shape [b, *s], at least float32.

  Raises:
    ValueError: shapes that differ, an empty batch, `clip` not above 0.
    TypeError: arrays that are not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> sds_direction(jnp.array([[3.0]]), jnp.array([[1.0]]), 2.0).tolist()
    [[8.0]]

  References:
    Poole et al., DreamFusion, 2022, arXiv:2209.14988, eq. 3 (the weight:
    arXiv:2305.16213's code); departures: no nan_to_num.
  """
  fn = "sds_direction"
  return _noise_direction(
      fn, sigma, power, clip, teacher_epsilon=teacher_epsilon, noise=noise
  )


def _noise_direction(
    fn: str, sigma: PerRow, power: Number, clip: Number | None, **pair: Any
) -> jax.Array:
  _checks.in_range(fn, "clip", clip, 0.0, open_low=True)
  _checks.in_range(fn, "sigma", sigma, 0.0)
  teacher, other = _arrays(fn, **pair)
  weight = _rows(fn, "sigma", sigma, teacher) ** power
  direction = weight * (teacher - other)
  if clip is not None:
    direction = jnp.clip(direction, -clip, clip)
  return jax.lax.stop_gradient(direction)


def diff_instruct_direction(
    real_x0: Float[Array, "b *s"],
    fake_x0: Float[Array, "b *s"],
    *,
    weight: PerRow = None,
) -> Float[Array, "b *s"]:
  """Diff-Instruct: the plain difference of the two denoisings.

  weight * (fake_x0 - real_x0). To DESCEND; stop-gradient as a whole. It is
  `dmd_direction` without the normaliser, and VSD in x0 space with weight 1.
  The paper sums it over elements (`surrogate_loss(..., elements="sum")`; its
  printed loss is form="linear").

  Args:
    real_x0: the teacher's x0 estimate at the noised sample. Shape [b, *s].
    fake_x0: the fake score's x0 estimate there. Shape [b, *s].
    weight: factor per row; None is 1. Shape [b] or [].

  Returns:
    The direction, shape [b, *s], at least float32; 0 where the two agree.

  Raises:
    ValueError: shapes that differ, an empty batch.
    TypeError: arrays that are not floating.

  References:
    Luo et al., Diff-Instruct, 2023, arXiv:2305.18455, eq. 7 (number of the
    equation from memory); departures from the official code: none.
  """
  fn = "diff_instruct_direction"
  real_x0, fake_x0 = _arrays(fn, real_x0=real_x0, fake_x0=fake_x0)
  direction = fake_x0 - real_x0
  if weight is not None:
    direction = direction * _rows(fn, "weight", weight, direction)
  return jax.lax.stop_gradient(direction)


def sid_loss(
    x: Float[Array, "b *s"],
    real_x0: Float[Array, "b *s"],
    fake_x0: Float[Array, "b *s"],
    *,
    alpha: Number = 1.2,
    floor: Number = 1e-5,
    elements: Elements = "mean",
) -> Float[Array, "b ..."]:
  """Score identity distillation: a Fisher divergence one can differentiate.

  (real - fake) * [(real - x) - alpha (real - fake)] / w with
  w = sg(max(mean |x - real|, floor)), the mean over a row's elements. NOTHING
  but w is stop-gradient: compute both denoisings from x with the networks'
  parameters frozen (differentiate by the student's only) and the gradient runs
  through both networks into x, which is the point of the method.

  Args:
    x: clean samples of the student. Shape [b, *s].
    real_x0: the teacher's x0 estimate at x noised. Shape [b, *s].
    fake_x0: the fake score's x0 estimate there. Shape [b, *s].
    alpha: 1 is the exact identity; 1.2 (or 1) in the paper's runs.
    floor: least value of the normaliser. At least 0.
    elements: over the elements of a row, "mean" (invariant to resolution),
      "sum" (the official code, which also multiplies by 100), or "none".

  Returns:
    The loss, shape [b] ([b, *s] with elements="none"), at least float32; may
    be negative; 0 where teacher and fake score agree.

  Raises:
    ValueError: shapes that differ, an empty batch, negative `floor`.
    TypeError: arrays that are not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> x, real, fake = jnp.array([[[0.0]], [[2.0]], [[1.0]]])
    >>> sid_loss(x, real, fake, alpha=1.0).tolist()
    [0.5]

  References:
    Zhou et al., Score identity Distillation, 2024, arXiv:2404.04057, eq. 23;
    departures from the official code: mean over elements by default.
  """
  fn = "sid_loss"
  _checks.in_range(fn, "floor", floor, 0.0)
  _checks.one_of(fn, "elements", elements, _ELEMENTS)
  x, real_x0, fake_x0 = _arrays(fn, x=x, real_x0=real_x0, fake_x0=fake_x0)
  scale = jnp.maximum(_row_mean(jnp.abs(x - real_x0)), floor)
  gap = real_x0 - fake_x0
  values = gap * ((real_x0 - x) - alpha * gap) / jax.lax.stop_gradient(scale)
  return _reduce(values, elements)


def density_ratio(
    logits: Float[Array, "b *k"],
    *,
    lower: Number = 0.1,
    upper: Number = 20.0,
    max_logit: Number = 10.0,
) -> Float[Array, "b"]:
  """p_real / p_fake as a discriminator's logits see it.

  clip(exp(clip(mean over a row of the logits, +-max_logit)), lower, upper);
  stop-gradient.

  Args:
    logits: of the student's samples, high for "real". Shape [b, ...].
    lower: least ratio, above 0.
    upper: greatest ratio, at least `lower`.
    max_logit: bound of the mean logit, above 0.

  Returns:
    The ratio, shape [b], at least float32.

  Raises:
    ValueError: an empty batch, `lower` or `max_logit` not above 0, `upper`
      below `lower`.
    TypeError: logits that are not floating.

  References:
    Xu et al., One-step Diffusion Models with f-Divergence Distribution
    Matching, 2025, arXiv:2502.15681; constants of its released code.
  """
  fn = "density_ratio"
  _checks.in_range(fn, "lower", lower, 0.0, open_low=True)
  _checks.in_range(fn, "upper", upper, lower)
  _checks.in_range(fn, "max_logit", max_logit, 0.0, open_low=True)
  (logits,) = _arrays(fn, logits=logits)
  mean = jnp.mean(logits, axis=tuple(range(1, logits.ndim)))
  ratio = jnp.exp(jnp.clip(mean, -max_logit, max_logit))
  return jax.lax.stop_gradient(jnp.clip(ratio, lower, upper))


def ratio_histogram(bins: int = 10) -> Float[Array, "bins"]:
  """First state for `normalize_ratio`: a mean ratio of 1 in every bin.

  Args:
    bins: number of bins, those of the official code by default.

  Returns:
    The mean ratio of every bin, ones. Shape [bins], float32.

  References:
    One-step Diffusion Models with f-Divergence Distribution Matching, 2025,
    arXiv:2502.15681.
  """
  _checks.in_range("ratio_histogram", "bins", bins, 1)
  return jnp.ones(bins, jnp.float32)


def normalize_ratio(
    ratio: Float[Array, "b"],
    t: Float[Array, "b"],
    histogram: Float[Array, "bins"],
    *,
    t_min: Number = 0.0,
    t_max: Number = 1.0,
    rate: Number = 0.5,
    axis_name: str | tuple[str, ...] | None = None,
) -> tuple[Float[Array, "b"], Float[Array, "bins"]]:
  """Divides each ratio by a running mean of the ratios at its noise level.

  The bins cut [t_min, t_max] evenly. A bin that some row falls in becomes
  rate * bin + (1 - rate) * (mean ratio of its rows, over the GLOBAL batch);
  then ratio / (updated bin + 1e-6). All of it is stop-gradient. The state goes
  in and comes out: keep it in a method's carry. It couples the rows of a batch,
  so under accumulation it belongs in `prepare`.

  Args:
    ratio: from `density_ratio`. Shape [b].
    t: the times of the samples, in [t_min, t_max]; outside counts to the end
      bins. Shape [b].
    histogram: the state, from `ratio_histogram`. Shape [bins].
    t_min: start of the first bin.
    t_max: end of the last bin, above `t_min`.
    rate: share of the old state, in [0, 1]; 0 is the current batch alone
      (CIFAR-10), 0.5 in the ImageNet runs.
    axis_name: mapped axis or axes of the batch, inside shard_map or pmap.

  Returns:
    (ratio, histogram), of the shapes given, at least float32.

  Raises:
    ValueError: shapes that do not fit, `t_max` not above `t_min`, `rate`
      outside [0, 1], an empty batch.
    TypeError: arrays that are not floating.

  References:
    arXiv:2502.15681; the bins are those of the peer's released code.
  """
  fn = "normalize_ratio"
  _checks.in_range(fn, "t_max", t_max, t_min, open_low=True)
  _checks.in_range(fn, "rate", rate, 0.0, 1.0)
  _checks.rank(fn, "ratio", ratio, 1, "[b]")
  _checks.rank(fn, "histogram", histogram, 1, "[bins]")
  (histogram,) = _arrays(fn, histogram=histogram)
  ratio, t = _arrays(fn, ratio=ratio, t=t)
  bins = histogram.shape[0]
  place = jnp.floor((t - t_min) / (t_max - t_min) * bins)
  index = jnp.clip(place, 0, bins - 1).astype(jnp.int32)
  count = jnp.zeros(bins, ratio.dtype).at[index].add(1)
  total = jnp.zeros(bins, ratio.dtype).at[index].add(ratio)
  if axis_name is not None:
    count = jax.lax.psum(count, axis_name)
    total = jax.lax.psum(total, axis_name)
  mean = total / jnp.maximum(count, 1)
  mixed = rate * histogram + (1 - rate) * mean.astype(histogram.dtype)
  histogram = jnp.where(count > 0, mixed, histogram)
  ratio = ratio / (histogram[index].astype(ratio.dtype) + 1e-6)
  return jax.lax.stop_gradient((ratio, histogram))


FDivergence = Literal["rkl", "kl", "js", "sf", "sh", "neyman", "jf"]
# The derivative weights h(r) of the paper's table, r = p_real / p_fake.
_F_WEIGHTS = {
    "rkl": jnp.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "sf": lambda r: 1 / (1 + r),
    "sh": jnp.sqrt,
    "neyman": lambda r: 1 / r,
    "jf": lambda r: 1 + r,
}


def f_divergence_weight(
    ratio: Float[Array, "b"],
    *,
    kind: FDivergence = "js",
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "b"]:
  """Per-sample weight that turns DMD's reverse KL into another f-divergence.

  h(r) / (mean over the GLOBAL batch of h + 1e-6), r = p_real / p_fake, with
    rkl: 1 (DMD itself; exactly 1)     kl: r (forward KL: covers modes)
    js: r / (1 + r)                    sf: 1 / (1 + r) (softened reverse KL)
    sh: sqrt(r) (squared Hellinger)    neyman: 1 / r
    jf: 1 + r (Jeffreys)
  Stop-gradient. Give it to `dmd_direction(..., weight=)`. It couples the rows
  of a batch, so under accumulation it belongs in `prepare`.

  Args:
    ratio: density ratios above 0, from `density_ratio`, after
      `normalize_ratio` if that is on. Shape [b].
    kind: the divergence.
    axis_name: mapped axis or axes of the batch, inside shard_map or pmap.

  Returns:
    The weights, shape [b], at least float32, of mean 1 up to the 1e-6.

  Raises:
    ValueError: unknown `kind`, an empty batch, `ratio` that is not [b].
    TypeError: `ratio` is not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> weight = f_divergence_weight(jnp.array([1.0, 3.0]), kind="kl")
    >>> [round(w, 3) for w in weight.tolist()]
    [0.5, 1.5]

  References:
    Xu et al., One-step Diffusion Models with f-Divergence Distribution
    Matching, 2025, arXiv:2502.15681, table 1. Departure from the peer's code:
    "rkl", which raises there, gives 1.
  """
  fn = "f_divergence_weight"
  _checks.one_of(fn, "kind", kind, _F_WEIGHTS)
  _checks.rank(fn, "ratio", ratio, 1, "[b]")
  (ratio,) = _arrays(fn, ratio=ratio)
  _checks.in_range(fn, "ratio", ratio, 0.0, open_low=True)
  weight = _F_WEIGHTS[kind](ratio)
  if kind == "rkl":
    return weight
  mean = jnp.mean(weight)
  if axis_name is not None:
    # Every device holds as many rows, so the mean of means is the global one.
    mean = jax.lax.pmean(mean, axis_name)
  return jax.lax.stop_gradient(weight / (mean + 1e-6))


def decoupled_dmd_terms(
    dm_cond_x0: Float[Array, "b *s"],
    dm_fake_x0: Float[Array, "b *s"],
    ca_cond_x0: Float[Array, "b *s"],
    ca_uncond_x0: Float[Array, "b *s"],
) -> tuple[Float[Array, "b *s"], Float[Array, "b *s"]]:
  """DMD's direction in two: distribution matching and guidance augmentation.

  dm = dm_fake_x0 - dm_cond_x0 and ca = ca_uncond_x0 - ca_cond_x0, both to
  DESCEND, both stop-gradient. At one shared noise level (dm_cond_x0 is
  ca_cond_x0) dm + (w - 1) ca is what a teacher guided by w gives:
  fake - (uncond + w (cond - uncond)). The factor is w - 1, not w.

  Args:
    dm_cond_x0: the conditional teacher's x0 estimate at the matching term's
      level. Shape [b, *s].
    dm_fake_x0: the fake score's x0 estimate there. Shape [b, *s].
    ca_cond_x0: the conditional teacher's x0 estimate at the augmentation's
      level. Shape [b, *s].
    ca_uncond_x0: the unconditional teacher's there. Shape [b, *s].

  Returns:
    (dm, ca), each of shape [b, *s], at least float32, not normalised.

  Raises:
    ValueError: shapes that differ, an empty batch.
    TypeError: arrays that are not floating.

  References:
    Decoupled DMD, 2025, arXiv:2511.22677; a reconstruction from a secondary
    summary with formulas, there is no official training code.
  """
  fn = "decoupled_dmd_terms"
  dm_cond, dm_fake, ca_cond, ca_uncond = _arrays(
      fn,
      dm_cond_x0=dm_cond_x0,
      dm_fake_x0=dm_fake_x0,
      ca_cond_x0=ca_cond_x0,
      ca_uncond_x0=ca_uncond_x0,
  )
  return jax.lax.stop_gradient((dm_fake - dm_cond, ca_uncond - ca_cond))


def decoupled_dmd_loss(
    x: Float[Array, "b *s"],
    dm_cond_x0: Float[Array, "b *s"],
    dm_fake_x0: Float[Array, "b *s"],
    ca_cond_x0: Float[Array, "b *s"],
    ca_uncond_x0: Float[Array, "b *s"],
    *,
    guidance: Number,
    normalizer: Literal["separate", "shared"] = "separate",
    eps: Number = 1e-6,
    elements: Elements = "mean",
) -> Float[Array, "b ..."]:
  """DMD whose two parts look at different noise levels.

  0.5 (x - sg(x - g))^2 with g = dm / n_dm + (guidance - 1) ca / n_ca and
  (dm, ca) of `decoupled_dmd_terms`. With guided = uncond + guidance (cond -
  uncond) at the augmentation's level, the normalisers are
    separate: n_dm = mean |x - dm_cond_x0| + eps, n_ca = mean |x - guided| + eps
    shared: both mean |x - guided| + eps. At one shared level this is DMD with
      the guided teacher, exactly.
  Only x has a gradient.

  Args:
    x: clean samples of the student. Shape [b, *s].
    dm_cond_x0: as in `decoupled_dmd_terms`; likewise the next three.
    dm_fake_x0: see there.
    ca_cond_x0: see there.
    ca_uncond_x0: see there.
    guidance: the teacher's w in uncond + w (cond - uncond); 1 is no
      augmentation.
    normalizer: "separate" or "shared".
    eps: added to the normalisers; at least 0.
    elements: over the elements of a row, "mean", "sum" or "none".

  Returns:
    The loss, shape [b] ([b, *s] with elements="none"), at least float32, at
    least 0.

  Raises:
    ValueError: shapes that differ, an empty batch, unknown `normalizer` or
      `elements`, negative `eps`.
    TypeError: arrays that are not floating.

  References:
    Decoupled DMD, 2025, arXiv:2511.22677; a reconstruction from a secondary
    summary: how the paper splits the normaliser is not known to us.
  """
  fn = "decoupled_dmd_loss"
  _checks.one_of(fn, "normalizer", normalizer, ("separate", "shared"))
  _checks.one_of(fn, "elements", elements, _ELEMENTS)
  _checks.in_range(fn, "eps", eps, 0.0)
  _checks.finite(fn, guidance=guidance)
  x, dm_cond, dm_fake, ca_cond, ca_uncond = _arrays(
      fn,
      x=x,
      dm_cond_x0=dm_cond_x0,
      dm_fake_x0=dm_fake_x0,
      ca_cond_x0=ca_cond_x0,
      ca_uncond_x0=ca_uncond_x0,
  )
  dm, ca = decoupled_dmd_terms(dm_cond, dm_fake, ca_cond, ca_uncond)
  guided = ca_uncond + guidance * (ca_cond - ca_uncond)
  ca_scale = _row_mean(jnp.abs(x - guided)) + eps
  if normalizer == "shared":
    dm_scale = ca_scale
  else:
    dm_scale = _row_mean(jnp.abs(x - dm_cond)) + eps
  direction = dm / dm_scale + (guidance - 1) * (ca / ca_scale)
  return surrogate_loss(x, direction, elements=elements)


def _subinterval(
    fn: str, at_s: PathAt, at_t: PathAt, eps: Number, x: jax.Array
) -> tuple[Any, Any, jax.Array, jax.Array]:
  """Both levels, and alpha and sigma of the kernel from one to the other."""
  _checks.in_range(fn, "eps", eps, 0.0)
  at_s = _path_at(fn, "at_s", at_s, x)
  at_t = _path_at(fn, "at_t", at_t, x)
  alpha_s, sigma_s, alpha_t, sigma_t = *at_s[:2], *at_t[:2]
  _checks.holds(
      fn,
      "at_t",
      alpha_s * sigma_t - alpha_t * sigma_s,
      lambda gap: gap > 0,
      "noisier than at_s",
  )
  alpha = alpha_t / alpha_s
  variance = jnp.square(sigma_t) - jnp.square(alpha * sigma_s)
  return at_s, at_t, alpha, jnp.sqrt(jnp.maximum(variance, eps))


def subinterval_coefficients(
    at_s: PathAt, at_t: PathAt, *, eps: Number = 1e-8
) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
  """The noising kernel from a partly noisy level s to a noisier level t.

  x_t = alpha_ts x_s + sigma_ts noise with alpha_ts = alpha_t / alpha_s and
  sigma_ts^2 = max(sigma_t^2 - alpha_ts^2 sigma_s^2, eps) gives the marginal of
  the path at t. Stop-gradient.

  Args:
    at_s: the path at the level of x_s, (alpha, sigma, alpha', sigma'), each [b]
      or [], as `path.coefficients(s)` gives them; alpha above 0.
    at_t: the path at t, noisier than s (debug mode checks it).
    eps: least sigma_ts^2, at least 0; where it binds, x_t is noisier than the
      path by that much.

  Returns:
    (alpha_ts, sigma_ts), each [b] or [], at least float32.

  Raises:
    ValueError: not four coefficients, negative `eps`.

  References:
    Phased DMD, 2025, arXiv:2510.27684; formula from a secondary summary,
    checked against the released trainer's numbers.
  """
  fn = "subinterval_coefficients"
  parts = [_checks.at_least_float32(a) for a in (*at_s, *at_t)]
  like = max(parts, key=lambda a: (a.ndim, a.dtype.itemsize))
  _, _, alpha, sigma = _subinterval(fn, at_s, at_t, eps, like)
  shape = like.shape
  return jnp.broadcast_to(alpha, shape), jnp.broadcast_to(sigma, shape)


def subinterval_forward(
    x_s: Float[Array, "b *s"],
    noise: Float[Array, "b *s"],
    at_s: PathAt,
    at_t: PathAt,
    *,
    eps: Number = 1e-8,
) -> Float[Array, "b *s"]:
  """x_t = alpha_ts x_s + sigma_ts noise; see `subinterval_coefficients`.

  The critic sees it only detached, so x_s is stop-gradient.

  Args:
    x_s: samples at level s. Shape [b, *s].
    noise: unit noise. Shape [b, *s].
    at_s: the path at s.
    at_t: the path at t, noisier.
    eps: least sigma_ts^2.

  Returns:
    x_t, shape [b, *s], at least float32.

  Raises:
    ValueError: shapes that differ, an empty batch, not four coefficients.
    TypeError: arrays that are not floating.

  References:
    Phased DMD, 2025, arXiv:2510.27684; formula from a secondary summary.
  """
  fn = "subinterval_forward"
  x_s, noise = _arrays(fn, x_s=x_s, noise=noise)
  _, _, alpha, sigma = _subinterval(fn, at_s, at_t, eps, x_s)
  return jax.lax.stop_gradient(alpha * x_s + sigma * noise)


def subinterval_velocity_target(
    x_s: Float[Array, "b *s"],
    noise: Float[Array, "b *s"],
    at_s: PathAt,
    at_t: PathAt,
    *,
    eps: Number = 1e-8,
) -> Float[Array, "b *s"]:
  """Unbiased velocity target at x_t when only x_s, never x_0, is known.

  With x_t of `subinterval_forward`,
    x0 ~ x_s / alpha_s - alpha_t sigma_s^2 / (alpha_s^2 sigma_ts) noise
    noise of the whole path ~ sigma_t / sigma_ts noise
  have the right means given x_t, and the target is alpha' x0 + sigma' noise of
  the two. On the straight path that is
    [t + (1 - t) s^2 / (1 - s)^2] / sigma_ts noise - x_s / (1 - s).
  The naive noise - x_s is biased; at s = 0 the two agree. Stop-gradient. Train
  the critic by `denoising_loss(prediction, target, weight=...)`; as t nears s
  the target grows like 1 / sigma_ts, hence the paper's weight
  `denoising_weight(sigma_ts, kind="inverse", maximum=10)`.

  Args:
    x_s: samples at level s. Shape [b, *s].
    noise: the unit noise that took x_s to x_t. Shape [b, *s].
    at_s: the path at s, (alpha, sigma, alpha', sigma'), alpha above 0.
    at_t: the path at t, noisier.
    eps: least sigma_ts^2.

  Returns:
    The target, shape [b, *s], at least float32.

  Raises:
    ValueError: shapes that differ, an empty batch, not four coefficients.
    TypeError: arrays that are not floating.

  References:
    Phased DMD, 2025, arXiv:2510.27684 (formula from a secondary summary,
    checked against the released trainer's numbers); the form for other paths
    is ours.
  """
  fn = "subinterval_velocity_target"
  x_s, noise = _arrays(fn, x_s=x_s, noise=noise)
  at_s, at_t, _, sigma_ts = _subinterval(fn, at_s, at_t, eps, x_s)
  alpha_s, sigma_s, _, _ = at_s
  alpha_t, sigma_t, alpha_prime, sigma_prime = at_t
  inherited = alpha_t * jnp.square(sigma_s / alpha_s)
  # Combined per row, so that an element costs two products.
  of_noise = (sigma_prime * sigma_t - alpha_prime * inherited) / sigma_ts
  of_x_s = alpha_prime / alpha_s
  return jax.lax.stop_gradient(of_x_s * x_s + of_noise * noise)


def group_normalize(
    values: Float[Array, "b *s"],
    group_ids: Int[Array, "b"],
    magnitude: Float[Array, "b"] | None = None,
    *,
    center: bool = False,
    eps: Number = 1e-6,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "b *s"]:
  """Divides directions or rewards by one number for each group of rows.

  (values - center * mean of the group) / (scale + eps), where the scale is the
  group's mean of `magnitude`, or without it the group's root mean square of
  the numerator (with center: its standard deviation). Rows of a group share a
  condition and a noise level. Inside a group relative sizes survive, which a
  per-row normaliser as DMD's destroys. Stop-gradient as a whole. A group of
  equal values gives exactly 0 when centred, whatever its size. It couples the
  rows of a batch, so under accumulation it belongs in `prepare`.

  Args:
    values: directions or rewards. Shape [b, *s].
    group_ids: any integers; rows with equal ids form a group. Shape [b].
    magnitude: a size for every row, at least 0; None: see above. Shape [b].
    center: subtracts the group's mean, element by element.
    eps: added to the scale; at least 0.
    axis_name: mapped axis or axes of the batch, inside shard_map or pmap.

  Returns:
    The normalised values, shape [b, *s], at least float32.

  Raises:
    ValueError: shapes that do not fit, an empty batch, negative `eps`.
    TypeError: `group_ids` not integer, other arrays not floating.

  Example:
    >>> import jax.numpy as jnp
    >>> rewards, ids = jnp.array([1.0, 3.0, 5.0]), jnp.array([0, 0, 1])
    >>> out = group_normalize(rewards, ids, center=True)
    >>> [round(a, 3) for a in out.tolist()]
    [-1.0, 1.0, 0.0]

  References:
    R_dm, 2026, arXiv:2603.28460: a reconstruction, only the abstract was read
    and there is no code.
  """
  fn = "group_normalize"
  _checks.in_range(fn, "eps", eps, 0.0)
  (values,) = _arrays(fn, values=values)
  _checks.per_row(
      fn, "values", values, group_ids=group_ids, magnitude=magnitude
  )
  _checks.integer(fn, group_ids=group_ids)
  everyone = group_ids
  if axis_name is not None:
    everyone = jax.lax.all_gather(group_ids, axis_name, tiled=True)
  # A group is named by the place of its first row in the global batch.
  first = jnp.argmax(group_ids[:, None] == everyone[None, :], axis=1)
  places = everyone.shape[0]

  def over_groups(rows):
    total = jax.ops.segment_sum(rows, first, num_segments=places)
    count = jax.ops.segment_sum(
        jnp.ones(rows.shape[0], rows.dtype), first, num_segments=places
    )
    if axis_name is not None:
      total = jax.lax.psum(total, axis_name)
      count = jax.lax.psum(count, axis_name)
    return (total / _checks.expand_like(jnp.maximum(count, 1), total))[first]

  if center:
    # Against one of its rows first: equal values cancel without rounding.
    known = values
    if axis_name is not None:
      known = jax.lax.all_gather(values, axis_name, tiled=True)
    values = values - known[first]
    values = values - over_groups(values)
  if magnitude is None:
    axes = tuple(range(1, values.ndim))
    squares = jnp.mean(jnp.square(values), axis=axes)
    scale = jnp.sqrt(over_groups(squares))
  else:
    (magnitude,) = _arrays(fn, magnitude=magnitude)
    scale = over_groups(magnitude.astype(values.dtype))
  return jax.lax.stop_gradient(
      values / (_checks.expand_like(scale, values) + eps)
  )


def group_dmd_direction(
    x: Float[Array, "b *s"],
    real_x0: Float[Array, "b *s"],
    fake_x0: Float[Array, "b *s"],
    group_ids: Int[Array, "b"],
    *,
    center: bool = False,
    eps: Number = 1e-6,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, "b *s"]:
  """Group-normalised distribution matching (GNDM).

  `dmd_direction` with the mean of mean |x - real_x0| over the row's group in
  place of the row's own: `group_normalize(fake_x0 - real_x0, ids, those)`. To
  DESCEND; stop-gradient as a whole. With one row a group it is `dmd_direction`.

  Args:
    x: clean samples of the student. Shape [b, *s].
    real_x0: the teacher's x0 estimate at the noised x. Shape [b, *s].
    fake_x0: the fake score's. Shape [b, *s].
    group_ids: rows of one condition AND one noise level share an id. Shape [b].
    center: subtracts the group's mean direction; off, since the common drift is
      signal for a deterministic generator.
    eps: added to the normaliser; at least 0.
    axis_name: mapped axis or axes of the batch, inside shard_map or pmap.

  Returns:
    The direction, shape [b, *s], at least float32.

  Raises:
    ValueError: shapes that do not fit, an empty batch, negative `eps`.
    TypeError: `group_ids` not integer, other arrays not floating.

  References:
    R_dm, 2026, arXiv:2603.28460: a reconstruction, only the abstract was read
    and there is no code.
  """
  fn = "group_dmd_direction"
  x, real_x0, fake_x0 = _arrays(fn, x=x, real_x0=real_x0, fake_x0=fake_x0)
  magnitude = _row_mean(jnp.abs(x - real_x0))
  return group_normalize(
      fake_x0 - real_x0,
      group_ids,
      jnp.reshape(magnitude, (x.shape[0],)),
      center=center,
      eps=eps,
      axis_name=axis_name,
  )


def distillation_dpo_loss(
    winner: Float[Array, "b *s"],
    loser: Float[Array, "b *s"],
    winner_teacher_epsilon: Float[Array, "b *s"],
    winner_fake_epsilon: Float[Array, "b *s"],
    loser_teacher_epsilon: Float[Array, "b *s"],
    loser_fake_epsilon: Float[Array, "b *s"],
    *,
    loser_weight: Number = 1.0,
    elements: Elements = "mean",
) -> Float[Array, "b ..."]:
  """Score distillation with a preference: towards the winner, off the loser.

  sg(winner_teacher - winner_fake) * winner
    - loser_weight * sg(loser_teacher - loser_fake) * loser,
  all four noise estimates at samples noised with ONE time and ONE noise.
  Descending moves the winner along teacher minus fake score, the loser against
  it. Only the two samples have a gradient. The second term is unbounded below:
  clip the gradient, or lower `loser_weight`.

  Args:
    winner: the preferred sample of a pair, with its gradient. Shape [b, *s].
    loser: the other one. Shape [b, *s].
    winner_teacher_epsilon: the teacher's noise estimate at the noised winner.
      Shape [b, *s].
    winner_fake_epsilon: that of the assistant which follows the winners.
    loser_teacher_epsilon: the teacher's at the noised loser.
    loser_fake_epsilon: that of the assistant which follows the losers.
    loser_weight: factor of the second term; at least 0, 0 is plain score
      distillation.
    elements: over the elements of a row, "mean", "sum" or "none".

  Returns:
    The loss, shape [b] ([b, *s] with elements="none"), at least float32; its
    value means nothing, its gradient does.

  Raises:
    ValueError: shapes that differ, an empty batch, negative `loser_weight`,
      unknown `elements`.
    TypeError: arrays that are not floating.

  References:
    Distillation-DPO, 2025, arXiv:2504.11447. Departure from the released code,
    whose factor is the noise added (noised minus clean sample), which does not
    depend on the generator: its gradient is identically 0. Ours is the sample,
    as intended.
  """
  fn = "distillation_dpo_loss"
  _checks.in_range(fn, "loser_weight", loser_weight, 0.0)
  _checks.one_of(fn, "elements", elements, _ELEMENTS)
  winner, loser, w_teacher, w_fake, l_teacher, l_fake = _arrays(
      fn,
      winner=winner,
      loser=loser,
      winner_teacher_epsilon=winner_teacher_epsilon,
      winner_fake_epsilon=winner_fake_epsilon,
      loser_teacher_epsilon=loser_teacher_epsilon,
      loser_fake_epsilon=loser_fake_epsilon,
  )
  pull = jax.lax.stop_gradient(w_teacher - w_fake) * winner
  push = jax.lax.stop_gradient(l_teacher - l_fake) * loser
  return _reduce(pull - loser_weight * push, elements)


def rank_pair(
    a: Float[Array, "b *s"],
    b: Float[Array, "b *s"],
    cost_a: Float[Array, "b"],
    cost_b: Float[Array, "b"],
) -> tuple[Float[Array, "b *s"], Float[Array, "b *s"]]:
  """(winner, loser) of each row's pair: the lower cost wins, a tie goes to a.

  The choice carries no gradient; the samples keep theirs.

  Args:
    a: one sample of each pair. Shape [b, *s].
    b: the other. Shape [b, *s].
    cost_a: what `a` costs under the preference, lower is better. Shape [b].
    cost_b: what `b` costs. Shape [b].

  Returns:
    (winner, loser), each of shape [b, *s], at least float32.

  Raises:
    ValueError: shapes that do not fit, an empty batch.
    TypeError: arrays that are not floating.

  References:
    Distillation-DPO, 2025, arXiv:2504.11447.
  """
  fn = "rank_pair"
  a, b = _arrays(fn, a=a, b=b)
  _checks.per_row(fn, "a", a, cost_a=cost_a, cost_b=cost_b)
  wins = _checks.expand_like(jnp.less_equal(cost_a, cost_b), a)
  return jnp.where(wins, a, b), jnp.where(wins, b, a)
