"""Markov language models: sequence quantities in closed form.

A model of sequences y_1 ... y_T over v tokens with

  P(y_1) = softmax(initial),   P(y_{t+1} | y_t) = softmax(transition[y_t])

The state a policy is in at step t + 1 is y_t, so everything that a language
model's loss estimates from samples (sequence KL, return, their gradients) is a
finite sum over steps and states weighed by the exact occupancy

  m_1 = P(y_1),   m_{t+1} = m_t P

The functions are differentiable in the logits: `jax.grad` of
`sequence_kl(student, teacher)` IS the gradient that a sampled estimator should
average to.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distilljax import _checks
from distilljax.typing import Array, Float, Int, PRNGKeyArray


class MarkovLM(NamedTuple):
  """A Markov language model by its logits, any constant added."""

  initial: Any  # [v]
  transition: Any  # [v, v]; row i: logits of the token after i


def _check(
  fn: str, model: MarkovLM, name: str = "model"
) -> tuple[Array, Array]:
  """(log P(y_1) [v], log P(y'|y) [v, v]) after the shape checks."""
  _checks.rank(fn, f"{name}.transition", model.transition, 2, "[v, v]")
  v = jnp.shape(model.transition)[0]
  _checks.shape(
    fn, f"{name}.transition", model.transition, (v, v), "[v, v]", "its rows"
  )
  _checks.shape(
    fn, f"{name}.initial", model.initial, (v,), "[v]", f"{name}.transition"
  )
  return tuple(
    jax.nn.log_softmax(_checks.at_least_float32(x), axis=-1) for x in model
  )


def make_markov_lm(
  key: PRNGKeyArray, vocab_size: int, *, scale: float | int = 1.0
) -> MarkovLM:
  """A random model: a uniform start and transition logits N(0, scale^2).

  Args:
    key: of the draw.
    vocab_size: v.
    scale: standard deviation of the logits.

  Returns:
    A `MarkovLM`.
  """
  shape = (vocab_size, vocab_size)
  return MarkovLM(jnp.zeros(vocab_size), scale * jax.random.normal(key, shape))


def markov_apply(
  params: dict[str, Any],
  tokens: Int[Array, "b l"],
  *,
  where: Any = None,
  cache: Any = None,
  last: bool = False,
) -> Any:
  """A Markov model in the call form of a language model of `models`.

  For rollouts and methods: row t of the logits is the transition of token t.
  The first token of a sequence is the prompt. Left padding changes nothing,
  since the token before is all that counts.

  Args:
    params: {"transition": logits [v, v]}, row i those of the token after i.
    tokens: Shape [b, l].
    where: not looked at.
    cache: an int, or what an earlier call returned: there is nothing to
      remember, an array [b, 0] stands for it.
    last: logits of the last position only.

  Returns:
    Logits [b, l, v] ([b, 1, v] with `last`), and the cache if one was given.
  """
  del where
  read = tokens[:, -1:] if last else tokens
  logits = jnp.take(params["transition"], read, axis=0)
  if cache is None:
    return logits
  return logits, jnp.zeros((tokens.shape[0], 0))


def sample_sequences(
  key: PRNGKeyArray, model: MarkovLM, *, rows: int, length: int
) -> Int[Array, "b l"]:
  """Draws sequences.

  Args:
    key: of the draws.
    model: the `MarkovLM`.
    rows: b.
    length: number of tokens, >= 1.

  Returns:
    Token ids, int32 [b, l].
  """
  log_start, log_step = _check("sample_sequences", model)
  keys = jax.random.split(key, length)
  first = jax.random.categorical(keys[0], log_start, shape=(rows,))

  def step(token, key):
    token = jax.random.categorical(key, log_step[token])
    return token, token

  _, rest = jax.lax.scan(step, first, keys[1:])
  return jnp.concatenate([first[None], rest]).T.astype(jnp.int32)


def sequence_logits(
  model: MarkovLM, ids: Int[Array, "b l"]
) -> Float[Array, "b l v"]:
  """Logits at every position: row t predicts ids[:, t] from the token before.

  Args:
    model: the `MarkovLM`.
    ids: Shape [b, l].

  Returns:
    Log-probabilities, shape [b, l, v]; SHIFTED already, as the losses want.
  """
  log_start, log_step = _check("sequence_logits", model)
  first = jnp.broadcast_to(log_start, (ids.shape[0], 1, log_start.shape[0]))
  return jnp.concatenate([first, log_step[ids[:, :-1]]], axis=1)


def token_log_probs(
  model: MarkovLM, ids: Int[Array, "b l"]
) -> Float[Array, "b l"]:
  """log P(y_t | y_<t) of the given tokens.

  Args:
    model: the `MarkovLM`.
    ids: Shape [b, l].

  Returns:
    Nats, shape [b, l].
  """
  logits = sequence_logits(model, ids)
  return jnp.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]


def occupancy(model: MarkovLM, *, length: int) -> Float[Array, "l v"]:
  """m_t(y) = P(y_t = y), exactly.

  Args:
    model: the `MarkovLM`.
    length: number of steps, >= 1.

  Returns:
    Shape [l, v]; rows sum to 1.
  """
  log_start, log_step = _check("occupancy", model)
  step_matrix = jnp.exp(log_step)

  def step(mass, _):
    following = jnp.matmul(mass, step_matrix, precision="highest")
    return following, mass

  _, masses = jax.lax.scan(step, jnp.exp(log_start), length=length)
  return masses


def sequence_kl(
  model: MarkovLM, other: MarkovLM, *, length: int
) -> Float[Array, ""]:
  """KL(model||other) between the distributions of whole sequences, exactly.

    KL(start) + sum_{t < length} sum_y m_t(y) KL(model(.|y) || other(.|y))

  `sequence_kl(student, teacher)` is the reverse KL of on-policy distillation,
  `sequence_kl(teacher, student)` the forward KL of supervised distillation.

  Args:
    model: whose sequences the mean is over.
    other: the other `MarkovLM`, with the same vocabulary.
    length: number of tokens, >= 1.

  Returns:
    Nats, a scalar >= 0.
  """
  fn = "sequence_kl"
  log_p, log_q = _check(fn, model), _check(fn, other, "other")
  start, step = (
    jnp.sum(jnp.exp(p) * (p - q), axis=-1) for p, q in zip(log_p, log_q)
  )
  mass = occupancy(model, length=length)[:-1]
  return start + jnp.sum(mass * step)


def expected_return(
  model: MarkovLM, reward: Float[Array, "v v"], *, length: int
) -> Float[Array, ""]:
  """E[sum_{t < length} reward[y_t, y_{t+1}]], exactly.

  Args:
    model: the `MarkovLM`.
    reward: of each transition. Shape [v, v].
    length: number of tokens, >= 1.

  Returns:
    A scalar.
  """
  fn = "expected_return"
  _, log_step = _check(fn, model)
  _checks.shape(fn, "reward", reward, log_step.shape, "[v, v]", "transition")
  per_state = jnp.sum(jnp.exp(log_step) * reward, axis=-1)
  return jnp.sum(occupancy(model, length=length)[:-1] * per_state)


def sequence_entropy(model: MarkovLM, *, length: int) -> Float[Array, ""]:
  """Entropy of the distribution of sequences, exactly.

  Args:
    model: the `MarkovLM`.
    length: number of tokens, >= 1.

  Returns:
    Nats, a scalar.
  """
  start, step = (
    -jnp.sum(jnp.exp(p) * p, axis=-1) for p in _check("sequence_entropy", model)
  )
  return start + jnp.sum(occupancy(model, length=length)[:-1] * step)


def outcome_posterior(
  model: MarkovLM, outcome_log_likelihood: Float[Array, "v"], *, length: int
) -> tuple[Float[Array, "v"], Float[Array, "n v v"]]:
  """The model that knows how the sequence ends, token by token.

  With log L(y) = log P(outcome | last token y) and the backward messages
  B_length = L, B_t(y) = sum_y' P(y'|y) B_{t+1}(y'):

    P(y_{t+1} | y_t, outcome) = P(y_{t+1} | y_t) B_{t+1}(y_{t+1}) / B_t(y_t)

  the exact answer of a teacher that is told the outcome, for credit
  assignment: log P(y_t | right) - log P(y_t | wrong) is known.

  Args:
    model: the `MarkovLM`.
    outcome_log_likelihood: log L of each last token; -inf rules it out. Shape
      [v].
    length: number of tokens, >= 1.

  Returns:
    (log P(y_1 | outcome) [v], log P(y_{t+1} | y_t, outcome) [length-1, v, v]).
  """
  fn = "outcome_posterior"
  log_start, log_step = _check(fn, model)
  _checks.shape(
    fn,
    "outcome_log_likelihood",
    outcome_log_likelihood,
    log_start.shape,
    "[v]",
    "initial",
  )

  def step(message, _):
    joint = log_step + message[None, :]
    before = jax.nn.logsumexp(joint, axis=-1)
    return before, joint - before[:, None]

  last = outcome_log_likelihood.astype(log_start.dtype)
  message, posterior = jax.lax.scan(step, last, length=length - 1, reverse=True)
  return jax.nn.log_softmax(log_start + message), posterior


__all__ = [
  "MarkovLM",
  "expected_return",
  "make_markov_lm",
  "markov_apply",
  "occupancy",
  "outcome_posterior",
  "sample_sequences",
  "sequence_entropy",
  "sequence_kl",
  "sequence_logits",
  "token_log_probs",
]
