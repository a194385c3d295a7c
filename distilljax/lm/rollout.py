"""Sampling from a language model under jit, with a KV cache.

The prompt is read once (prefill), then one token a row and step is drawn inside
a `lax.while_loop`, which ends as soon as every row has. The network is any
`apply_fn` with the call form of the zoo's "transformer":

  apply_fn(params, tokens [b, p], where=[b, p], cache=size, last=True)
      -> (logits [b, 1, v], cache)
  apply_fn(params, tokens [n, 1], cache=cache, last=True)
      -> (logits [n, 1, v], cache)

`cache` is a pytree whose leaves have the batch first, or no axis at all.

Row i, sample j, step s draws one uniform number with
fold_in(fold_in(keys[i], j), s) and takes the token where the distribution
function passes it, so what a row samples depends on its own key and logits, not
on the other rows, on their order or on the number of devices. Logits of another
batch shape may differ by float32 rounding, which can flip a near tie; nothing
else can. The number has 23 bits: events rarer than 1e-7 are not resolved.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distilljax import _checks
from distilljax.lm import tokens as tokens_lib
from distilljax.lm.tokens import AnyArray
from distilljax.typing import Array, Bool, Float, Int, Key, Params, PyTree


class Rollout(NamedTuple):
  """Completions of b prompts, num_samples each: row i * num_samples + j.

  Attributes:
    prompts: as given, repeated, padded on the left. int [n, p].
    prompt_where: false at the prompts' padding. bool [n, p].
    tokens: completions, `pad_id` after their end. int32 [n, t].
    where: tokens that were sampled, EOS counted, nothing after it. [n, t].
    log_probs: of the tokens under the model at temperature 1, full vocabulary;
      0 outside `where`. float32 [n, t].
    sampling_log_probs: under the distribution they were drawn from, i.e. after
      temperature, top-k and top-p (greedy: 0). float32 [n, t].
    lengths: number of tokens sampled. int32 [n].
    finished: ended by EOS; a row cut by its limit or stopped is not. bool [n].
    steps: tokens drawn a row until the loop ended, int32 scalar: the longest
      length. The model decoded steps - 1 times after the prefill.
    stop_state: what `stop_fn` carried, at the end; None without.
  """

  prompts: Any
  prompt_where: Any
  tokens: Any
  where: Any
  log_probs: Any
  sampling_log_probs: Any
  lengths: Any
  finished: Any
  steps: Any
  stop_state: Any = None


class Step(NamedTuple):
  """What a stop function sees of one step.

  Attributes:
    index: number of tokens the rows had before, int32 scalar.
    tokens: the tokens just drawn, int32 [n]; pad_id where a row had ended.
    logits: that they were drawn from, at temperature 1, [n, v].
    alive: rows that drew one. bool [n].
  """

  index: Any
  tokens: Any
  logits: Any
  alive: Any


# stop_fn(state, step) -> (state, stop [n]): ends row i after this token.
StopFn = Callable[[PyTree, Step], tuple[PyTree, Array]]


def sampling_logits(
  logits: Float[AnyArray, "*b v"],
  *,
  temperature: Any = 1.0,
  top_k: int | None = None,
  top_p: float | int | None = None,
) -> Float[Array, "*b v"]:
  """Log-probabilities of the distribution that the sampler draws from.

  Temperature first, then the top_k most likely tokens, then the smallest set of
  those whose probability, renormalised, reaches top_p (the token that reaches
  it is in); what is left is renormalised. Ties go to the lower id.

  Args:
    logits: Shape [*b, v].
    temperature: > 0, or the number 0 for the most likely token alone.
    top_k: in [1, v]; None means v.
    top_p: in (0, 1]; None means 1.

  Returns:
    Log-probabilities, -inf for excluded tokens. Shape [*b, v], at least
    float32.

  Raises:
    ValueError: an option out of range.
  """
  fn = "sampling_logits"
  _checks.min_rank(fn, "logits", logits, 1, "[*b, v]")
  _checks.floating(fn, logits=logits)
  _check_options(fn, temperature, top_k, top_p)
  logits = _checks.at_least_float32(logits)
  v = logits.shape[-1]
  if top_k is not None and top_k > v:
    _checks.fail(fn, "top_k", f"<= the vocabulary, {v}", top_k)
  if _is_greedy(temperature):
    best = jnp.argmax(logits, axis=-1)[..., None] == jnp.arange(v).reshape(
      (1,) * (logits.ndim - 1) + (-1,)
    )
    return jnp.where(best, 0.0, -jnp.inf).astype(logits.dtype)
  logits = logits / jnp.asarray(temperature, logits.dtype)
  k = v if top_k is None else top_k
  if k < v or top_p not in (None, 1):
    values, ids = jax.lax.top_k(logits, k)
    if top_p not in (None, 1):
      probs = jax.nn.softmax(values, axis=-1)
      before = jnp.cumsum(probs, axis=-1) - probs
      # The first is kept whatever rounding does to a tiny top_p.
      rank = jnp.arange(k).reshape((1,) * (logits.ndim - 1) + (-1,))
      values = jnp.where((before < top_p) | (rank == 0), values, -jnp.inf)
    logits = jnp.put_along_axis(
      jnp.full_like(logits, -jnp.inf), ids, values, axis=-1, inplace=False
    )
  return jax.nn.log_softmax(logits, axis=-1)


def _is_greedy(temperature: Any) -> bool:
  return _checks.is_number(temperature) and temperature == 0


def _check_options(fn, temperature, top_k, top_p):
  _checks.in_range(fn, "temperature", temperature, 0)
  _checks.finite(fn, temperature=temperature)
  if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
    _checks.fail(fn, "top_k", "an int >= 1 or None", top_k)
  if top_p is not None:
    _checks.in_range(fn, "top_p", top_p, 0, 1, open_low=True)


def generate(
  apply_fn: Callable[..., Any],
  params: Params,
  prompts: Int[AnyArray, "b p"],
  keys: Key[Array, "b"],
  *,
  max_new_tokens: int,
  eos_id: int | None,
  pad_id: int = 0,
  prompt_where: Bool[AnyArray, "b p"] | None = None,
  num_samples: int = 1,
  temperature: Any = 1.0,
  top_k: int | None = None,
  top_p: float | int | None = None,
  limits: Any = None,
  stop_fn: StopFn | None = None,
  stop_state: PyTree = None,
  cache_parts: int = 1,
) -> Rollout:
  """Samples completions; pure, to be called under jit (see `make_sampler`).

  Args:
    apply_fn: the network, see the head of the file.
    params: its parameters.
    prompts: padded on the LEFT. Shape [b, p].
    keys: one typed random key a prompt. Shape [b].
    max_new_tokens: t, the static length of the completions.
    eos_id: token that ends a row and counts; None means none does.
    pad_id: what stands after the end of a row.
    prompt_where: false at padding; None means no padding. Shape [b, p].
    num_samples: completions of each prompt; the prompt is read once for all.
    temperature: > 0, or the number 0 for greedy decoding.
    top_k: keeps the k most likely tokens, see `sampling_logits`.
    top_p: keeps the most likely tokens up to this probability.
    limits: most tokens of each prompt's completions, an int scalar or [b];
      values above max_new_tokens mean that. The loop ends when all rows have
      met theirs (a `losses.RolloutBudget`'s length goes here).
    stop_fn: stop_fn(state, step) -> (state, stop [n]) ends rows by what it
      sees, e.g. `drift_stop`; called once a step, also for rows that ended.
    stop_state: its first state, a pytree.
    cache_parts: loops that the decoding is cut into, to be compiled one by one:
      attention reads the slots that are filled by the end of a loop, not all.
      Above 1 the cache must have a method `resized(size)`, as `models.KVCache`.

  Returns:
    A `Rollout` of n = b * num_samples rows.

  Raises:
    ValueError: shapes that do not correspond or an option out of range; in
      debug mode a prompt that is empty or not padded on the left.
    TypeError: keys that are no typed keys, or arrays of another kind.
  """
  fn = "generate"
  _checks.rank(fn, "prompts", prompts, 2, "[b, p]")
  _checks.integer(fn, prompts=prompts)
  _checks.nonempty(fn, prompts=prompts)
  prompts = jnp.asarray(prompts).astype(jnp.int32)
  b, p = prompts.shape
  if not jnp.issubdtype(jnp.result_type(keys), jax.dtypes.prng_key):
    raise TypeError(
      f"{fn}: keys must be typed keys [b] (jax.random.key), got"
      f" {jnp.result_type(keys).name}"
    )
  _checks.per_row(fn, "prompts", prompts, keys=keys)
  for name, number in (
    ("max_new_tokens", max_new_tokens),
    ("num_samples", num_samples),
    ("cache_parts", cache_parts),
  ):
    if not isinstance(number, int) or number < 1:
      _checks.fail(fn, name, "an int >= 1", number)
  _check_options(fn, temperature, top_k, top_p)
  if prompt_where is None:
    prompt_where = jnp.ones((b, p), bool)
  _checks.boolean(fn, prompt_where=prompt_where)
  _checks.shape(fn, "prompt_where", prompt_where, (b, p), "[b, p]", "prompts")
  prompt_where = jnp.asarray(prompt_where)
  _checks.holds(
    fn,
    "prompt_where",
    prompt_where,
    lambda w: w[:, -1:] & (w[:, 1:] | ~w[:, :-1]).all(axis=1, keepdims=True),
    "true at the last position and after the first token (left padding)",
  )
  limit = _row_limits(fn, limits, b, max_new_tokens)
  repeat = lambda a: jnp.repeat(a, num_samples, axis=0)
  n, t = b * num_samples, max_new_tokens
  limit = repeat(limit)
  row_keys = jax.vmap(
    lambda key: jax.vmap(lambda j: jax.random.fold_in(key, j))(
      jnp.arange(num_samples)
    )
  )(keys).reshape(n)

  logits, cache = apply_fn(
    params, prompts, where=prompt_where, cache=p + t - 1, last=True
  )
  if cache_parts > 1 and not hasattr(cache, "resized"):
    _checks.fail(
      fn, "cache_parts", "1 where the cache has no `resized`", cache_parts
    )
  if num_samples > 1:
    logits = repeat(logits)
    cache = jax.tree.map(lambda a: repeat(a) if a.ndim else a, cache)

  options = dict(temperature=temperature, top_k=top_k, top_p=top_p)
  dtype = _checks.at_least_float32(logits).dtype
  # All of them before the loop: a random number is many small operations, which
  # cost a step on CPU more than a block of a small network does.
  uniforms = None if _is_greedy(temperature) else _uniforms(row_keys, t, dtype)

  def draw(index, logits, alive, stop_state):
    logits = _checks.at_least_float32(logits[:, -1])
    uniform = None
    if uniforms is not None:
      uniform = jax.lax.dynamic_index_in_dim(uniforms, index, keepdims=False)
    token, log_prob, sampling = _draw(uniform, logits, **options)
    token = jnp.where(alive, token, pad_id).astype(jnp.int32)
    zero = jnp.zeros((), log_prob.dtype)
    log_prob = jnp.where(alive, log_prob, zero)
    sampling = jnp.where(alive, sampling, zero)
    ended = jnp.zeros_like(alive) if eos_id is None else token == eos_id
    ended = ended & alive
    stop = index + 1 >= limit
    if stop_fn is not None:
      stop_state, more = stop_fn(
        stop_state, Step(index, token, logits, alive)
      )
      _checks.shape(fn, "stop_fn's second result", more, (n,), "[n]", "tokens")
      stop = stop | more
    return token, log_prob, sampling, ended, ~ended & ~stop & alive, stop_state

  class Carry(NamedTuple):
    index: Any
    token: Any
    alive: Any
    finished: Any
    lengths: Any
    tokens: Any
    log_probs: Any
    sampling: Any
    cache: Any
    stop_state: Any

  def record(carry: Carry, logits, cache) -> Carry:
    alive = carry.alive
    token, log_prob, sampling, ended, still, state = draw(
      carry.index, logits, alive, carry.stop_state
    )
    put = lambda buffer, new: jax.lax.dynamic_update_slice(
      buffer, new.astype(buffer.dtype)[None], (carry.index, jnp.int32(0))
    )
    return Carry(
      carry.index + 1,
      token,
      still,
      carry.finished | ended,
      carry.lengths + alive.astype(jnp.int32),
      put(carry.tokens, token),
      put(carry.log_probs, log_prob),
      put(carry.sampling, sampling),
      cache,
      state,
    )

  first = Carry(
    index=jnp.zeros((), jnp.int32),
    token=jnp.zeros((n,), jnp.int32),
    alive=limit > 0,
    finished=jnp.zeros((n,), bool),
    lengths=jnp.zeros((n,), jnp.int32),
    # [t, n]: a step writes one contiguous row.
    tokens=jnp.full((t, n), pad_id, jnp.int32),
    log_probs=jnp.zeros((t, n), dtype),
    sampling=jnp.zeros((t, n), dtype),
    cache=cache,
    stop_state=stop_state,
  )
  first = record(first, logits, cache)

  def body(carry: Carry) -> Carry:
    logits, cache = apply_fn(
      params, carry.token[:, None], cache=carry.cache, last=True
    )
    return record(carry, logits, cache)

  last = first
  for i in range(cache_parts):
    end = -(-t * (i + 1) // cache_parts)  # tokens that the rows then have
    if cache_parts > 1:  # the last of them is not read yet
      last = last._replace(cache=last.cache.resized(p + end - 1))
    last = jax.lax.while_loop(
      lambda carry, end=end: (carry.index < end) & jnp.any(carry.alive),
      body,
      last,
    )
  return Rollout(
    prompts=repeat(prompts),
    prompt_where=repeat(prompt_where),
    tokens=last.tokens.T,
    where=jnp.arange(t)[None, :] < last.lengths[:, None],
    log_probs=last.log_probs.T,
    sampling_log_probs=last.sampling.T,
    lengths=last.lengths,
    finished=last.finished,
    steps=last.index,
    stop_state=last.stop_state,
  )


def _row_limits(fn: str, limits: Any, b: int, t: int) -> Array:
  if limits is None:
    return jnp.full((b,), t, jnp.int32)
  _checks.integer(fn, limits=limits)
  if jnp.ndim(limits):
    _checks.shape(fn, "limits", limits, (b,), "[b]", "prompts")
  _checks.in_range(fn, "limits", limits, 0)
  limits = jnp.minimum(jnp.asarray(limits).astype(jnp.int32), t)
  return jnp.broadcast_to(limits, (b,))


def _uniforms(keys: Array, t: int, dtype: Any) -> Array:
  """The numbers in [0, 1) that rows with keys [n] draw by, [t, n]."""
  steps = jnp.arange(t)
  draw = lambda key, step: jax.random.uniform(
    jax.random.fold_in(key, step), (), dtype
  )
  return jax.vmap(jax.vmap(draw, (0, None)), (None, 0))(keys, steps)


def _first_above(
  weights: Array, mark: Array
) -> tuple[Array, Array, Array]:
  """The first i with weights[0] + ... + weights[i] > mark * their sum.

  Never one of weight 0, whatever rounding does to the sums.

  Args:
    weights: not negative, one above 0. Shape [n, m].
    mark: in [0, 1). Shape [n].

  Returns:
    (index [n], what of the mark is left for within it, in [0, 1) up to
    rounding [n], sum [n]).
  """
  m = weights.shape[1]
  place = jnp.arange(m, dtype=jnp.int32)
  # As a product: a scan is several passes, here over few numbers.
  before = (place[:, None] < place[None, :]).astype(weights.dtype)
  below = jnp.matmul(weights, before, precision="highest")
  upto = below + weights
  total = upto[:, -1]
  goal = (mark * total)[:, None]
  # The first that passes; where rounding lets none, the last of any weight:
  # both are the least of these numbers, the second kind counted from 2m down.
  number = jnp.where(upto > goal, place[None], 2 * m - place[None])
  number = jnp.min(jnp.where(weights > 0, number, 2 * m), axis=1)
  index = jnp.where(number < m, number, 2 * m - number)
  pick = lambda a: jnp.take_along_axis(a, index[:, None], axis=1)[:, 0]
  return index, (goal[:, 0] - pick(below)) / pick(weights), total


def _invert(weights: Array, uniform: Array) -> tuple[Array, Array]:
  """The token [n] where the distribution function of weights [n, v] passes it.

  One number a row, not one a token as the Gumbel trick needs. Where v is large
  blocks of about sqrt(v) tokens first, then the tokens of the block: two short
  sums instead of one long one, which is faster and rounds less.

  Args:
    weights: proportional to the tokens' probabilities. Shape [n, v].
    uniform: in [0, 1). Shape [n].

  Returns:
    (tokens [n], sum of the weights [n]).
  """
  n, v = weights.shape
  if v <= 64:
    index, _, total = _first_above(weights, uniform)
    return index, total
  size = math.isqrt(v - 1) + 1
  blocks = jnp.pad(weights, ((0, 0), (0, -v % size))).reshape(n, -1, size)
  block, rest, total = _first_above(jnp.sum(blocks, axis=2), uniform)
  inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
  return block * size + _first_above(inside, rest)[0], total


def _draw(uniform, logits, *, temperature, top_k, top_p):
  """(tokens [n], log-probs at temperature 1, under the sampling one)."""
  pick = lambda a, i: jnp.take_along_axis(a, i[:, None], axis=-1)[:, 0]
  if _is_greedy(temperature):
    token = jnp.argmax(logits, axis=-1)
    log_prob = pick(jax.nn.log_softmax(logits, axis=-1), token)
    return token, log_prob, jnp.zeros_like(log_prob)
  one = _checks.is_number(temperature) and temperature == 1
  if one and top_k is None and top_p is None:
    top = jnp.max(logits, axis=-1)
    token, total = _invert(jnp.exp(logits - top[:, None]), uniform)
    log_prob = pick(logits, token) - top - jnp.log(total)
    return token, log_prob, log_prob
  sampling = sampling_logits(
    logits, temperature=temperature, top_k=top_k, top_p=top_p
  )
  token, _ = _invert(jnp.exp(sampling), uniform)
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  return token, pick(log_probs, token), pick(sampling, token)


def make_sampler(
  apply_fn: Callable[..., Any], **options: Any
) -> Callable[..., Rollout]:
  """`generate` as a jitted function of its arrays.

  Args:
    apply_fn: the network.
    **options: keyword arguments of `generate` that stay the same: plain values
      and `stop_fn`.

  Returns:
    sample(params, prompts, keys, *, prompt_where=None, limits=None,
    stop_state=None) -> Rollout; one program a shape.

  Example:
    >>> import jax
    >>> from distilljax import models
    >>> net = models.make(
    ...   "transformer", jax.random.key(0), vocab_size=8, width=8, depth=1
    ... )
    >>> sample = make_sampler(net.apply_fn, max_new_tokens=3, eos_id=7)
    >>> keys = jax.random.split(jax.random.key(1), 2)
    >>> prompts = jax.numpy.zeros((2, 4), int)
    >>> sample(net.params, prompts, keys).tokens.shape
    (2, 3)
  """

  @jax.jit
  def sample(
    params, prompts, keys, *, prompt_where=None, limits=None, stop_state=None
  ):
    return generate(
      apply_fn,
      params,
      prompts,
      keys,
      prompt_where=prompt_where,
      limits=limits,
      stop_state=stop_state,
      **options,
    )

  return sample


def rollout_logits(
  apply_fn: Callable[..., Any],
  params: Params,
  rollout: Rollout,
  *,
  features: bool = False,
) -> Any:
  """Logits [n, t, v] that predict a rollout's tokens: `completion_logits`.

  Args:
    apply_fn: the network: student, teacher or reference.
    params: its parameters.
    rollout: what to score.
    features: returns (logits, hidden states [n, t, d]).

  Returns:
    Logits at temperature 1; row t predicts rollout.tokens[:, t].
  """
  return tokens_lib.completion_logits(
    apply_fn,
    params,
    rollout.prompts,
    rollout.tokens,
    prompt_where=rollout.prompt_where,
    where=rollout.where,
    features=features,
  )


__all__ = [
  "Rollout",
  "Step",
  "generate",
  "make_sampler",
  "rollout_logits",
  "sampling_logits",
]
