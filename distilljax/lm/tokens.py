"""Token arrays: padding on the host, and which logits predict which token.

Row t of a language model's logits predicts token t + 1. The functions here are
the only place that shifts by one, so that nobody else has to.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import _checks
from distilljax.typing import Array, Bool, Float, Int, Params

AnyArray = Array | np.ndarray


def pad(
  rows: Sequence[Sequence[int]],
  *,
  side: Literal["left", "right"],
  pad_id: int,
  length: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Rows of tokens of different lengths as one array and its mask.

  Prompts go to the left of nothing: "left" puts every last token in the last
  column, where sampling begins; completions take "right".

  Args:
    rows: token ids, one sequence a row.
    side: where the padding goes.
    pad_id: what stands there.
    length: columns; None means the longest row.

  Returns:
    (tokens int32 [b, length], where bool [b, length]).

  Raises:
    ValueError: no rows, a row longer than `length`, an unknown side.

  Example:
    >>> pad([[5], [6, 7]], side="left", pad_id=0)[0].tolist()
    [[0, 5], [6, 7]]
  """
  fn = "pad"
  _checks.one_of(fn, "side", side, ("left", "right"))
  if not len(rows):
    _checks.fail(fn, "rows", "a non-empty list", "[]")
  longest = max(len(r) for r in rows)
  length = longest if length is None else length
  if longest > length:
    _checks.fail(fn, "rows", f"of at most length={length} tokens", longest)
  tokens = np.full((len(rows), length), pad_id, np.int32)
  where = np.zeros((len(rows), length), bool)
  for i, row in enumerate(rows):
    at = slice(length - len(row), None) if side == "left" else slice(len(row))
    tokens[i, at], where[i, at] = row, True
  return tokens, where


def token_log_probs(
  logits: Float[AnyArray, "*b v"],
  tokens: Int[AnyArray, "*b"],
  *,
  temperature: Any = 1.0,
) -> Float[Array, "*b"]:
  """log softmax(logits / temperature) of the given tokens.

  Args:
    logits: those that predict `tokens`: already shifted. Shape [*b, v].
    tokens: Shape [*b].
    temperature: > 0.

  Returns:
    Nats, shape [*b], at least float32.

  Raises:
    ValueError: shapes that do not correspond or temperature <= 0; in debug mode
      an id outside the vocabulary.
  """
  fn = "token_log_probs"
  _checks.floating(fn, logits=logits)
  _checks.integer(fn, tokens=tokens)
  _checks.min_rank(fn, "logits", logits, 1, "[*b, v]")
  _checks.shape(
    fn, "tokens", tokens, jnp.shape(logits)[:-1], "[*b]", "logits"
  )
  _checks.in_range(fn, "temperature", temperature, 0, open_low=True)
  v = jnp.shape(logits)[-1]
  _checks.holds(
    fn, "tokens", tokens, lambda i: (i >= 0) & (i < v), f"in [0, {v - 1}]"
  )
  logits = _checks.at_least_float32(logits)
  log_probs = jax.nn.log_softmax(
    logits / jnp.asarray(temperature, logits.dtype), axis=-1
  )
  picked = jnp.take_along_axis(
    log_probs, jnp.asarray(tokens)[..., None], axis=-1
  )
  return picked[..., 0]


def completion_logits(
  apply_fn: Callable[..., Any],
  params: Params,
  prompts: Int[AnyArray, "n p"],
  tokens: Int[AnyArray, "n t"],
  *,
  prompt_where: Bool[AnyArray, "n p"] | None = None,
  where: Bool[AnyArray, "n t"] | None = None,
  features: bool = False,
) -> Any:
  """Logits that predict the tokens of a completion, by one full forward.

  The network reads [prompt; completion] without its last token; row t of the
  result predicts completion token t. This is what every loss on rollouts takes,
  of student, teacher and reference alike.

  Args:
    apply_fn: of a "transformer", or with the same call form.
    params: its parameters.
    prompts: padded on the left. Shape [n, p].
    tokens: completions, padded on the right. Shape [n, t].
    prompt_where: false at padding; None means no padding. Shape [n, p].
    where: tokens of the completion; None means all. Shape [n, t].
    features: returns (logits, hidden states) of the same positions.

  Returns:
    Shape [n, t, v], or the pair with [n, t, d].

  Raises:
    ValueError: shapes that do not correspond.
  """
  fn = "completion_logits"
  _checks.rank(fn, "prompts", prompts, 2, "[n, p]")
  _checks.rank(fn, "tokens", tokens, 2, "[n, t]")
  _checks.nonempty(fn, prompts=prompts, tokens=tokens)
  if jnp.shape(prompts)[0] != jnp.shape(tokens)[0]:
    _checks.fail(
      fn,
      "tokens",
      f"[n, t] with n={jnp.shape(prompts)[0]} like prompts",
      list(jnp.shape(tokens)),
    )
  if prompt_where is None:
    prompt_where = jnp.ones(jnp.shape(prompts), bool)
  if where is None:
    where = jnp.ones(jnp.shape(tokens), bool)
  _checks.boolean(fn, prompt_where=prompt_where, where=where)
  _checks.same_shape(fn, prompts=prompts, prompt_where=prompt_where)
  _checks.same_shape(fn, tokens=tokens, where=where)
  p = jnp.shape(prompts)[1]
  join = lambda a, b: jnp.concatenate(
    [jnp.asarray(a), jnp.asarray(b)[:, :-1]], axis=1
  )
  out = apply_fn(
    params,
    join(prompts, jnp.asarray(tokens).astype(jnp.result_type(prompts))),
    where=join(prompt_where, where),
    **({"features": True} if features else {}),
  )
  return jax.tree.map(lambda a: a[:, p - 1 :], out)


__all__ = ["completion_logits", "pad", "token_log_probs"]
