"""Padding and the one shift between logits and tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import debug, lm
from tests.helpers import one_line_error


def test_pad():
  rows = [[1, 2, 3], [], [4]]
  tokens, where = lm.pad(rows, side="left", pad_id=9)
  assert tokens.tolist() == [[1, 2, 3], [9, 9, 9], [9, 9, 4]]
  assert where.tolist() == [[1, 1, 1], [0, 0, 0], [0, 0, 1]]
  tokens, where = lm.pad(rows, side="right", pad_id=9, length=4)
  assert tokens.tolist() == [[1, 2, 3, 9], [9] * 4, [4, 9, 9, 9]]
  assert where.sum(axis=1).tolist() == [3, 0, 1] and where[2, 0]
  assert tokens.dtype == np.int32 and where.dtype == bool


@pytest.mark.parametrize(
    "rows, options, match",
    [
        ([], {}, "rows must be a non-empty list"),
        ([[1, 2]], dict(length=1), "of at most length=1 tokens, got 2"),
        ([[1]], dict(side="top"), "side must be one of 'left', 'right'"),
    ],
)
def test_pad_bad_input(rows, options, match):
  with one_line_error(match):
    lm.pad(rows, **{"side": "left", "pad_id": 0, **options})


def test_token_log_probs():
  rng = np.random.default_rng(0)
  logits = 3 * rng.normal(size=(2, 3, 5)).astype(np.float32)
  tokens = rng.integers(0, 5, size=(2, 3))
  for temperature in (1.0, 0.5, 2):
    x = np.exp(logits.astype(np.float64) / temperature)
    want = np.log(x / x.sum(axis=-1, keepdims=True))
    got = lm.token_log_probs(logits, tokens, temperature=temperature)
    for i in np.ndindex(2, 3):
      np.testing.assert_allclose(got[i], want[i][tokens[i]], rtol=2e-6)
  assert (
      lm.token_log_probs(jnp.zeros((1, 2), jnp.bfloat16), tokens[0, :1] * 0)
      .dtype == jnp.float32
  )  # fmt: skip


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(logits=np.zeros((2, 5), int)), "logits must be a floating"),
        (dict(tokens=np.zeros(2)), "tokens must be an integer"),
        (dict(tokens=np.zeros(3, int)), r"tokens must be \[\*b\]=\[2\]"),
        (dict(temperature=0), r"temperature must be in \(0, inf\)"),
        (
            dict(logits=np.float32(1), tokens=np.asarray(0)),
            r"logits must be \[\*b, v\]",
        ),
    ],
)
def test_token_log_probs_bad_input(change, match):
  arguments = dict(logits=np.zeros((2, 5), np.float32), tokens=np.zeros(2, int))
  arguments |= change
  with one_line_error(match):
    lm.token_log_probs(
        arguments.pop("logits"), arguments.pop("tokens"), **arguments
    )


def test_token_log_probs_in_debug_mode():
  logits = np.zeros((2, 5), np.float32)
  for bad in (5, -1):
    with debug(), one_line_error(r"tokens must be in \[0, 4\]"):
      lm.token_log_probs(logits, np.asarray([0, bad]))


def _spy(params, tokens, *, where, features=False):
  """Logits [b, l, 2]: the token read and its mask."""
  out = jnp.stack([params * tokens, where], axis=-1).astype(jnp.float32)
  return (out, out + 0.5) if features else out


def test_completion_logits_are_shifted_by_one():
  prompts, tokens = np.asarray([[0, 1, 2]]), np.asarray([[3, 4, 5, 6]])
  got = lm.completion_logits(_spy, 10, prompts, tokens)
  # Completion token t is predicted after reading the token before it.
  assert got[0, :, 0].tolist() == [20, 30, 40, 50]
  assert got[0, :, 1].tolist() == [1, 1, 1, 1]
  got, hidden = lm.completion_logits(
      _spy, 10, prompts, tokens,
      prompt_where=np.asarray([[False, True, False]]),
      where=np.asarray([[True, False, True, True]]), features=True,
  )  # fmt: skip
  assert got[0, :, 1].tolist() == [0, 1, 0, 1]
  np.testing.assert_array_equal(hidden, got + 0.5)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(prompts=np.zeros(3, int)), r"prompts must be \[n, p\]"),
        (dict(tokens=np.zeros(3, int)), r"tokens must be \[n, t\]"),
        (dict(tokens=np.zeros((1, 4), int)), r"tokens must be \[n, t\] with"),
        (dict(tokens=np.zeros((2, 0), int)), "tokens must be a non-empty"),
        (dict(where=np.ones((2, 3), bool)), r"where must be \[2, 4\] like"),
        (dict(prompt_where=np.ones((2, 4), bool)), "prompt_where must be"),
        (dict(where=np.ones((2, 4))), "where must be a bool"),
    ],
)
def test_completion_logits_bad_input(change, match):
  arguments = dict(prompts=np.zeros((2, 3), int), tokens=np.zeros((2, 4), int))
  arguments |= change
  with one_line_error(match):
    lm.completion_logits(
        _spy, 1, arguments.pop("prompts"), arguments.pop("tokens"), **arguments
    )
