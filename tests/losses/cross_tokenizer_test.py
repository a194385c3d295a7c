"""ALM's chunk likelihoods and divergences against membership matrices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distilljax
from distilljax.losses import cross_tokenizer as ct
from tests.helpers import one_line_error

# Many small programs, each run once: compile them cheaply.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)
RNG = np.random.default_rng(3)
LOGITS = RNG.normal(size=(2, 6, 5))
IDS = RNG.integers(0, 5, size=(2, 6))
CHUNKS = np.array([[0, 0, 1, 1, 1, 2], [0, 1, 1, -1, 2, -1]])
KEPT = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 0, 1, 1, 1]], bool)
C = 4
BOUNDARY = np.array([False, True, False, False, True])


def arrays(*values):
  return tuple(jnp.asarray(v) for v in values)


def log_soft(x):
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def members(row, c):
  return [i for i in range(6) if CHUNKS[row, i] == c and KEPT[row, i]]


def test_chunk_log_probs(x64, strict):
  """The official shift, by loops: token i is predicted by row i - 1."""
  log_p = log_soft(LOGITS)
  want = np.zeros((2, C))
  counts = np.zeros((2, C), int)
  boundary = np.zeros((2, C))
  slope = np.zeros_like(LOGITS)
  for b in range(2):
    for c in range(C):
      inside = members(b, c)
      for i in inside:
        if i >= 1:
          want[b, c] += log_p[b, i - 1, IDS[b, i]]
          counts[b, c] += 1
          slope[b, i - 1] -= (c + 1) * np.exp(log_p[b, i - 1])
          slope[b, i - 1, IDS[b, i]] += c + 1
      if inside:
        mass = np.exp(log_p[b, inside[-1]])[BOUNDARY].sum()
        boundary[b, c] = np.log(mass)
  args = arrays(LOGITS, IDS, CHUNKS, KEPT)
  ours = ct.chunk_log_probs(*args, num_chunks=C)
  np.testing.assert_allclose(ours, want, rtol=1e-12)
  grad = jax.grad(
    lambda x: jnp.sum(
      ct.chunk_log_probs(x, *args[1:], num_chunks=C)
      * jnp.arange(1.0, C + 1)[None, :]
    )
  )(args[0])
  np.testing.assert_allclose(grad, slope, rtol=1e-10, atol=1e-13)
  np.testing.assert_array_equal(
    ct.chunk_token_counts(*args[2:], num_chunks=C), counts
  )
  ours = ct.boundary_log_probs(
    args[0], jnp.asarray(BOUNDARY), *args[2:], num_chunks=C
  )
  np.testing.assert_allclose(ours, boundary, rtol=1e-12)
  # Without a mask all tokens count.
  whole = ct.chunk_token_counts(args[2], num_chunks=C)
  np.testing.assert_array_equal(whole, [[1, 3, 1, 0], [0, 2, 1, 0]])
  one = ct.chunk_log_probs(*args[:3], num_chunks=C)
  np.testing.assert_allclose(
    one[1, 1],
    log_p[1, 0, IDS[1, 1]] + log_p[1, 1, IDS[1, 2]],
    rtol=1e-12,
  )


def test_what_is_in_no_chunk_does_not_matter():
  """NaN and -inf rows behind -1 or the mask: same values, finite gradient."""
  logits = jnp.asarray(LOGITS, jnp.float32)
  # Row 1: token 3 is in no chunk (predicted by row 2), token 2 is masked (by
  # row 1), and nothing is predicted by row 4 (token 5: none) or row 5.
  bad = logits.at[1, 4].set(jnp.nan).at[1, 5].set(jnp.nan)
  ids, chunks, kept = arrays(IDS, CHUNKS, KEPT)
  fn = functools.partial(ct.chunk_log_probs, num_chunks=C)
  np.testing.assert_array_equal(
    fn(bad, ids, chunks, kept), fn(logits, ids, chunks, kept)
  )
  ruled_out = logits.at[1, 1, IDS[1, 2]].set(-jnp.inf)
  grad = jax.grad(lambda x: jnp.sum(fn(x, ids, chunks, kept)))(ruled_out)
  assert np.all(np.isfinite(grad))


def test_clips_at_zero():
  """Rounding may leave log p above 0; a certain boundary is exactly 0."""
  logits = jnp.zeros((1, 2, 1))
  ids = chunks = jnp.zeros((1, 2), jnp.int32)
  assert ct.chunk_log_probs(logits, ids, chunks, num_chunks=1) == 0
  out = ct.boundary_log_probs(
    jnp.asarray(LOGITS[:1], jnp.float32),
    jnp.ones(5, bool),
    jnp.asarray(CHUNKS[:1]),
    num_chunks=3,
  )
  assert np.all(out <= 0)
  np.testing.assert_allclose(out, 0, atol=1e-6)


# --- merging ----------------------------------------------------------------


def test_merge(x64, strict):
  """Groups close after a chunk whose teacher boundary exceeds the threshold."""
  student, teacher, ws, wt = -np.abs(RNG.normal(size=(4, 2, 5)))
  wt = np.log(np.array([[0.05, 0.5, 0.3, 0.01, 0.9], [0.25, 0.05, 0.3, 1, 1]]))
  counts = np.array([[1, 2, 1, 3, 2], [2, 1, 4, 0, 0]])
  out = ct.merge_chunks(
    *arrays(student, teacher, ws, wt, counts), threshold=0.25
  )
  # Row 0: {0,1} {2} {3,4}. Row 1: exactly .25 is not above it: {0,1,2}.
  groups = [[[0, 1], [2], [3, 4]], [[0, 1, 2]]]
  for b, row in enumerate(groups):
    for g in range(5):
      chunk = row[g] if g < len(row) else []
      np.testing.assert_allclose(
        out.student[b, g], student[b, chunk].sum(), atol=1e-14
      )
      np.testing.assert_allclose(
        out.teacher[b, g], teacher[b, chunk].sum(), atol=1e-14
      )
      assert out.counts[b, g] == counts[b, chunk].sum()
      last = chunk[-1] if chunk else None
      for ours, given in (
        (out.student_boundary, ws),
        (out.teacher_boundary, wt),
      ):
        want = 0 if last is None else given[b, last]
        np.testing.assert_allclose(ours[b, g], want, rtol=1e-12)
  # The official denominator merges [3, 1, 5] once more, slots read as chunks.
  np.testing.assert_array_equal(out.official_counts[0], [4, 5, 0, 0, 0])
  np.testing.assert_array_equal(out.official_counts[1], [7, 0, 0, 0, 0])
  # The default threshold .1: now row 1 closes after its first chunk as well.
  default = ct.merge_chunks(*arrays(student, teacher, ws, wt, counts))
  np.testing.assert_array_equal(default.counts[1], [2, 5, 0, 0, 0])
  np.testing.assert_array_equal(default.counts[0], out.counts[0])
  low = np.where(wt == np.log(0.05), np.log(0.101), wt)
  low = np.where(low == np.log(0.01), np.log(0.099), low)
  tight = ct.merge_chunks(*arrays(student, teacher, ws, low, counts))
  np.testing.assert_array_equal(tight.counts[0], [1, 2, 1, 5, 0])
  finest = ct.merge_chunks(
    *arrays(student, teacher, ws, wt, counts), threshold=0
  )
  np.testing.assert_array_equal(finest.student[0], student[0])
  grads = jax.grad(
    lambda *x: sum(
      jnp.sum(a)
      for a in ct.merge_chunks(*x, jnp.asarray(counts), threshold=0.25)[:4]
    ),
    (0, 1, 2, 3),
  )(*arrays(student, teacher, ws, wt))
  np.testing.assert_array_equal(grads[0], counts > 0)
  np.testing.assert_array_equal(grads[1], 0)
  np.testing.assert_array_equal(grads[3], 0)
  np.testing.assert_array_equal(grads[2], [[0, 1, 1, 0, 1], [0, 0, 1, 0, 0]])


def test_merge_with_a_chunk_that_is_not_predicted():
  """The first token of a row: no count, and no slot in the official one."""
  low = jnp.full((1, 3), -9.0)
  out = ct.merge_chunks(low, low, low, low, jnp.array([[0, 1, 2]]))
  np.testing.assert_array_equal(out.counts, [[3, 0, 0]])
  np.testing.assert_array_equal(out.official_counts, [[0, 0, 0]])
  np.testing.assert_array_equal(out.student, [[-18, 0, 0]])


# --- the loss ------------------------------------------------------------


A = np.array([[-0.3, -2.0, -5.0, -1.0]])  # teacher
S = np.array([[-0.7, -1.0, -6.0, -1.0]])
TAU, EPS = 3.0, 1e-4


def bernoulli(kind):
  p, q = (np.exp(x / TAU - EPS) for x in (A, S))
  kl = lambda p, q: p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
  r = (A - S) / TAU
  x, y = EPS - A, EPS - S
  p1, q1 = np.exp(A - EPS), np.exp(S - EPS)
  order = 0.3
  return {
    "binary_ce": -(p * np.log(q) + (1 - p) * np.log(1 - q)),
    "binary_kl": kl(p, q),
    "reverse_binary_kl": kl(q, p),
    "binary_kl_temp_limit": y - x + x * np.log(x / y),
    "abs": np.abs(A - S),
    "abs_exp": np.abs(p - q),
    "k2": r**2 / 2,
    "k3": np.exp(r) - 1 - r,
    "renyi": np.log(
      p1**order * q1 ** (1 - order)
      + (1 - p1) ** order * (1 - q1) ** (1 - order)
    )
    / (order - 1),
  }[kind]


@pytest.mark.parametrize("kind", ct._KINDS)
def test_alm_loss(kind, x64, strict):
  where = np.array([[True, True, True, False]])
  fn = functools.partial(
    ct.alm_loss, kind=kind, temperature=TAU, eps=EPS, alpha=0.3
  )
  want = np.where(where, bernoulli(kind), 0)
  np.testing.assert_allclose(
    fn(*arrays(S, A, where)), want, rtol=1e-10, atol=1e-13
  )
  np.testing.assert_allclose(
    fn(*arrays(S, A)), bernoulli(kind), rtol=1e-10, atol=1e-13
  )

  @jit
  def grads(s, a):
    return jax.grad(lambda s, a: jnp.sum(fn(s, a, jnp.asarray(where))), (0, 1))(
      s, a
    )

  grad, frozen = grads(*arrays(S, A))
  np.testing.assert_array_equal(frozen, 0)
  h = 1e-6
  up, down = fn(*arrays(S + h, A, where)), fn(*arrays(S - h, A, where))
  np.testing.assert_allclose(grad, (up - down) / (2 * h), rtol=1e-6, atol=1e-9)
  # What is not there may be anything.
  nan_s, nan_a = (np.where(where, x, np.nan) for x in (S, A))
  np.testing.assert_array_equal(
    fn(*arrays(nan_s, nan_a, where)), fn(*arrays(S, A, where))
  )
  np.testing.assert_array_equal(grads(*arrays(nan_s, nan_a))[0], grad)
  if kind not in ("binary_ce",):  # its least value is the teacher's entropy
    np.testing.assert_allclose(fn(*arrays(A, A)), 0, atol=1e-12)
  equal = jax.grad(lambda s: jnp.sum(fn(s, jnp.asarray(A))))(jnp.asarray(A))
  if kind not in ("abs", "abs_exp"):  # a kink there, any slope will do
    np.testing.assert_allclose(equal, 0, atol=1e-10)


def test_alm_limit_and_defaults(x64):
  """temperature * KL -> the limit; defaults; a certain chunk stays finite."""
  s, a = arrays(S, A)
  far = 1e6 * ct.alm_loss(s, a, kind="binary_kl", temperature=1e6, eps=0.0)
  limit = ct.alm_loss(s, a, kind="binary_kl_temp_limit", eps=0.0)
  np.testing.assert_allclose(far, limit, rtol=1e-4)
  np.testing.assert_array_equal(
    ct.alm_loss(s, a),
    ct.alm_loss(s, a, kind="binary_ce", temperature=100, eps=1e-6),
  )
  np.testing.assert_array_equal(
    ct.alm_loss(s, a, kind="renyi"),
    ct.alm_loss(s, a, kind="renyi", alpha=0.5),
  )
  certain = ct.alm_loss(
    s, jnp.zeros_like(a), kind="binary_kl_temp_limit", eps=0.0
  )
  np.testing.assert_allclose(certain, -S, rtol=1e-12)

  @jit
  def gradients(s):
    return {
      kind: jax.grad(
        lambda s, kind=kind: jnp.sum(
          ct.alm_loss(s, jnp.zeros_like(s), kind=kind)
        )
      )(s)
      for kind in ct._KINDS
    }

  for kind, grad in gradients(jnp.zeros_like(a)).items():
    assert np.all(np.isfinite(grad)), kind


def test_uld(x64, strict):
  s, t = RNG.normal(size=(2, 4)), RNG.normal(size=(2, 6))
  q = np.sort(np.exp(log_soft(s / 1.5)), -1)[:, ::-1]
  p = np.sort(np.exp(log_soft(t / 1.5)), -1)[:, ::-1]
  wide = np.concatenate([q, np.zeros((2, 2))], -1)
  fn = functools.partial(ct.uld_loss, temperature=1.5)
  np.testing.assert_allclose(
    fn(*arrays(s, t)), np.abs(p - wide).sum(-1), rtol=1e-12
  )
  np.testing.assert_allclose(
    fn(*arrays(t, s)), np.abs(p - wide).sum(-1), rtol=1e-12
  )
  np.testing.assert_array_equal(
    ct.uld_loss(*arrays(s, t)), ct.uld_loss(*arrays(s, t), temperature=1.0)
  )
  grad, frozen = jax.grad(lambda s, t: jnp.sum(fn(s, t)), (0, 1))(*arrays(s, t))
  np.testing.assert_array_equal(frozen, 0)
  numeric = np.zeros_like(s)
  for i in np.ndindex(s.shape):
    step = np.zeros_like(s)
    step[i] = 1e-6
    up, down = fn(*arrays(s + step, t)), fn(*arrays(s - step, t))
    numeric[i] = jnp.sum(up - down) / 2e-6
  np.testing.assert_allclose(grad, numeric, rtol=1e-6, atol=1e-9)


def test_bad_input():
  logits, ids, chunks, kept = arrays(np.float32(LOGITS), IDS, CHUNKS, KEPT)
  call = functools.partial(ct.chunk_log_probs, num_chunks=C)
  x = -jnp.ones((2, 3))
  n = jnp.ones((2, 3), jnp.int32)
  for make, match in (
    (lambda: call(logits[0], ids, chunks), "rank 3"),
    (lambda: call(logits, ids[:1], chunks), "ids must be"),
    (lambda: call(logits, ids, chunks[:1]), "chunk_ids must be"),
    (lambda: call(logits, ids, chunks, kept[:1]), "where must be"),
    (lambda: call(logits, ids, chunks, ids), "bool"),
    (lambda: call(logits, logits[..., 0], chunks), "integer"),
    (lambda: call(logits, ids, chunks, num_chunks=0), "num_chunks"),
    (
      lambda: ct.boundary_log_probs(
        logits, jnp.ones(4, bool), chunks, num_chunks=C
      ),
      "boundary must be",
    ),
    (lambda: ct.chunk_token_counts(chunks[0], num_chunks=C), "rank 2"),
    (lambda: ct.merge_chunks(x, x, x, x[:1], n), "teacher_boundary"),
    (lambda: ct.merge_chunks(x, x, x, x, x), "integer"),
    (lambda: ct.merge_chunks(x, x, x, x, n, threshold=2), "threshold"),
    (lambda: ct.alm_loss(x, x[:1]), "teacher_chunks"),
    (lambda: ct.alm_loss(x, x, n), "bool"),
    (lambda: ct.alm_loss(x[0], x[0]), "rank 2"),
    (lambda: ct.alm_loss(x, x, kind="binary_cd"), "did you mean 'binary_ce'"),
    (lambda: ct.alm_loss(x, x, temperature=0), "temperature"),
    (lambda: ct.alm_loss(x, x, eps=-1), "eps"),
    (lambda: ct.alm_loss(x, x, alpha=1), "alpha"),
    (lambda: ct.uld_loss(x, x[:1]), "teacher_logits"),
    (lambda: ct.uld_loss(x, x, temperature=0), "temperature"),
  ):
    with one_line_error(match):
      make()
  with distilljax.debug(), one_line_error("chunk_ids must be in"):
    call(logits, ids, chunks + 2)
  with distilljax.debug(), one_line_error(r"ids must be in \[0, 4\]"):
    call(logits, ids + 1, chunks)
  with distilljax.debug(), one_line_error("teacher_chunks must be <= 0"):
    ct.alm_loss(x, -x)


def test_low_precision(strict):
  half = jnp.asarray(LOGITS, jnp.bfloat16)
  ids, chunks = arrays(IDS, CHUNKS)
  out = ct.chunk_log_probs(half, ids, chunks, num_chunks=C)
  assert out.dtype == jnp.float32
  assert ct.uld_loss(half, half).dtype == jnp.float32
  assert ct.alm_loss(out.astype(jnp.bfloat16), out).dtype == jnp.float32
  huge = ct.chunk_log_probs(half * 1e4, ids, chunks, num_chunks=C)

  @jit
  def both(s, a):
    return {
      kind: jax.value_and_grad(
        lambda s, kind=kind: jnp.sum(ct.alm_loss(s, a, kind=kind))
      )(s)
      for kind in ct._KINDS
    }

  for kind, (value, grad) in both(huge, out).items():
    assert np.isfinite(value) and np.all(np.isfinite(grad)), kind
  assert math.isfinite(float(jnp.sum(huge)))
