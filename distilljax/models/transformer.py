"""A decoder-only language model in the layout of Qwen3, with a KV cache."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from distilljax import _checks, kernels
from distilljax.models import layers
from distilljax.typing import Params


class KVCache(NamedTuple):
  """What a decoder keeps of the tokens it has read; a pytree.

  Every leaf with axes has the batch first, so that a row can be repeated or
  picked by `jax.tree.map`; `index` alone has none.

  Attributes:
    keys: one array a block [b, kv_heads, head_dim, size], after RoPE: the
      layout in which scores need no transposition.
    values: one array a block [b, kv_heads, size, head_dim].
    where: false at padding, bool [b, size]; true elsewhere, also where nothing
      is written yet.
    cos: of the angles that RoPE turns the token of a slot by, and
    sin: float [b, all slots, head_dim / 2].
    index: next slot to write, int32 scalar, the same for all rows.
  """

  keys: tuple[jax.Array, ...]
  values: tuple[jax.Array, ...]
  where: jax.Array
  cos: jax.Array
  sin: jax.Array
  index: jax.Array

  def resized(self, size: int) -> "KVCache":
    """The same with `size` slots, at most as many as it was made with.

    Attention over fewer slots is faster; those written must be among them.
    """
    most = self.cos.shape[1]
    if size > most:
      _checks.fail("KVCache.resized", "size", f"<= {most}", size)

    def fit(a, axis, fill=0):
      more = max(0, size - a.shape[axis])
      wide = [(0, more if i == axis else 0) for i in range(a.ndim)]
      a = jnp.pad(a, wide, constant_values=fill)
      return jax.lax.slice_in_dim(a, 0, size, axis=axis)

    return self._replace(
        keys=tuple(fit(k, 3) for k in self.keys),
        values=tuple(fit(v, 2) for v in self.values),
        where=fit(self.where, 1, True),
    )


class _Dense(nnx.Module):
  """x W over the last axis, no bias; W normal with the given deviation."""

  def __init__(self, inputs: int, outputs: int, *, std: float, rngs):
    self.kernel = layers.normal(rngs, (inputs, outputs), std)

  def __call__(self, x):
    return x @ self.kernel[...]


class _RMSNorm(nnx.Module):
  """x / sqrt(mean(x^2) + eps) * weight over the last axis, in float32."""

  def __init__(self, width: int, *, eps: float):
    self.weight = nnx.Param(jnp.ones((width,), jnp.float32))
    self.eps = eps

  def __call__(self, x):
    full = _checks.at_least_float32(x)
    mean = jnp.mean(jnp.square(full), axis=-1, keepdims=True)
    out = (full * jax.lax.rsqrt(mean + self.eps)).astype(x.dtype)
    return out * self.weight[...].reshape((1,) * (x.ndim - 1) + (-1,))


class _Embedding(nnx.Module):
  """A table of vectors [v, d]."""

  def __init__(self, rows: int, width: int, *, rngs):
    self.weight = layers.normal(rngs, (rows, width), width**-0.5)

  def __call__(self, ids):
    # An id outside the table gives NaN, not its neighbour's vector.
    return jnp.take(self.weight[...], ids, axis=0, mode="fill")


def _count(where):
  """Positions [b, l] that count the tokens which are no padding."""
  return jnp.maximum(jnp.cumsum(where, axis=1, dtype=jnp.int32) - 1, 0)


def rotary_angles(positions, head_dim: int, base: float):
  """Angles p / base^(2 i / head_dim) of positions [b, l], [b, l, hd/2]."""
  half = head_dim // 2
  dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
  frequencies = jnp.exp(
      jnp.arange(half, dtype=dtype) * (-math.log(base) / half)
  )
  return positions.astype(dtype)[..., None] * frequencies[None, None]


def rotate(x, cos, sin):
  """Turns the pairs (x_i, x_{i + hd/2}) of [b, l, n, hd] by [b, l, hd/2]."""
  cos, sin = cos[:, :, None].astype(x.dtype), sin[:, :, None].astype(x.dtype)
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
      [first * cos - second * sin, second * cos + first * sin], axis=-1
  )


class _Attention(nnx.Module):
  """Causal attention with grouped keys, RoPE and norms of each head."""

  def __init__(
      self, width, heads, kv_heads, head_dim, *, qk_norm, eps, std, rngs
  ):
    self.kv_heads, self.head_dim = kv_heads, head_dim
    self.groups = heads // kv_heads
    inner = heads * head_dim
    kv = kv_heads * head_dim
    self.q_proj = _Dense(width, inner, std=width**-0.5, rngs=rngs)
    self.k_proj = _Dense(width, kv, std=width**-0.5, rngs=rngs)
    self.v_proj = _Dense(width, kv, std=width**-0.5, rngs=rngs)
    self.o_proj = _Dense(inner, width, std=std * inner**-0.5, rngs=rngs)
    self.qk_norm = qk_norm
    if qk_norm:
      self.q_norm = _RMSNorm(head_dim, eps=eps)
      self.k_norm = _RMSNorm(head_dim, eps=eps)

  def _whole(self, q, k, v, where):
    """Attention over a sequence without a cache: `where` [b, l], or None."""
    if where is None:
      return layers.attention(q, k, v, causal=True)
    # Padding is a segment that no query is in.
    ids = jnp.where(where, 0, 1).astype(jnp.int32)
    return layers.attention(
        q, k, v, causal=True, q_segment_ids=jnp.zeros_like(ids),
        kv_segment_ids=ids,
    )  # fmt: skip

  def __call__(self, x, cos, sin, allowed, kv, index):
    """[b, l, d], and the cache of this block with the new keys in it.

    `kv` is the cache, the number of slots of a new one, or None. With a cache
    `allowed` is bool [b, l, size], with a new one [b, l, l]; without, it is
    `where` [b, l] of the tokens themselves, None for all.
    """
    b, l, _ = x.shape
    q = self.q_proj(x).reshape(b, l, -1, self.head_dim)
    k = self.k_proj(x).reshape(b, l, -1, self.head_dim)
    v = self.v_proj(x).reshape(b, l, -1, self.head_dim)
    if self.qk_norm:
      q, k = self.q_norm(q), self.k_norm(k)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if kv is None:
      return self.o_proj(self._whole(q, k, v, allowed).reshape(b, l, -1)), None
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)
    if isinstance(kv, int):
      empty = (0, kv - l)
      kv = (
          jnp.pad(k, ((0, 0), (0, 0), (0, 0), empty)),
          jnp.pad(v, ((0, 0), (0, 0), empty, (0, 0))),
      )
    else:
      put = jax.lax.dynamic_update_slice
      k = put(kv[0], k.astype(kv[0].dtype), (0, 0, 0, index))
      v = put(kv[1], v.astype(kv[1].dtype), (0, 0, index, 0))
      kv = (k, v)
    # [b, kv_heads, groups * l, hd]: the heads of a group read the same keys.
    q = q.reshape(b, l, self.kv_heads, self.groups, self.head_dim)
    q = q.transpose(0, 2, 3, 1, 4).reshape(b, self.kv_heads, -1, self.head_dim)
    scores = jnp.einsum("bhqd,bhdk->bhqk", q, k) / math.sqrt(self.head_dim)
    scores = _checks.at_least_float32(scores)
    scores = scores.reshape(b, self.kv_heads, self.groups, l, -1)
    # Finite, so that a padding row, which sees no key, is no NaN.
    scores = jnp.where(
        allowed[:, None, None], scores, jnp.finfo(scores.dtype).min
    )
    scores = scores.reshape(b, self.kv_heads, self.groups * l, -1)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    # The sum is divided out of head_dim numbers, not of every weight.
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v)
    out = (out.astype(total.dtype) / total).astype(v.dtype)
    out = out.reshape(b, self.kv_heads, self.groups, l, self.head_dim)
    out = out.transpose(0, 3, 1, 2, 4).reshape(b, l, -1)
    return self.o_proj(out), kv


class _MLP(nnx.Module):
  """SwiGLU: down(silu(gate(x)) * up(x))."""

  def __init__(self, width, inner, *, std, rngs):
    self.gate_proj = _Dense(width, inner, std=width**-0.5, rngs=rngs)
    self.up_proj = _Dense(width, inner, std=width**-0.5, rngs=rngs)
    self.down_proj = _Dense(inner, width, std=std * inner**-0.5, rngs=rngs)

  def __call__(self, x):
    return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class _Block(nnx.Module):
  """x + attention(norm(x)), then x + mlp(norm(x))."""

  def __init__(self, width, mlp_width, *, eps, std, rngs, **attention):
    self.input_layernorm = _RMSNorm(width, eps=eps)
    self.self_attn = _Attention(width, eps=eps, std=std, rngs=rngs, **attention)
    self.post_attention_layernorm = _RMSNorm(width, eps=eps)
    self.mlp = _MLP(width, mlp_width, std=std, rngs=rngs)

  def __call__(self, x, *context):
    h, kv = self.self_attn(self.input_layernorm(x), *context)
    x = x + h
    return x + self.mlp(self.post_attention_layernorm(x)), kv


class Transformer(nnx.Module):
  """Pre-norm decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU.

  Call: `apply_fn(params, tokens, *, where=None, positions=None, cache=None,
  last=False, features=False)` with tokens int [b, l].

  * `where`, bool [b, l]: false at padding, which no token sees. Padding may be
    on either side; with a cache it must be on the left.
  * `positions`, int [b, l]: for RoPE. None counts the tokens that are not
    padding, from 0 or from where the cache stands.
  * `cache`: an int makes a cache of so many slots and writes the tokens into
    it (prefill); a `KVCache` is read and continued (decoding, any l). Slots
    beyond the size are a mistake that only shows in the numbers.
  * `last`: logits of the last position only, [b, 1, v].
  * `features`: the hidden states before the head too, after the last norm.

  Returns logits [b, l, v], at least float32, row t predicting token t + 1; with
  `features` (logits, hidden [b, l, d]), and a cache is appended where one was
  given. Under jit, logits that are not used cost nothing: `hidden @
  output_head(params)` is what they are, at any choice of positions. The
  function of a network made of it says so to losses that never hold the
  logits: `apply_fn.linear_head(params)` is the head as they take it.

  The parameter names are Qwen3's, with `kernel` [in, out] for a linear map
  where Qwen3 has `weight` [out, in].

  Args:
    vocab_size: v.
    width: d, of the residual stream.
    depth: number of blocks.
    heads: number of query heads.
    kv_heads: number of key and value heads, a divisor of `heads`; None means
      `heads`.
    head_dim: of a head, even; None means width / heads.
    mlp_width: inner width of the SwiGLU; None means 3 * width, Qwen3's ratio.
    rope_base: base of the rotary frequencies; Qwen3 has 1e6, here 1e4 for
      short sequences.
    norm_eps: of every RMSNorm.
    qk_norm: RMSNorm of each head's queries and keys before RoPE (Qwen3).
    tied: whether the head is the embedding, transposed.
    remat: what of a block is kept for the backward pass: "none" (everything),
      "dots" or "block", see `layers.rematerialize`.
    scan_layers: whether the blocks are one compiled loop over parameters with a
      leading axis [depth], `layers` in the place of `layers/0`, `layers/1` and
      so on: the same numbers, and a compile time that does not grow with the
      depth (with a cache the blocks stand one after the other all the same).
    rngs: NNX random streams.

  References:
    Qwen Team, Qwen3 Technical Report, 2025, arXiv:2505.09388, section 2.
  """

  def __init__(
      self,
      *,
      vocab_size: int,
      width: int = 64,
      depth: int = 2,
      heads: int = 4,
      kv_heads: int | None = None,
      head_dim: int | None = None,
      mlp_width: int | None = None,
      rope_base: float = 1e4,
      norm_eps: float = 1e-6,
      qk_norm: bool = True,
      tied: bool = True,
      remat: str = "none",
      scan_layers: bool = False,
      rngs: layers.Draws | nnx.Rngs,
  ):
    name = "Transformer"
    for argument, value in (
        ("vocab_size", vocab_size),
        ("depth", depth),
        ("heads", heads),
    ):
      if value < 1:
        _checks.fail(name, argument, ">= 1", value)
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads:
      _checks.fail(name, "kv_heads", f"a divisor of heads={heads}", kv_heads)
    if head_dim is None:
      if width % heads:
        _checks.fail(
            name,
            "width",
            f"a multiple of heads={heads} (or pass head_dim)",
            width,
        )
      head_dim = width // heads
    if head_dim < 2 or head_dim % 2:
      _checks.fail(name, "head_dim", "even and >= 2", head_dim)
    _checks.one_of(name, "remat", remat, layers.REMAT)
    self.remat = remat
    self.vocab_size = vocab_size
    self.kv_heads, self.head_dim = kv_heads, head_dim
    self.rope_base = rope_base
    self.tied = tied
    # The sum of 2 * depth branches starts as large as one of them.
    std = (2 * depth) ** -0.5
    self.embed_tokens = _Embedding(vocab_size, width, rngs=rngs)
    self.depth, self.scan_layers = depth, scan_layers
    blocks = [
        _Block(
            width,
            3 * width if mlp_width is None else mlp_width,
            eps=norm_eps,
            std=std,
            rngs=rngs,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            qk_norm=qk_norm,
        )
        for _ in range(depth)
    ]
    self.layers = layers.stack(blocks) if scan_layers else nnx.List(blocks)
    self.norm = _RMSNorm(width, eps=norm_eps)
    if not tied:
      self.lm_head = _Dense(width, vocab_size, std=width**-0.5, rngs=rngs)

  @staticmethod
  def linear_head(params: Params) -> kernels.Head:
    """The head as `kernels.linear_divergence` takes it, never copied."""
    if "lm_head" in params:
      return kernels.Head(params["lm_head"]["kernel"])
    return kernels.Head(params["embed_tokens"]["weight"], tied=True)

  def _turns(self, positions):
    """(cos, sin) of RoPE at positions [b, l], each [b, l, hd / 2]."""
    angles = rotary_angles(positions, self.head_dim, self.rope_base)
    return jnp.cos(angles), jnp.sin(angles)

  def _blocks(self, h, cos, sin, allowed):
    """All blocks, without a cache."""
    if self.scan_layers:
      call = lambda block, i, h: block(
          layers.cut_rows(h, sequence=1), cos, sin, allowed, None, None
      )[0]
      return layers.scan(self.layers, call, h, remat=self.remat)
    for block in self.layers:
      block = layers.rematerialize(block, self.remat)
      h = layers.cut_rows(h, sequence=1)
      h, _ = block(h, cos, sin, allowed, None, None)
    return h

  def __call__(
      self,
      tokens,
      *,
      where=None,
      positions=None,
      cache=None,
      last=False,
      features=False,
  ):
    """Logits; see the class."""
    name = "Transformer"
    _checks.rank(name, "tokens", tokens, 2, "[b, l]")
    _checks.integer(name, tokens=tokens)
    _checks.nonempty(name, tokens=tokens)
    tokens = jnp.asarray(tokens)
    b, l = tokens.shape
    _checks.holds(
        name,
        "tokens",
        tokens,
        lambda x: (x >= 0) & (x < self.vocab_size),
        f"in [0, {self.vocab_size - 1}]",
    )
    if where is not None:
      _checks.boolean(name, where=where)
      _checks.shape(name, "where", where, (b, l), "[b, l]", "tokens")
      where = jnp.asarray(where)
    if positions is not None:
      _checks.integer(name, positions=positions)
      _checks.shape(name, "positions", positions, (b, l), "[b, l]", "tokens")
      positions = jnp.asarray(positions)
    order = None
    if cache is None or isinstance(cache, int):
      kept = jnp.ones((b, l), bool) if where is None else where
      if positions is None:
        positions = _count(kept)
      if cache is None:
        allowed = where
        order = layers.zigzag(name, "tokens", l)
        if order is not None:
          tokens, positions = tokens[:, order], positions[:, order]
          allowed = None if allowed is None else allowed[:, order]
      else:
        if cache < l:
          _checks.fail(name, "cache", f">= {l}, the tokens to read", cache)
        # Nothing but these tokens is in a new cache.
        allowed = kept[:, None] & jnp.tri(l, dtype=bool)[None]
        kept = jnp.pad(
            kept, ((0, 0), (0, cache - l)), constant_values=True
        )
        turns, index = self._turns(_count(kept)), jnp.zeros((), jnp.int32)
      cos, sin = self._turns(positions)
    else:
      size = cache.where.shape[1]
      _checks.shape(
          name, "cache.where", cache.where, (b, size), "[b, size]", "tokens"
      )
      kept, index, turns = cache.where, cache.index, (cache.cos, cache.sin)
      if where is not None:
        kept = jax.lax.dynamic_update_slice(kept, where, (0, index))
        rest = turns[0].shape[1] - size
        turns = self._turns(
            _count(jnp.pad(kept, ((0, 0), (0, rest)), constant_values=True))
        )
      slot = jnp.arange(size, dtype=jnp.int32)
      query = index + jnp.arange(l, dtype=jnp.int32)
      allowed = kept[:, None] & (slot[None, :] <= query[:, None])[None]
      if positions is None:
        cos, sin = (
            jax.lax.dynamic_slice_in_dim(a, index, l, axis=1) for a in turns
        )
      else:
        cos, sin = self._turns(positions)
    h = self.embed_tokens(tokens)
    if cache is None:
      h = self._blocks(h, cos, sin, allowed)
      h = h if order is None else layers.unzigzag(h)
    else:
      keys, values = [], []
      for i in range(self.depth):
        block = (
            layers.layer(self.layers, i) if self.scan_layers else self.layers[i]
        )
        kv = cache
        if not isinstance(cache, int):
          kv = (cache.keys[i], cache.values[i])
        h = layers.cut_rows(h)
        h, kv = block(h, cos, sin, allowed, kv, index)
        keys.append(kv[0])
        values.append(kv[1])
    h = self.norm(layers.cut_rows(h, sequence=1))
    head = (
        self.embed_tokens.weight[...].T
        if self.tied
        else self.lm_head.kernel[...]
    )
    logits = jnp.einsum(
        "bld,dv->blv",
        h[:, -1:] if last else h,
        head,
        preferred_element_type=_checks.at_least_float32(h).dtype,
    )
    out = (logits,)
    if features:
      out += (_checks.at_least_float32(h),)
    if cache is not None:
      out += (KVCache(tuple(keys), tuple(values), kept, *turns, index + l),)
    return out if len(out) > 1 else logits


def output_head(params: Params) -> jax.Array:
  """The map from hidden states to logits of a `Transformer`, [d, v].

  `hidden @ output_head(params)` are the logits; of the embedding, transposed,
  where the head is tied. For losses that pick positions first or never hold
  the logits.

  Args:
    params: of a "transformer" of the zoo.

  Returns:
    The kernel, shape [d, v].

  Raises:
    ValueError: parameters of another network.
  """
  if not {"lm_head", "embed_tokens"} & set(params):
    _checks.fail(
        "output_head", "params", "those of a 'transformer'", sorted(params)
    )
  head = Transformer.linear_head(params)
  return head.kernel.T if head.tied else head.kernel
