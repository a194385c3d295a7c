"""The stop inside a generation against the weights of a whole one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import lm, losses, models
from tests.helpers import one_line_error

V, B, P, T, N, K = 9, 3, 4, 12, 2, 3
_RULE = dict(threshold=0.4, drop=0.5)


@functools.cache
def _nets():
  make = lambda seed: models.make(
      "transformer", jax.random.key(seed), vocab_size=V, width=8, depth=1,
      heads=2,
  )  # fmt: skip
  student, teacher = make(0), make(1)
  return student.apply_fn, student.params, teacher.params


def _inputs():
  rng = np.random.default_rng(0)
  where = np.ones((B, P), bool)
  where[0, :2] = False
  keys = jax.random.split(jax.random.key(4), B)
  return rng.integers(0, V, size=(B, P)), where, keys


def _stopped(interval, eos_id=None, **rule):
  apply_fn, student, teacher = _nets()
  prompts, where, keys = _inputs()

  @jax.jit
  def sample(student, teacher):
    same = dict(max_new_tokens=T, num_samples=N, prompt_where=where)
    stop_fn, state = lm.drift_stop(
        apply_fn, teacher, prompts, top_k=K, interval=interval,
        **{**_RULE, **rule}, **same,
    )  # fmt: skip
    out = lm.generate(
        apply_fn, student, prompts, keys, eos_id=eos_id, stop_fn=stop_fn,
        stop_state=state, **same,
    )  # fmt: skip
    return out._replace(stop_state=out.stop_state.events)

  return sample(student, teacher)


@functools.cache
def _whole(eos_id=None, drop=_RULE["drop"]):
  """A rollout without stop, and its drift weights by full forwards."""
  apply_fn, student, teacher = _nets()
  prompts, where, keys = _inputs()

  @jax.jit
  def score(student, teacher):
    full = lm.generate(
        apply_fn, student, prompts, keys, eos_id=eos_id, max_new_tokens=T,
        num_samples=N, prompt_where=where,
    )  # fmt: skip
    top = lambda params: jax.lax.top_k(
        lm.rollout_logits(apply_fn, params, full), K
    )[1]
    overlap = losses.topk_overlap(top(student), top(teacher))
    return full, overlap

  full, overlap = score(student, teacher)
  events = losses.drift_events(
      overlap, full.where, threshold=_RULE["threshold"]
  )
  return full, losses.drift_weights(
      events, full.where, drop=drop, base=0.0
  )


@pytest.mark.parametrize("interval", [1, 5])
def test_rows_end_where_their_weight_does(interval):
  full, weights = _whole()
  got = _stopped(interval)
  useful = np.asarray(weights.effective_length)
  # The first token of weight 0 is drawn; the teacher sees it at its next look.
  looked = np.minimum(-(-(useful + 1) // interval) * interval, T)
  want = np.where(useful == T, T, looked)
  assert got.lengths.tolist() == want.tolist()
  assert int(got.steps) == want.max()
  for r, n in enumerate(want):
    np.testing.assert_array_equal(got.tokens[r, :n], full.tokens[r, :n])
  assert not got.finished.any()
  if interval == 1:
    assert want.max() < T  # generation ended early
    # Two events of .5 each.
    assert got.stop_state.tolist() == [2] * (B * N)


def test_tokens_after_the_end_are_no_events():
  """Rows end by EOS or by four events, whichever comes first."""
  eos = int(np.bincount(np.asarray(_whole()[0].tokens)[:, :T // 2].ravel())
            .argmax())  # fmt: skip
  full, weights = _whole(eos, 0.25)
  got = _stopped(1, eos, drop=0.25)
  lengths = np.asarray(full.lengths)
  want = np.minimum(lengths, np.asarray(weights.effective_length) + 1)
  assert got.lengths.tolist() == want.tolist()
  by_eos = np.asarray(full.finished) & (want == lengths)
  assert by_eos.any() and (want[by_eos] < int(got.steps)).any()
  assert got.finished.tolist() == by_eos.tolist()
  lost = 1 - np.asarray(weights.weights)[np.arange(B * N), want - 1]
  np.testing.assert_allclose(np.asarray(got.stop_state) * 0.25, lost)


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(prompts=np.zeros(3, int)), r"prompts must be \[b, p\]"),
        (dict(threshold=1.5), r"threshold must be in \[0, 1\]"),
        (dict(drop=0), r"drop must be in \(0, inf\)"),
        (dict(top_k=0), "top_k must be an int >= 1, got 0"),
        (dict(top_k=V + 1), "top_k must be <= the vocabulary, 9, got 10"),
        (dict(interval=0), "interval must be an int >= 1"),
        (dict(max_new_tokens=0), "max_new_tokens must be an int >= 1"),
        (dict(num_samples=0), "num_samples must be an int >= 1"),
    ],
)
def test_bad_input(change, match):
  apply_fn = lambda *_, **__: (jnp.zeros((2, 1, V)), jnp.zeros(()))
  arguments = dict(prompts=np.zeros((2, 3), int), max_new_tokens=T) | change
  with one_line_error(match):
    lm.drift_stop(apply_fn, {}, arguments.pop("prompts"), **arguments)
