"""Prune-OPD's early stop inside a running generation.

The released code only shortens the next generation. Here the teacher reads
along, and a row ends at the token where its drift weight has fallen to 0.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distilljax import _checks, losses
from distilljax.lm import rollout
from distilljax.lm.tokens import AnyArray
from distilljax.typing import Bool, Int, Params


class DriftState(NamedTuple):
  """What `drift_stop` carries.

  Attributes:
    events: drift events of each row so far, int32 [n].
    cache: of the teacher.
    pending: the teacher's logits for the first token it has not judged, [n, v].
    tokens: drawn but not yet read by the teacher, int32 [n, interval].
    student_ids: the student's top-k at those, int32 [n, interval, k].
    alive: rows that drew them, bool [n, interval].
  """

  events: Any
  cache: Any
  pending: Any
  tokens: Any
  student_ids: Any
  alive: Any


def drift_stop(
  apply_fn: Callable[..., Any],
  params: Params,
  prompts: Int[AnyArray, "b p"],
  *,
  max_new_tokens: int,
  prompt_where: Bool[AnyArray, "b p"] | None = None,
  num_samples: int = 1,
  top_k: int = 16,
  threshold: float | int = 0.7,
  drop: float | int = 0.1,
  interval: int = 1,
) -> tuple[Callable[..., Any], DriftState]:
  """A stop function for `generate`, with its first state.

    event_t = overlap of both models' top-k at token t < threshold
    w_t     = clip(1 - drop * events up to and including t, 0, 1)

  as `losses.drift_weights`; the row ends with the first judged token at which w
  is 0 (at most 1e-8). With interval m the teacher reads m tokens at a time, so
  that a row may run up to m - 1 tokens too long; what lies behind has w = 0.

  Call it inside the jitted function that calls `generate`, so that the
  teacher's parameters are arguments of the program and no constants.

  Args:
    apply_fn: the teacher, with the call form of "transformer".
    params: its parameters.
    prompts: as given to `generate`. Shape [b, p].
    max_new_tokens: as given to `generate`.
    prompt_where: as given to `generate`.
    num_samples: as given to `generate`.
    top_k: k of the overlap, in [1, v].
    threshold: share of overlap below which a token is an event, in [0, 1].
    drop: weight lost an event, > 0.
    interval: tokens between two looks, >= 1.

  Returns:
    (stop_fn, stop_state) for `generate`.

  Raises:
    ValueError: an option out of range.

  Example:
    >>> import jax
    >>> from distilljax import lm, models
    >>> net = models.make(
    ...   "transformer", jax.random.key(0), vocab_size=8, width=8, depth=1
    ... )
    >>> @jax.jit
    ... def sample(student, teacher, prompts, keys):
    ...   stop_fn, state = drift_stop(
    ...     net.apply_fn, teacher, prompts, max_new_tokens=3, top_k=2
    ...   )
    ...   return lm.generate(
    ...     net.apply_fn, student, prompts, keys, max_new_tokens=3, eos_id=7,
    ...     stop_fn=stop_fn, stop_state=state,
    ...   )
    >>> keys = jax.random.split(jax.random.key(1), 2)
    >>> out = sample(
    ...   net.params, net.params, jax.numpy.zeros((2, 4), int), keys
    ... )
    >>> out.stop_state.events.tolist()  # its own teacher: no drift
    [0, 0]

  References:
    Prune-OPD, 2026, arXiv:2605.07804 (the monitor and the weights; the stop
    inside a generation is ours).
  """
  fn = "drift_stop"
  _checks.rank(fn, "prompts", prompts, 2, "[b, p]")
  _checks.in_range(fn, "threshold", threshold, 0, 1)
  _checks.in_range(fn, "drop", drop, 0, open_low=True)
  for name, number in (
    ("max_new_tokens", max_new_tokens),
    ("num_samples", num_samples),
    ("top_k", top_k),
    ("interval", interval),
  ):
    if not isinstance(number, int) or number < 1:
      _checks.fail(fn, name, "an int >= 1", number)
  prompts = jnp.asarray(prompts)
  b, p = prompts.shape
  if prompt_where is None:
    prompt_where = jnp.ones((b, p), bool)
  n, m = b * num_samples, interval
  looks = -(-max_new_tokens // m)
  logits, cache = apply_fn(
    params, prompts, where=prompt_where, cache=p + looks * m, last=True
  )
  if top_k > logits.shape[-1]:
    _checks.fail(
      fn, "top_k", f"<= the vocabulary, {logits.shape[-1]}", top_k
    )
  repeat = lambda a: jnp.repeat(a, num_samples, axis=0) if a.ndim else a
  state = DriftState(
    jnp.zeros((n,), jnp.int32),
    jax.tree.map(repeat, cache),
    repeat(logits[:, -1]),
    jnp.zeros((n, m), jnp.int32),
    jnp.zeros((n, m, top_k), jnp.int32),
    jnp.zeros((n, m), bool),
  )

  def look(state: DriftState) -> DriftState:
    logits, cache = apply_fn(params, state.tokens, cache=state.cache)
    judging = jnp.concatenate(
      [state.pending[:, None], logits[:, :-1]], axis=1
    )
    overlap = losses.topk_overlap(
      state.student_ids, jax.lax.top_k(judging, top_k)[1]
    )
    events = losses.drift_events(overlap, state.alive, threshold=threshold)
    return state._replace(
      events=state.events + jnp.sum(events, axis=1, dtype=jnp.int32),
      cache=cache,
      pending=logits[:, -1],
    )

  def stop_fn(state: DriftState, step: rollout.Step):
    at = step.index % m
    ids = jax.lax.top_k(step.logits, top_k)[1].astype(jnp.int32)
    state = state._replace(
      tokens=state.tokens.at[:, at].set(step.tokens),
      student_ids=state.student_ids.at[:, at].set(ids),
      alive=state.alive.at[:, at].set(step.alive),
    )
    if m == 1:
      state = look(state)
    else:
      state = jax.lax.cond(at == m - 1, look, lambda state: state, state)
    weight = 1 - drop * state.events.astype(jnp.float32)
    return state, weight <= 1e-8

  return stop_fn, state


__all__ = ["DriftState", "drift_stop"]
