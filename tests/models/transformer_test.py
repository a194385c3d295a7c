"""The decoder against a NumPy forward in float64, and its cache against it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import debug, models
from distilljax.models import transformer
from tests.helpers import one_line_error

V, D, HEADS, KV, HD, MLP, DEPTH = 11, 12, 4, 2, 6, 10, 2
_SMALL = dict(
    vocab_size=V,
    width=D,
    depth=DEPTH,
    heads=HEADS,
    kv_heads=KV,
    head_dim=HD,
    mlp_width=MLP,
    rope_base=100.0,
)
# Float32 rounding of logits of size 5 after two blocks.
_TOLERANCE = dict(rtol=0, atol=2e-5)


def _perturbed(params, dtype=np.float32):
  """Fresh numbers everywhere: no norm's weight may stay 1."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
      lambda a: jnp.asarray(a + 0.3 * rng.normal(size=a.shape), dtype), params
  )


@functools.cache
def _net(**hyper):
  net = models.make("transformer", jax.random.key(3), **{**_SMALL, **hyper})
  return models.Network(
      jax.jit(net.apply_fn, static_argnames=("cache", "last", "features")),
      _perturbed(net.params),
  )


def _cached(net):
  """apply_fn whose cache is traced, for decoding."""
  return jax.jit(
      lambda params, tokens, cache, **kw: net.apply_fn.__wrapped__(
          params, tokens, cache=cache, **kw
      ),
      static_argnames=("last",),
  )


def _tokens(b=3, l=7, seed=1):
  return np.random.default_rng(seed).integers(0, V, size=(b, l))


# NumPy, from the docstrings: one row, one head, one query at a time.


def _norm(x, weight, eps=1e-6):
  return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _rope(x, position, base):
  out = np.empty_like(x)
  half = len(x) // 2
  for i in range(half):
    a = position / base ** (2 * i / len(x))
    out[i] = x[i] * np.cos(a) - x[i + half] * np.sin(a)
    out[i + half] = x[i + half] * np.cos(a) + x[i] * np.sin(a)
  return out


def _numpy_row(p, tokens, *, base=100.0, heads=HEADS, kv=KV, hd=HD, qk=True):
  """(logits [l, v], hidden [l, d]) of one row without padding."""
  h = p["embed_tokens"]["weight"][tokens]
  for i in range(DEPTH):
    block = p["layers"][str(i)]
    attn, mlp = block["self_attn"], block["mlp"]
    x = _norm(h, block["input_layernorm"]["weight"])
    q, k, v = (
        (x @ attn[f"{n}_proj"]["kernel"]).reshape(len(tokens), -1, hd)
        for n in "qkv"
    )
    if qk:
      q = _norm(q, attn["q_norm"]["weight"])
      k = _norm(k, attn["k_norm"]["weight"])
    out = np.zeros((len(tokens), heads, hd))
    for t in range(len(tokens)):
      for n in range(heads):
        group = n // (heads // kv)
        scores = [
            _rope(q[t, n], t, base) @ _rope(k[s, group], s, base) / hd**0.5
            for s in range(t + 1)
        ]
        w = np.exp(scores - np.max(scores))
        out[t, n] = (w / w.sum()) @ v[: t + 1, group]
    h = h + out.reshape(len(tokens), -1) @ attn["o_proj"]["kernel"]
    x = _norm(h, block["post_attention_layernorm"]["weight"])
    gate = x @ mlp["gate_proj"]["kernel"]
    up = x @ mlp["up_proj"]["kernel"]
    h = h + (gate / (1 + np.exp(-gate)) * up) @ mlp["down_proj"]["kernel"]
  h = _norm(h, p["norm"]["weight"])
  head = p["lm_head"]["kernel"] if "lm_head" in p else p["embed_tokens"][
      "weight"
  ].T
  return h @ head, h


def _float64(params):
  return jax.tree.map(lambda a: np.asarray(a, np.float64), params)


@pytest.mark.parametrize(
    "hyper",
    [
        {},
        {"tied": False},
        {"kv_heads": None, "qk_norm": False},
        {"kv_heads": 1, "norm_eps": 1e-6},
    ],
    ids=["qwen3", "untied", "plain", "multi_query"],
)
def test_forward_is_the_formula(hyper):
  net = _net(**hyper)
  tokens = _tokens()
  logits, hidden = net.apply_fn(net.params, tokens, features=True)
  kv = hyper.get("kv_heads", KV) or HEADS
  for row in range(len(tokens)):
    want, want_hidden = _numpy_row(
        _float64(net.params), tokens[row], kv=kv, qk=hyper.get("qk_norm", True)
    )
    np.testing.assert_allclose(logits[row], want, **_TOLERANCE)
    np.testing.assert_allclose(hidden[row], want_hidden, **_TOLERANCE)
  np.testing.assert_allclose(
      hidden @ models.output_head(net.params), logits, **_TOLERANCE
  )
  head = net.apply_fn.linear_head(net.params)
  assert head.tied == hyper.get("tied", True)
  np.testing.assert_array_equal(
      head.kernel.T if head.tied else head.kernel,
      models.output_head(net.params),
  )
  assert (head.bias, head.softcap, head.scale) == (None, None, None)


def test_norm_eps_counts():
  big = _net(norm_eps=0.5)
  want, _ = (_numpy_row(_float64(big.params), _tokens()[0]))
  got = big.apply_fn(big.params, _tokens())[0]
  assert np.abs(got - want).max() > 0.1
  x = np.asarray([[3.0, 4.0]], np.float32)
  norm = transformer._RMSNorm(2, eps=0.5)
  np.testing.assert_allclose(norm(x), x / np.sqrt(12.5 + 0.5), rtol=1e-6)


def test_float64_and_bfloat16(x64):
  net = models.make("transformer", jax.random.key(3), **_SMALL)
  params = _perturbed(net.params, np.float64)
  tokens = _tokens()
  logits = jax.jit(net.apply_fn)(params, tokens)
  assert logits.dtype == jnp.float64
  want, _ = _numpy_row(_float64(params), tokens[0])
  np.testing.assert_allclose(logits[0], want, rtol=0, atol=1e-12)
  half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
  rough, hidden = jax.jit(
      lambda p, x: net.apply_fn(p, x, features=True)
  )(half, tokens)
  assert rough.dtype == hidden.dtype == jnp.float32
  # bf16 has 8 bits; logits have size 5.
  assert np.abs(np.asarray(rough[0]) - want).max() < 0.5


def test_causal_and_only_causal():
  net = _net()
  tokens = _tokens()
  changed = tokens.copy()
  changed[:, 4] = (changed[:, 4] + 1) % V
  a = np.asarray(net.apply_fn(net.params, tokens))
  b = np.asarray(net.apply_fn(net.params, changed))
  np.testing.assert_array_equal(a[:, :4], b[:, :4])
  assert (np.abs(a - b)[:, 4:].max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
  """Rows of length 7, 5 and 2 among padding equal those rows alone."""
  net = _net()
  tokens = _tokens()
  lengths = (7, 5, 2)
  padded, where = np.full((3, 9), 3), np.zeros((3, 9), bool)
  for i, n in enumerate(lengths):
    at = slice(9 - n, 9) if side == "left" else slice(0, n)
    padded[i, at], where[i, at] = tokens[i, :n], True
  got = net.apply_fn(net.params, padded, where=where)
  for i, n in enumerate(lengths):
    want, _ = _numpy_row(_float64(net.params), tokens[i, :n])
    np.testing.assert_allclose(got[i][where[i]], want, **_TOLERANCE)
  assert np.isfinite(got).all()  # padding sees nothing and is no NaN
  other = np.where(where, padded, 7)
  np.testing.assert_array_equal(
      np.asarray(net.apply_fn(net.params, other, where=where))[where],
      np.asarray(got)[where],
  )


def test_gradient_ignores_padding():
  net = _net()
  where = np.ones((3, 7), bool)
  where[0, :4] = False

  def loss(params, tokens):
    logits = net.apply_fn(params, tokens, where=where)
    return jnp.sum(jnp.where(where[..., None], logits, 0) ** 2)

  tokens = _tokens()
  other = np.where(where, tokens, 0)
  grad = jax.jit(jax.grad(loss))
  a, b = grad(net.params, tokens), grad(net.params, other)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert np.isfinite(x).all()
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2])
def test_decoding_equals_the_full_forward(chunk):
  """Left-padded prompts of 3, then tokens through the cache, one or two."""
  net = _net()
  decode = _cached(net)
  tokens = _tokens(l=7)
  where = np.ones((3, 7), bool)
  where[0, :2] = where[1, :1] = False
  full = net.apply_fn(net.params, tokens, where=where)
  logits, cache = net.apply_fn(
      net.params, tokens[:, :3], where=where[:, :3], cache=9
  )
  outs = [logits]
  for i in range(3, 7, chunk):
    logits, cache = decode(net.params, tokens[:, i : i + chunk], cache)
    outs.append(logits)
  got = np.concatenate(outs, axis=1)
  np.testing.assert_allclose(got[where], full[where], rtol=0, atol=5e-6)
  assert int(cache.index) == 7
  np.testing.assert_array_equal(cache.where[:, :7], where)
  assert np.asarray(cache.where[:, 7:]).all()  # nothing there is padding
  assert cache.keys[0].shape == (3, KV, HD, 9) and len(cache.keys) == DEPTH
  assert cache.values[0].shape == (3, KV, 9, HD)


def test_decoding_in_bfloat16(strict):
  """The cache has the network's dtype, and nothing is promoted by chance."""
  net = _net()
  half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), net.params)
  tokens = _tokens()[:, :4]
  full = net.apply_fn(half, tokens)
  _, cache = net.apply_fn(half, tokens[:, :3], cache=4)
  got, cache = _cached(net)(half, tokens[:, 3:], cache)
  assert cache.keys[0].dtype == cache.values[0].dtype == jnp.bfloat16
  assert got.dtype == jnp.float32
  # bf16 has 8 bits; logits have size 5.
  np.testing.assert_allclose(got[:, 0], full[:, 3], rtol=0, atol=0.3)


def test_a_resized_cache_goes_on():
  """Cut behind what is written, then grown again: the same logits."""
  net = _net()
  tokens = _tokens(l=6)
  where = np.ones((3, 3), bool)
  where[0, :2] = False
  _, cache = net.apply_fn(net.params, tokens[:, :3], where=where, cache=8)
  wanted, whole = _cached(net)(net.params, tokens[:, 3:5], cache)
  got, short = _cached(net)(net.params, tokens[:, 3:5], cache.resized(5))
  np.testing.assert_allclose(got, wanted, rtol=0, atol=5e-6)
  again = short.resized(8)
  jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-6),
      again, whole,
  )  # fmt: skip
  with one_line_error("KVCache.resized: size must be <= 8, got 9"):
    cache.resized(9)


def test_padding_may_come_in_a_later_part_of_a_prompt():
  """A row that is padding alone so far, read in two parts; cut in between."""
  net = _net()
  tokens = _tokens(l=6)
  where = np.ones((3, 6), bool)
  where[0, :4] = where[1, :2] = False
  full = net.apply_fn(net.params, tokens, where=where)
  _, cache = net.apply_fn(
      net.params, tokens[:, :2], where=where[:, :2], cache=8
  )
  got, cache = _cached(net)(
      net.params, tokens[:, 2:5], cache.resized(6), where=where[:, 2:5]
  )
  np.testing.assert_allclose(
      got[where[:, 2:5]], full[:, 2:5][where[:, 2:5]], rtol=0, atol=5e-6
  )
  last, _ = _cached(net)(net.params, tokens[:, 5:], cache)
  np.testing.assert_allclose(last[:, 0], full[:, 5], rtol=0, atol=5e-6)


def test_last_is_the_last_row_and_features_come_before_the_cache():
  net = _net()
  tokens = _tokens()
  full = net.apply_fn(net.params, tokens)
  last = net.apply_fn(net.params, tokens, last=True)
  assert last.shape == (3, 1, V)
  np.testing.assert_allclose(last, full[:, -1:], rtol=0, atol=1e-6)
  logits, hidden, cache = net.apply_fn(
      net.params, tokens, cache=7, features=True
  )
  assert logits.shape == (3, 7, V) and hidden.shape == (3, 7, D)
  assert isinstance(cache, models.KVCache)


def test_groups_equal_repeated_heads():
  grouped, plain = _net(), _net(kv_heads=None)
  params = jax.tree.map(lambda a: a, grouped.params)
  for block in params["layers"].values():
    for name in ("k_proj", "v_proj"):
      kernel = block["self_attn"][name]["kernel"].reshape(D, KV, HD)
      block["self_attn"][name] = {
          "kernel": jnp.repeat(kernel, HEADS // KV, axis=1).reshape(D, -1)
      }
  np.testing.assert_allclose(
      plain.apply_fn(params, _tokens()),
      grouped.apply_fn(grouped.params, _tokens()),
      **_TOLERANCE,
  )


def test_rope_sees_distances_only():
  """Shifted positions change nothing; stretched ones do; angles by hand."""
  net = _net()
  tokens = _tokens()
  at = np.broadcast_to(np.arange(7), (3, 7))
  base = net.apply_fn(net.params, tokens)
  shifted = net.apply_fn(net.params, tokens, positions=at + 5)
  stretched = net.apply_fn(net.params, tokens, positions=2 * at)
  np.testing.assert_allclose(
      net.apply_fn(net.params, tokens, positions=at), base, rtol=0, atol=0
  )
  np.testing.assert_allclose(shifted, base, **_TOLERANCE)
  assert np.abs(np.asarray(stretched - base)).max() > 0.01
  angles = transformer.rotary_angles(np.asarray([[0, 3]]), 4, 100.0)
  np.testing.assert_allclose(angles, [[[0, 0], [3, 0.3]]], rtol=1e-6)
  x = np.asarray([1.0, 2, 3, 4], np.float32)
  turned = transformer.rotate(
      x.reshape(1, 1, 1, 4), jnp.cos(angles[:, 1:]), jnp.sin(angles[:, 1:])
  )
  np.testing.assert_allclose(turned[0, 0, 0], _rope(x, 3, 100.0), rtol=1e-6)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_parameter_count(tied, qk_norm):
  net = models.make(
      "transformer",
      jax.random.key(0),
      **{**_SMALL, "tied": tied, "qk_norm": qk_norm},
  )
  attention = 2 * D * HEADS * HD + 2 * D * KV * HD + 2 * HD * qk_norm
  block = attention + 3 * D * MLP + 2 * D
  want = V * D * (1 if tied else 2) + DEPTH * block + D
  assert models.count_params(net.params) == want
  assert ("lm_head" in net.params) == (not tied)


def test_names_are_those_of_qwen3():
  """Ours with "kernel" -> "weight" and "model." in front is Qwen3's list."""
  net = models.make("transformer", jax.random.key(0), **_SMALL, tied=False)
  paths = jax.tree_util.tree_flatten_with_path(net.params)[0]
  names = {
      jax.tree_util.keystr(path, simple=True, separator=".").replace(
          "kernel", "weight"
      )
      for path, _ in paths
  }
  want = {"embed_tokens.weight", "norm.weight", "lm_head.weight"}
  for i in range(DEPTH):
    want |= {
        f"layers.{i}.{n}.weight"
        for n in (
            "input_layernorm", "post_attention_layernorm", "self_attn.q_proj",
            "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj",
            "mlp.up_proj", "mlp.down_proj",
        )
    }  # fmt: skip
  assert names == want


def test_defaults_and_initial_scale():
  net = models.make("transformer", jax.random.key(0), vocab_size=50, width=32)
  block = net.params["layers"]["0"]
  assert block["mlp"]["gate_proj"]["kernel"].shape == (32, 96)
  assert block["self_attn"]["k_proj"]["kernel"].shape == (32, 32)
  assert block["self_attn"]["k_norm"]["weight"].shape == (8,)
  deviation = lambda a: float(np.std(a)) * a.shape[0] ** 0.5
  # Standard deviations of 1024 or more numbers are known to 5 %.
  for kernel, want in (
      (block["self_attn"]["q_proj"]["kernel"], 1),
      (block["self_attn"]["v_proj"]["kernel"], 1),
      (block["self_attn"]["o_proj"]["kernel"], 0.5),
      (block["mlp"]["up_proj"]["kernel"], 1),
      (block["mlp"]["down_proj"]["kernel"], 0.5),
      (net.params["embed_tokens"]["weight"].T, 1),
  ):
    assert abs(deviation(kernel) / want - 1) < 0.12
  logits = jax.jit(net.apply_fn)(net.params, jnp.arange(50)[None])
  assert 0.5 < np.std(logits) < 2


def test_debug_reports_ids_outside_the_vocabulary():
  raw = models.make("transformer", jax.random.key(3), **_SMALL)
  for bad in ([[0, V]], [[-1, 2]]):
    with debug(), one_line_error(r"tokens must be in \[0, 10\]"):
      raw.apply_fn(raw.params, np.asarray(bad))
  net = _net()
  outside = np.pad(np.asarray([[0, V]]), ((0, 2), (0, 5)))
  assert np.isnan(net.apply_fn(net.params, outside)[0, 1]).all()


@pytest.mark.parametrize(
    "hyper, match",
    [
        (dict(kv_heads=3), "kv_heads must be a divisor of heads=4, got 3"),
        (dict(kv_heads=0), "kv_heads must be a divisor"),
        (dict(head_dim=5), "head_dim must be even and >= 2, got 5"),
        (dict(head_dim=0), "head_dim must be even"),
        (dict(head_dim=None, width=10), "width must be a multiple of heads=4"),
        (dict(vocab_size=0), "vocab_size must be >= 1, got 0"),
        (dict(depth=0), "depth must be >= 1"),
        (dict(heads=0), "heads must be >= 1"),
        (dict(witdh=3), "did you mean 'width'"),
    ],
)
def test_bad_hyper_parameters(hyper, match):
  with one_line_error(match):
    models.make("transformer", jax.random.key(0), **{**_SMALL, **hyper})


@pytest.mark.parametrize(
    "call, match",
    [
        (dict(tokens=np.zeros(3, int)), r"tokens must be \[b, l\]"),
        (dict(tokens=np.zeros((2, 3))), "tokens must be an integer array"),
        (dict(tokens=np.zeros((0, 3), int)), "tokens must be a non-empty"),
        (dict(where=np.ones((2, 4), bool)), r"where must be \[b, l\]=\[2, 3\]"),
        (dict(where=np.ones((2, 3))), "where must be a bool array"),
        (dict(positions=np.ones((2, 3))), "positions must be an integer"),
        (dict(positions=np.ones(3, int)), r"positions must be \[b, l\]"),
        (dict(cache=2), "cache must be >= 3, the tokens to read, got 2"),
    ],
)
def test_bad_calls(call, match):
  net = models.make("transformer", jax.random.key(3), **_SMALL)
  call = {"tokens": np.zeros((2, 3), int), **call}
  with one_line_error(match):
    net.apply_fn(net.params, call.pop("tokens"), **call)


def test_a_cache_of_another_batch_is_refused():
  net = _net()
  _, cache = net.apply_fn(net.params, _tokens(b=2), cache=9)
  with one_line_error(r"cache.where must be \[b, size\]=\[3, 9\]"):
    _cached(net)(net.params, _tokens(b=3)[:, :1], cache)


def test_output_head_of_another_network_is_refused():
  with one_line_error("params must be those of a 'transformer', got"):
    models.output_head({"head": {}})
