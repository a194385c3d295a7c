"""Schedules, named keys and row draws."""

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import train


def test_schedule_plays_first_then_cycles():
  schedule = train.Schedule(
    cycle=(("a", "b"), ("b",)), first=((("b",), 2), (("a",), 1))
  )
  played = [schedule.updates(i) for i in range(7)]
  assert played == [
    ("b",),
    ("b",),
    ("a",),
    ("a", "b"),
    ("b",),
    ("a", "b"),
    ("b",),
  ]
  assert schedule.entries() == [("b",), ("a",), ("a", "b")]


def test_named_keys_depend_on_the_name_only():
  key = jax.random.key(0)
  words = lambda k: np.asarray(jax.random.key_data(k))
  a, b = train.named_key(key, "a"), train.named_key(key, "b")
  assert not np.array_equal(words(a), words(b))
  assert np.array_equal(words(a), words(train.named_key(key, "a")))
  rows = train.row_keys(key, 4)
  folded = train.named_key(rows, "a")
  assert folded.shape == (4,)
  for i in range(4):
    np.testing.assert_array_equal(
      words(folded[i]), words(train.named_key(rows[i], "a"))
    )
  assert len({tuple(w) for w in words(folded)}) == 4


def test_row_draws_do_not_depend_on_the_batch():
  keys = train.row_keys(jax.random.key(1), 8)
  whole = train.draw(jax.random.normal, keys, "noise", (3,))
  half = train.draw(jax.random.normal, keys[4:], "noise", (3,))
  np.testing.assert_array_equal(whole[4:], half)
  other = train.draw(jax.random.normal, keys, "other", (3,))
  assert not np.array_equal(whole, other)
  fewer = train.draw(
    jax.random.normal, train.row_keys(jax.random.key(1), 4), "noise", (3,)
  )
  np.testing.assert_array_equal(whole[:4], fewer)


def test_draws_look_normal():
  keys = train.row_keys(jax.random.key(2), 20000)
  x = jax.jit(lambda k: train.draw(jax.random.normal, k, "x"))(keys)
  # standard errors 1/sqrt(20000) = .007 and 1/sqrt(40000) = .005
  assert abs(float(jnp.mean(x))) < 0.03
  assert abs(float(jnp.std(x)) - 1) < 0.02
