"""Layers that the networks of the zoo share."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from distilljax import _checks, kernels


def conv2d(x, kernel, *, stride: int = 1, implementation: str = "native"):
  """Convolution with padding so that the output is ceil(input / stride).

  "native" is `jax.lax.conv_general_dilated`. "dot" gathers the window of every
  output and multiplies once: inside a scan on CPU, where the compiler's
  convolution falls off its fast path, it is 10-15 times faster; elsewhere a
  whole network is slower with it and takes three times as long to compile.

  Args:
    x: maps. Shape [b, h, w, c].
    kernel: weights, odd sizes. Shape [kh, kw, c, o].
    stride: step of the window in both directions.
    implementation: "native" or "dot".

  Returns:
    Maps. Shape [b, ceil(h / stride), ceil(w / stride), o].
  """
  _checks.one_of("conv2d", "implementation", implementation, ("native", "dot"))
  kh, kw, c, o = kernel.shape
  pad = ((kh // 2, kh // 2), (kw // 2, kw // 2))
  if implementation == "native":
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pad,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
  b, h, w, _ = x.shape
  rows, columns = -(-h // stride), -(-w // stride)
  x = jax.lax.optimization_barrier(x)
  x = jnp.pad(x, ((0, 0), *pad, (0, 0)))
  windows = [
      x[:, i : i + h : stride, j : j + w : stride]
      for i in range(kh)
      for j in range(kw)
  ]
  flat = jnp.concatenate(windows, axis=-1).reshape(-1, kh * kw * c)
  out = flat @ kernel.reshape(kh * kw * c, o)
  return out.reshape(b, rows, columns, o)


def cut_rows(x, *, sequence: int | None = None):
  """Keeps the rows of `x` cut over the devices of a train step, else nothing.

  Between a matrix and rows that are cut over the same devices the compiler may
  move either; moving the rows makes every device compute all of them. Blocks
  say with this that it is the matrix that is to be gathered.

  Args:
    x: array with the batch first.
    sequence: axis of the tokens, None where there is none.

  Returns:
    x, its rows cut over the mesh axes `data` and `fsdp` where there are such
    (`train.make_step` puts them in context) and they divide the rows; likewise
    its tokens over `context`.
  """
  rows = _dividing(x.shape[0], "data", "fsdp")
  cut = [rows or PartitionSpec.UNCONSTRAINED]
  if sequence is not None:
    context = _dividing(x.shape[sequence], "context")
    cut += [None] * (sequence - 1) + [context] if context else []
  if not rows and len(cut) == 1:
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*cut))


def _automatic(*names):
  """{axis: devices} of these mesh axes over which the compiler cuts arrays."""
  mesh = jax.sharding.get_abstract_mesh()
  kinds = dict(zip(mesh.axis_names, mesh.axis_types))
  automatic = jax.sharding.AxisType.Auto
  return {
      name: mesh.shape[name] for name in names
      if kinds.get(name) == automatic and mesh.shape[name] > 1
  }  # fmt: skip


def _dividing(size, *names):
  """These mesh axes together, none of them where they do not divide `size`."""
  found = _automatic(*names)
  return () if size % math.prod(found.values()) else tuple(found)


def zigzag(name: str, argument: str, length: int):
  """Positions of causal tokens in the order in which devices wait for none.

  Args:
    name: of the network, for messages.
    argument: name of the tokens, for messages.
    length: number of tokens.

  Returns:
    `kernels.zigzag_positions` over the mesh axis `context`, int32 [length];
    None where no such axis cuts the tokens.
  """
  parts = _automatic("context").get("context")
  if parts is None:
    return None
  if length % (2 * parts):
    nearest = _checks.nearest_multiple(length, 2 * parts)
    _checks.fail(
        name, argument,
        f"of a length divisible by 2 x the {parts} devices of mesh axis"
        " 'context'", f"{length}; nearest: {nearest}",
    )  # fmt: skip
  return kernels.zigzag_positions(length, parts)


def unzigzag(x):
  """Tokens [b, n, d] in the order of `zigzag`, in their own again."""
  rows = _dividing(x.shape[0], "data", "fsdp")
  place = PartitionSpec(rows or None, "context")
  return jax.shard_map(
      lambda x: kernels.from_zigzag(x, axis_name="context"),
      in_specs=place,
      out_specs=place,
      axis_names={*rows, "context"},
  )(x)


def attention(q, k, v, **options):
  """`kernels.sharded_attention` over the mesh of a train step.

  Args:
    q: queries. Shape [b, n, h, d].
    k: keys. Shape [b, m, h_kv, d].
    v: values. Shape [b, m, h_kv, e].
    **options: of `kernels.sharded_attention`. Causal tokens are expected in the
      order of `zigzag`.

  Returns:
    As `kernels.attention`; rows and heads are whole where the mesh does not
    divide them, tokens that it does not divide are an error.
  """
  heads = _dividing(math.gcd(q.shape[2], k.shape[2]), "tensor")
  return kernels.sharded_attention(
      q, k, v,
      batch_axes=_dividing(q.shape[0], "data", "fsdp"),
      head_axis=heads[0] if heads else None,
      order="zigzag",
      **options,
  )  # fmt: skip


# What the backward pass of a block finds of its forward pass.
REMAT = {
    "none": "everything",
    "dots": "the results of its matrix products",
    "block": "its inputs",
}


def rematerialize(fn, remat: str, *, loop: bool = False):
  """`fn` whose activations are computed again in the backward pass.

  Args:
    fn: a block: a function of arrays.
    remat: "none" keeps every activation; "dots" the results of products with
      parameters; "block" the arguments of `fn` only, at one more forward pass.
    loop: whether `fn` is the body of a scan, where the compiler cannot undo the
      second forward pass and need not be kept from it.

  Returns:
    A function with the same values and derivatives.
  """
  _checks.one_of("rematerialize", "remat", remat, REMAT)
  if remat == "none":
    return fn
  policies = jax.checkpoint_policies
  return jax.checkpoint(
      fn,
      prevent_cse=not loop,
      policy=policies.dots_with_no_batch_dims_saveable
      if remat == "dots"
      else policies.nothing_saveable,
  )


def stack(blocks):
  """Equal modules as one, whose parameters have a leading axis of layers."""
  parts = [nnx.split(block, nnx.Param, ...) for block in blocks]
  graphdef, _, others = parts[0]
  params = jax.tree.map(lambda *x: jnp.stack(x), *(p for _, p, _ in parts))
  return nnx.merge(graphdef, params, others)


def layer(blocks, i: int):
  """Module number `i` of a stack made by `stack`."""
  graphdef, params, others = nnx.split(blocks, nnx.Param, ...)
  return nnx.merge(graphdef, jax.tree.map(lambda x: x[i], params), others)


def scan(blocks, call, carry, *, remat: str = "none"):
  """Runs a stack of modules one after the other, as one compiled loop.

  Args:
    blocks: made by `stack`.
    call: (block, number of the layer, carry) -> carry.
    carry: arrays that go from layer to layer.
    remat: see `rematerialize`.

  Returns:
    The carry after the last layer.
  """
  graphdef, params, others = nnx.split(blocks, nnx.Param, ...)

  def step(params, i, carry):
    return call(nnx.merge(graphdef, params, others), i, carry)

  step = rematerialize(step, remat, loop=True)
  depth = jax.tree.leaves(params)[0].shape[0]
  numbers = jnp.arange(depth, dtype=jnp.int32)
  return jax.lax.scan(
      lambda carry, layer: (step(layer[0], layer[1], carry), None),
      carry,
      (params, numbers),
  )[0]


class Draws:
  """Normal numbers cut from one long vector, in the place of `nnx.Rngs`.

  Drawing every parameter with a key of its own compiles a generator a shape
  (5-15 s for the UNet); one draw for all of them compiles one.

  Args:
    values: the numbers, shape [n], or None to count how many are needed.
  """

  def __init__(self, values=None):
    self.values = values
    self.used = 0

  def take(self, shape):
    """The next numbers, in the given shape."""
    start, self.used = self.used, self.used + math.prod(shape)
    if self.values is None:
      return jnp.zeros(shape, jnp.float32)
    return self.values[start : self.used].reshape(shape)


def normal(rngs: Draws | nnx.Rngs, shape: tuple[int, ...], std: float):
  """A `Param` of independent normal numbers, or of zeros for std 0."""
  if std == 0:
    return nnx.Param(jnp.zeros(shape, jnp.float32))
  if isinstance(rngs, Draws):
    return nnx.Param(std * rngs.take(shape))
  return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class Linear(nnx.Module):
  """x W + b over the last axis; W normal with variance 1 / inputs, or zero."""

  def __init__(self, inputs: int, outputs: int, *, zero: bool = False, rngs):
    std = 0.0 if zero else inputs**-0.5
    self.kernel = normal(rngs, (inputs, outputs), std)
    self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))

  def __call__(self, x):
    """[..., inputs] to [..., outputs]."""
    bias = self.bias[...]
    return x @ self.kernel[...] + bias.reshape((1,) * (x.ndim - 1) + (-1,))


class Conv(nnx.Module):
  """3x3 convolution with bias, see `conv2d`; W as in `Linear`."""

  def __init__(
      self,
      inputs: int,
      outputs: int,
      *,
      stride: int = 1,
      zero: bool = False,
      implementation: str,
      rngs,
  ):
    std = 0.0 if zero else (9 * inputs) ** -0.5
    self.kernel = normal(rngs, (3, 3, inputs, outputs), std)
    self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))
    self.stride = stride
    self.implementation = implementation

  def __call__(self, x):
    """[b, h, w, inputs] to [b, h', w', outputs]."""
    out = conv2d(
        x,
        self.kernel[...],
        stride=self.stride,
        implementation=self.implementation,
    )
    return out + self.bias[...].reshape(1, 1, 1, -1)


class Embed(nnx.Module):
  """A table of vectors, normal with standard deviation .02."""

  def __init__(self, rows: int, width: int, *, rngs):
    self.table = normal(rngs, (rows, width), 0.02)

  def __call__(self, ids):
    """[*b] to [*b, width]."""
    # An id outside the table gives NaN, not its neighbour's vector.
    return jnp.take(self.table[...], ids, axis=0, mode="fill")


def normalize(x, *, groups: int, eps: float = 1e-5):
  """Group norm without an affine part, statistics in at least float32.

  Args:
    x: maps [b, h, w, c] or tokens [b, n, c].
    groups: number of groups of channels, a divisor of c. Mean and variance are
      taken over the positions and a group's channels; for tokens [b, n, c] over
      the channels alone.
    eps: added to the variance.

  Returns:
    The normalised array in the dtype of x.
  """
  full = _checks.at_least_float32(x)
  if x.ndim == 4:
    b, h, w, c = x.shape
    full = full.reshape(b, h, w, groups, c // groups)
    axes = (1, 2, 4)
  else:
    full = full.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    axes = (full.ndim - 1,)
  mean = jnp.mean(full, axis=axes, keepdims=True)
  centered = full - mean
  variance = jnp.mean(jnp.square(centered), axis=axes, keepdims=True)
  out = centered * jax.lax.rsqrt(variance + eps)
  return out.reshape(x.shape).astype(x.dtype)


def modulate(x, scale, shift):
  """x (1 + scale) + shift with [b, c] vectors over the positions of x."""
  middle = (1,) * (x.ndim - 2)
  scale = scale.reshape(scale.shape[0], *middle, scale.shape[-1])
  shift = shift.reshape(shift.shape[0], *middle, shift.shape[-1])
  return x * (1 + scale) + shift


def patchify(name: str, x, patch: int):
  """[b, h, w, c] to [b, h/p, w/p, p p c]."""
  b, h, w, c = x.shape
  if h % patch or w % patch:
    _checks.fail(
        name, "x", f"[b, h, w, c] with h and w multiples of patch={patch}",
        list(x.shape),
    )
  x = x.reshape(b, h // patch, patch, w // patch, patch, c)
  return x.transpose(0, 1, 3, 2, 4, 5).reshape(
      b, h // patch, w // patch, patch * patch * c
  )


def unpatchify(x, patch: int):
  """The inverse of `patchify` (a pixel shuffle)."""
  b, h, w, c = x.shape
  c = c // (patch * patch)
  x = x.reshape(b, h, w, patch, patch, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(b, h * patch, w * patch, c)


def position_embedding(height: int, width: int, dim: int):
  """Fixed sines and cosines of the row and the column, [h w, dim] float32."""
  quarter = dim // 4
  frequencies = jnp.exp(
      -math.log(1e2) * jnp.arange(quarter, dtype=jnp.float32) / quarter
  )

  def one(n):
    angles = jnp.arange(n, dtype=jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)

  rows = jnp.repeat(one(height), width, axis=0)
  columns = jnp.tile(one(width), (height, 1))
  return jnp.concatenate([rows, columns], axis=-1)
