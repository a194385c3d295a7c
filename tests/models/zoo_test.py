"""The zoo against NumPy forwards written from its docstrings, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import debug, models
from distilljax.models import layers, time_embedding
from tests.helpers import exact_jit, one_line_error

# Small enough to compile in seconds; 6 x 10 gives maps of 3 x 5 and 2 x 3, so
# both directions meet an odd size, and height is not width.
_SMALL = {
    "mlp": dict(dim=3, width=8, depth=3),
    "unet": dict(channels=8, condition=6, in_channels=2),
    "dit": dict(width=8, heads=2, depth=3, in_channels=2),
}
_SHAPE = {"mlp": (3,), "unet": (6, 10, 2), "dit": (6, 10, 2)}
_KINDS = tuple(_SMALL)


@functools.cache
def _small(kind, **hyper):
  return models.make(kind, jax.random.key(3), **_SMALL[kind], **hyper)


def _perturbed(params, dtype=np.float64):
  """Fresh numbers everywhere: nothing may hide behind a zero."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda a: jnp.asarray(
          np.asarray(a) + 0.3 * rng.normal(size=a.shape), dtype
      ),
      params,
  )


def _inputs(kind, b=4):
  rng = np.random.default_rng(1)
  x = rng.normal(size=(b, *_SHAPE[kind]))
  t = np.linspace(0.05, 0.95, b)
  r = t * np.linspace(0.9, 0.1, b)
  return x, t, r, np.asarray([0, 2, 3, 1], np.int32)[:b]


# NumPy forwards.


def _silu(a):
  return a / (1 + np.exp(-a))


def _linear(p, x):
  return x @ p["kernel"] + p["bias"]


def _features(t, dim, top=10.0):
  w = top * np.arange(1, dim // 2 + 1) / (dim // 2)
  a = t[:, None] * w
  return np.concatenate([np.cos(a), np.sin(a)], -1)


def _condition(p, t, r, label, width):
  c = _linear(p["time_out"], _silu(_linear(p["time_in"], _features(t, width))))
  c = c + p["label"]["table"][label]
  second = _silu(_linear(p["second_in"], _features(t - r, width)))
  return c + _linear(p["second_out"], second)


def _mlp_numpy(p, x, t, r, label):
  c = _condition(p["condition"], t, r, label, 8)
  h = np.concatenate([x, c], -1)
  for i in range(3):
    h = _silu(_linear(p[f"hidden_{i}"], h))
  return _linear(p["head"], h), h


def _group_norm(x, groups):
  b, *s, c = x.shape
  g = x.reshape(b, -1, groups, c // groups)
  mean = g.mean((1, 3), keepdims=True)
  return ((g - mean) / np.sqrt(g.var((1, 3), keepdims=True) + 1e-5)).reshape(
      x.shape
  )


def _layer_norm(x):
  mean = x.mean(-1, keepdims=True)
  return (x - mean) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def _conv(p, x, stride=1):
  """Loops over the outputs; the window is centred on (stride y, stride x)."""
  b, h, w, _ = x.shape
  rows, columns = -(-h // stride), -(-w // stride)
  out = np.zeros((b, rows, columns, p["kernel"].shape[-1]))
  for y in range(rows):
    for z in range(columns):
      for i in range(3):
        for j in range(3):
          u, v = y * stride + i - 1, z * stride + j - 1
          if 0 <= u < h and 0 <= v < w:
            out[:, y, z] += x[:, u, v] @ p["kernel"][i, j]
  return out + p["bias"]


def _patches(x, p=2):
  b, h, w, c = x.shape
  out = np.zeros((b, h // p, w // p, p * p * c))
  for y in range(h):
    for z in range(w):
      start = ((y % p) * p + z % p) * c
      out[:, y // p, z // p, start : start + c] = x[:, y, z]
  return out


def _pixels(x, c, p=2):
  b, h, w, _ = x.shape
  out = np.zeros((b, h * p, w * p, c))
  for y in range(h * p):
    for z in range(w * p):
      start = ((y % p) * p + z % p) * c
      out[:, y, z] = x[:, y // p, z // p, start : start + c]
  return out


def _unet_numpy(p, x, t, r, label):
  c = _silu(_condition(p["condition"], t, r, label, 6))

  def block(p, x):
    h = _conv(p["conv_in"], _silu(_group_norm(x, 8)))
    m = _linear(p["modulation"], c)[:, None, None]
    scale, shift = np.split(m, 2, -1)
    h = _conv(p["conv_out"], _silu(_group_norm(h, 8) * (1 + scale) + shift))
    return (_linear(p["skip"], x) if "skip" in p else x) + h

  def join(h, skips, i):
    for j in range(len(skips)):
      h = block(p[f"up_{i}_{j}"], np.concatenate([h, skips[-1 - j]], -1))
    return h

  blocks = 2 if "down_0_1" in p else 1
  h = _linear(p["stem"], _patches(x))
  first, second = [], []
  for j in range(blocks):
    h = block(p[f"down_0_{j}"], h)
    first.append(h)
  h = _conv(p["downsample_0"], h, stride=2)
  for j in range(blocks):
    h = block(p[f"down_1_{j}"], h)
    second.append(h)
  bottom = h = block(p["bottom"], h)
  h = _linear(p["upsample_0"], join(h, second, 1))
  rows, columns = (np.arange(n) // 2 for n in first[0].shape[1:3])
  h = join(h[:, rows][:, :, columns], first, 0)
  h = _linear(p["head"], _silu(_group_norm(h, 8)))
  return _pixels(h, 2), bottom


def _positions(h, w, dim):
  q = dim // 4
  frequency = 100.0 ** (-np.arange(q) / q)
  out = np.zeros((h * w, dim))
  for y in range(h):
    for z in range(w):
      out[y * w + z] = np.concatenate([
          np.sin(y * frequency),
          np.cos(y * frequency),
          np.sin(z * frequency),
          np.cos(z * frequency),
      ])
  return out


def _dit_numpy(p, x, t, r, label):
  c = _silu(_condition(p["condition"], t, r, label, 8))
  h = _patches(x)
  b, rows, columns, _ = h.shape
  h = _linear(p["stem"], h.reshape(b, rows * columns, -1))
  h = h + _positions(rows, columns, 8)
  for i in range(3):
    q = p[f"block_{i}"]
    m = np.split(_linear(q["modulation"], c)[:, None], 6, -1)
    a = _linear(q["qkv"], _layer_norm(h) * (1 + m[0]) + m[1])
    out = np.zeros_like(h)
    for head in range(2):
      query, k, v = (
          a[:, :, 8 * j + 4 * head : 8 * j + 4 * head + 4] for j in range(3)
      )
      s = np.exp(query @ k.transpose(0, 2, 1) / 2)
      out[:, :, 4 * head : 4 * head + 4] = s / s.sum(-1, keepdims=True) @ v
    h = h + m[2] * _linear(q["out"], out)
    a = _linear(q["mlp_in"], _layer_norm(h) * (1 + m[3]) + m[4])
    gelu = a / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
    h = h + m[5] * _linear(q["mlp_out"], gelu)
    if i == 1:
      middle = h
  scale, shift = np.split(_linear(p["modulation"], c)[:, None], 2, -1)
  h = _linear(p["head"], _layer_norm(h) * (1 + scale) + shift)
  return _pixels(h.reshape(b, rows, columns, -1), 2), middle


_NUMPY = {"mlp": _mlp_numpy, "unet": _unet_numpy, "dit": _dit_numpy}


@pytest.mark.parametrize("kind", _KINDS)
def test_forward_is_the_docstring_in_numpy(kind, x64, strict):
  more = {"blocks": 2} if kind == "unet" else {}
  network = _small(kind, num_classes=3, second_time=True, **more)
  params = _perturbed(network.params)
  x, t, r, label = _inputs(kind)
  fn = jax.jit(
      lambda p, x, t, r, label: network.apply_fn(
          p, x, t, label=label, r=r, features=True
      )
  )
  out, features = fn(params, x, t, r, label)
  p = jax.tree.map(np.asarray, params)
  want, want_features = _NUMPY[kind](p, x, t, r, label)
  assert out.dtype == features.dtype == jnp.float64
  # position_embedding is float32 by design: 1e-7 of its value stays.
  rtol = 1e-6 if kind == "dit" else 1e-10
  np.testing.assert_allclose(out, want, rtol=rtol, atol=rtol)
  np.testing.assert_allclose(features, want_features, rtol=rtol, atol=rtol)
  assert models.feature_dim(network, _SHAPE[kind]) == want_features.shape[-1]


@pytest.mark.parametrize("kind", _KINDS)
def test_missing_label_is_the_null_class_and_missing_r_is_t(kind):
  network = _small(kind, num_classes=3, second_time=True)
  params = _perturbed(network.params, np.float32)
  x, t, _, _ = _inputs(kind)
  x, t = jnp.asarray(x, jnp.float32), jnp.asarray(t, jnp.float32)

  fn = jax.jit(network.apply_fn)
  null = jnp.full(4, 3)
  plain = fn(params, x, t)
  other_r = fn(params, x, t, label=null, r=jnp.zeros(4))
  other_label = fn(params, x, t, label=null - 1, r=t)
  null = fn(params, x, t, label=null, r=t)
  np.testing.assert_array_equal(plain, null)
  assert float(jnp.max(jnp.abs(plain - other_r))) > 1e-3
  assert float(jnp.max(jnp.abs(plain - other_label))) > 1e-3


@pytest.mark.parametrize("kind", _KINDS)
def test_student_and_critic_start_as_the_teacher_bit_for_bit(kind, key):
  teacher = _small(kind, num_classes=3)
  params = _perturbed(teacher.params, np.float32)
  student = _small(kind, num_classes=3, second_time=True)
  width = models.feature_dim(teacher, _SHAPE[kind])
  critic = models.with_head(
      teacher, models.make("head", key, features=width, width=4)
  )
  x, t, r, label = _inputs(kind)
  x, t, r = (jnp.asarray(a, jnp.float32) for a in (x, t, r))
  want = exact_jit(teacher.apply_fn)(params, x, t, label=label)
  assert float(jnp.std(want)) > 0.1
  start = models.transfer(params, student.params)
  fn = exact_jit(student.apply_fn)
  for second in (r, t, jnp.zeros(4), jnp.ones(4)):
    np.testing.assert_array_equal(fn(start, x, t, label=label, r=second), want)
  start = models.transfer(params, critic.params)
  fn = exact_jit(critic.apply_fn, static_argnames="logits")
  out, logits = fn(start, x, t, label=label, logits=True)
  np.testing.assert_array_equal(out, want)
  assert logits.shape == (4,) and float(jnp.std(logits)) > 0


def test_second_time_is_learnt_though_it_starts_at_zero():
  network = _small("mlp", second_time=True)
  params = _perturbed(network.params, np.float32)
  second = network.params["condition"]["second_out"]
  params["condition"]["second_out"] = second
  assert not any(np.asarray(a).any() for a in second.values())
  x, t, r, _ = (jnp.asarray(a) for a in _inputs("mlp"))
  grad = jax.jit(
      jax.grad(lambda p: jnp.sum(network.apply_fn(p, x, t, r=r) ** 2))
  )(params)
  assert np.abs(grad["condition"]["second_out"]["kernel"]).max() > 1e-4


@pytest.mark.parametrize("kind", _KINDS)
def test_jvp_in_x_t_and_r_is_the_slope(kind, x64):
  network = _small(kind, num_classes=3, second_time=True)
  params = _perturbed(network.params)
  x, t, r, _ = (jnp.asarray(a) for a in _inputs(kind))
  v = jnp.sin(x * 7)
  dt, dr = jnp.linspace(0.5, 1.0, 4), jnp.linspace(-1.0, 0.3, 4)

  jitted = jax.jit(lambda params, x, t, r: network.apply_fn(params, x, t, r=r))
  fn = lambda x, t, r: jitted(params, x, t, r)
  _, tangent = jax.jvp(fn, (x, t, r), (v, dt, dr))
  h = 1e-6
  ahead = fn(x + h * v, t + h * dt, r + h * dr)
  behind = fn(x - h * v, t - h * dt, r - h * dr)
  slope = (ahead - behind) / (2 * h)
  np.testing.assert_allclose(tangent, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", _KINDS)
def test_low_precision_parameters_compute_low_and_return_float32(kind, strict):
  network = _small(kind, num_classes=3, second_time=True)
  params = _perturbed(network.params, jnp.bfloat16)
  x, t, r, label = _inputs(kind)

  def fn(params, x, t, r):
    return network.apply_fn(params, x, t, label=label, r=r, features=True)

  arrays = [jnp.asarray(a, jnp.float32) for a in (x, t, r)]
  out, features = jax.jit(fn)(params, *arrays)
  assert out.dtype == features.dtype == jnp.float32
  products = _products(fn, params, *arrays)
  assert len(products) > 5
  assert {str(e.outvars[0].aval.dtype) for e in products} == {"bfloat16"}
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  want, _ = _NUMPY[kind](p, x, t, r, label)
  # bfloat16 keeps 8 bits; a few dozen roundings stay within 10 % of the scale.
  error = float(np.sqrt(np.mean((out - want) ** 2) / np.mean(want**2)))
  assert error < 0.1


def _products(fn, *args):
  return [
      eqn
      for eqn in jax.make_jaxpr(fn)(*args).eqns
      if eqn.primitive.name in ("dot_general", "conv_general_dilated")
  ]


def test_what_must_start_at_zero_does(key):
  for kind in ("unet", "dit"):
    head = _small(kind, num_classes=3).params["head"]
    assert not any(np.asarray(a).any() for a in head.values())
  network = _small("unet", num_classes=3)
  for name in ("down_0_0", "bottom", "up_1_0"):
    assert not np.asarray(network.params[name]["conv_out"]["kernel"]).any()
  network = _small("dit", num_classes=3)
  for name in ("block_0", "block_2"):
    assert not np.asarray(network.params[name]["modulation"]["kernel"]).any()
  assert not np.asarray(network.params["modulation"]["kernel"]).any()
  network = models.make("mlp", key, zero_head=True)
  assert not np.asarray(network.params["head"]["kernel"]).any()
  assert np.asarray(models.make("mlp", key).params["head"]["kernel"]).any()


def test_initial_values_have_variance_one_over_fan_in(key):
  network = models.make("unet", key, channels=32, num_classes=10)
  p = network.params
  for kernel, fan_in in (
      (p["down_1_0"]["conv_in"]["kernel"], 9 * 64),
      (p["up_0_0"]["conv_in"]["kernel"], 9 * 64),
      (p["down_0_0"]["modulation"]["kernel"], 128),
      (p["upsample_0"]["kernel"], 64),
  ):
    # The mean of n squares of unit normals has standard deviation sqrt(2 / n).
    n = kernel.size
    ratio = float(jnp.mean(kernel**2)) * fan_in
    assert abs(ratio - 1) < 5 * np.sqrt(2 / n)
    assert abs(float(jnp.mean(kernel))) < 5 / np.sqrt(n * fan_in)
  table = p["condition"]["label"]["table"]
  ratio = float(jnp.mean(table**2)) / 0.02**2
  assert table.shape == (11, 128)
  assert abs(ratio - 1) < 5 * np.sqrt(2 / table.size)
  biases = [
      a for path, a in jax.tree_util.tree_leaves_with_path(p)
      if "bias" in str(path[-1])
  ]
  assert not any(np.asarray(b).any() for b in biases)
  # No two parameters share their numbers.
  firsts = [
      float(a.ravel()[0]) for a in jax.tree.leaves(p) if np.asarray(a).any()
  ]
  assert len(set(firsts)) == len(firsts)


def test_make_is_a_function_of_its_key_and_may_be_traced(key):
  one = _small("mlp").params
  two = jax.jit(lambda k: models.make("mlp", k, **_SMALL["mlp"]).params)(
      jax.random.key(3)
  )
  other = models.make("mlp", key, **_SMALL["mlp"]).params
  for a, b, c in zip(*(jax.tree.leaves(p) for p in (one, two, other))):
    np.testing.assert_array_equal(a, b)
    assert not np.asarray(a).any() or not np.array_equal(a, c)
  assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(one))


def test_modules_can_be_built_with_nnx_rngs(key):
  from flax import nnx

  from distilljax.models import mlp

  network = models.from_nnx(mlp.MLP(width=64, depth=1, rngs=nnx.Rngs(0)))
  made = models.make("mlp", key, width=64, depth=1)
  assert jax.tree.structure(network.params) == jax.tree.structure(made.params)
  kernel = network.params["hidden_0"]["kernel"]
  ratio = float(jnp.mean(kernel**2)) * (2 + 64)
  assert abs(ratio - 1) < 5 * np.sqrt(2 / kernel.size)


def test_count_params_of_an_mlp_is_the_sum_of_its_layers(key):
  network = models.make("mlp", key, dim=2, width=8, depth=2)
  layer = lambda inputs, outputs: (inputs + 1) * outputs
  want = 2 * layer(8, 8) + layer(2 + 8, 8) + layer(8, 8) + layer(8, 2)
  assert models.count_params(network.params) == want


def test_make_reads_lists_as_tuples_and_names_the_nearest(key):
  network = models.make(
      "unet", key, channels=8, blocks=1, condition=4, multipliers=[1, 1, 2]
  )
  assert "downsample_1" in network.params
  with one_line_error("make: kind must be one of .*; did you mean 'unet'"):
    models.make("unett", key)
  with one_line_error(
      r"make\('unet'\): hyper-parameter must be one of .*; did you mean"
      " 'channels'"
  ):
    models.make("unet", key, chanels=3)
  with one_line_error(r"make\('head'\): features must be given, got nothing"):
    models.make("head", key)
  with one_line_error("hyper-parameter must be one of .*got 'rngs'"):
    models.make("mlp", key, rngs=0)


def test_impossible_hyper_parameters_are_one_line(key):
  with one_line_error("UNet: channels must be a multiple of 8, got 12"):
    models.make("unet", key, channels=12)
  with one_line_error("UNet: conv must be one of 'native', 'dot', got 'fast'"):
    models.make("unet", key, conv="fast")
  with one_line_error("DiT: width must be a multiple of 4 and of heads=3"):
    models.make("dit", key, width=64, heads=3)
  with one_line_error("DiT: width must be a multiple of 4 and of heads=2"):
    models.make("dit", key, width=6, heads=2)
  with one_line_error("MLP: depth must be >= 1, got 0"):
    models.make("mlp", key, depth=0)
  for depth in (1, 2):
    params = models.make("mlp", key, width=4, depth=depth).params
    assert (f"hidden_{depth}" in params, f"hidden_{depth - 1}" in params) == (
        False,
        True,
    )


def test_bad_inputs_are_one_line(key):
  plain = _small("unet")
  call = plain.apply_fn
  x, t = jnp.zeros((2, 6, 10, 2)), jnp.zeros(2)
  for inputs, message in (
      ((x[0], t), r"UNet: x must be \[b, h, w, c\] \(rank 4\)"),
      ((x[..., :1], t), r"UNet: x must be \[b, h, w, 2\], got \[2, 6, 10, 1\]"),
      ((x[:, :5], t), "UNet: x must be .* multiples of patch=2, got"),
      ((x[:, :, :5], t), "UNet: x must be .* multiples of patch=2, got"),
      ((x, t[:1]), r"UNet: t must be \[b\]=\[2\] like x, got \[1\]"),
  ):
    with one_line_error(message):
      call(plain.params, *inputs)
  with one_line_error(r"UNet: label must be None \(built with num_classes=0\)"):
    call(plain.params, x, t, label=jnp.zeros(2, jnp.int32))
  with one_line_error(r"UNet: r must be None \(built with second_time=False\)"):
    call(plain.params, x, t, r=t)
  dit = _small("dit", num_classes=3, second_time=True)
  with one_line_error(r"DiT: x must be \[b, h, w, 2\]"):
    dit.apply_fn(dit.params, x[..., :1], t)
  with one_line_error(r"DiT: x must be \[b, h, w, c\] \(rank 4\)"):
    dit.apply_fn(dit.params, x[0], t)
  with one_line_error("DiT: label must be an integer array, got float32"):
    dit.apply_fn(dit.params, x, t, label=t)
  with one_line_error(r"DiT: label must be \[b\]=\[2\] like x"):
    dit.apply_fn(dit.params, x, t, label=jnp.zeros(3, jnp.int32))
  with one_line_error(r"DiT: r must be \[b\]=\[2\] like x"):
    dit.apply_fn(dit.params, x, t, r=jnp.zeros(3))
  mlp = _small("mlp", num_classes=3, second_time=True)
  point = jnp.zeros((2, 3))
  with one_line_error(r"MLP: x must be \[b, 3\], got \[2, 2\]"):
    mlp.apply_fn(mlp.params, point[:, :2], t)
  with one_line_error(r"MLP: x must be \[b, d\] \(rank 2\)"):
    mlp.apply_fn(mlp.params, point[0], t)
  with debug():
    mlp.apply_fn(mlp.params, point, t + 1, label=jnp.asarray([0, 3]), r=t)
    for arguments, message in (
        (dict(t=t + 1.5), r"MLP: t must be in \[0, 1\]"),
        (dict(t=t - 0.5), r"MLP: t must be in \[0, 1\]"),
        (dict(t=t, r=t + 1.5), r"MLP: r must be in \[0, 1\]"),
        (dict(t=t, r=t - 0.5), r"MLP: r must be in \[0, 1\]"),
        (dict(t=t, label=jnp.asarray([0, 4])), r"MLP: label must be in \[0, 3"),
        (dict(t=t, label=jnp.asarray([0, -1])), r"MLP: label must be in \[0, "),
    ):
      with one_line_error(message):
        mlp.apply_fn(mlp.params, point, **arguments)


def test_label_outside_the_table_is_nan_not_a_neighbour():
  network = _small("mlp", num_classes=3)
  out = network.apply_fn(
      network.params, jnp.zeros((2, 3)), jnp.zeros(2), label=jnp.asarray([4, 3])
  )
  assert np.isnan(np.asarray(out[0])).all()
  assert np.isfinite(np.asarray(out[1])).all()


# Layers.


@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("size", ((5, 8), (1, 2)))
def test_convolutions_agree_with_loops(stride, size, x64):
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, *size, 3)))
  kernel = jnp.asarray(rng.normal(size=(3, 3, 3, 4)))
  want = _conv(
      {"kernel": np.asarray(kernel), "bias": 0}, np.asarray(x), stride
  )
  weight = jnp.asarray(rng.normal(size=want.shape))
  gradients = []
  for implementation in ("native", "dot"):

    def fn(x, kernel, implementation=implementation):
      return layers.conv2d(
          x, kernel, stride=stride, implementation=implementation
      )

    @jax.jit
    def run(x, kernel, fn=fn):
      out = fn(x, kernel)
      _, tangent = jax.jvp(fn, (x, kernel), (x, jnp.zeros_like(kernel)))
      rows = jax.vmap(lambda x: fn(x[None], kernel)[0])(x)
      grad = jax.grad(lambda *a: jnp.sum(fn(*a) * weight), (0, 1))(x, kernel)
      return out, tangent, rows, grad

    out, tangent, rows, grad = run(x, kernel)
    np.testing.assert_allclose(out, want, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(tangent, want, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(rows, want, rtol=1e-10, atol=1e-12)
    gradients.append(grad)
  for a, b in zip(*gradients):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_unet_uses_the_convolution_it_is_told():
  x, t, _, _ = (jnp.asarray(a, jnp.float32) for a in _inputs("unet"))
  convolutions = []
  for conv in ("native", "dot"):
    network = _small("unet", conv=conv)
    found = _products(network.apply_fn, network.params, x, t)
    names = [e.primitive.name for e in found]
    convolutions.append(names.count("conv_general_dilated"))
  # Two a block (two levels down and up, one at the bottom), one between levels.
  assert convolutions == [2 * 5 + 1, 0]


def test_patches_and_pixels_are_inverse():
  x = np.random.default_rng(0).normal(size=(2, 6, 9, 2)).astype(np.float32)
  patches = layers.patchify("test", jnp.asarray(x), 3)
  np.testing.assert_array_equal(patches, _patches(x, 3).astype(np.float32))
  np.testing.assert_array_equal(layers.unpatchify(patches, 3), x)


def test_fourier_features_are_low_cosines_and_sines(x64):
  t = np.linspace(0, 1, 7)
  out = time_embedding.fourier_features(jnp.asarray(t), dim=8)
  np.testing.assert_allclose(out, _features(t, 8), rtol=1e-12, atol=1e-12)
  out = time_embedding.fourier_features(
      jnp.asarray(t), dim=4, max_frequency=3.0
  )
  np.testing.assert_allclose(out, _features(t, 4, 3.0), rtol=1e-12, atol=1e-12)
  # The slope in t, which a flow-map loss meets, is at most max_frequency.
  slope = jax.jacfwd(
      lambda t: time_embedding.fourier_features(t, dim=8)
  )(jnp.float64(0.3))
  assert float(jnp.max(jnp.abs(slope))) <= 10
  assert time_embedding.fourier_features(
      jnp.ones(2, jnp.bfloat16), dim=4
  ).dtype == jnp.float32


def test_fourier_features_refuse_impossible_options():
  for dim in (3, 0):
    with one_line_error(f"dim must be even and >= 2, got {dim}"):
      time_embedding.fourier_features(jnp.ones(2), dim=dim)
  with one_line_error(r"fourier_features: max_frequency must be in \(0, inf\)"):
    time_embedding.fourier_features(jnp.ones(2), dim=4, max_frequency=0.0)
  assert time_embedding.fourier_features(jnp.ones(2), dim=2).shape == (2, 2)
