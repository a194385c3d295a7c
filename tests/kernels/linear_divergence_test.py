"""`kernels.linear_divergence` against `losses` on materialised logits.

The oracle is always float64: logits of the head written out in full, and the
function of `losses` that `kind` names. Shapes are awkward on purpose: v prime,
n odd, widths unequal, chunks that do not divide the vocabulary.
"""

import doctest
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import distilljax
from distilljax import kernels, losses
from distilljax.kernels.linear_head import api
from tests.helpers import one_line_error

N, D, E, V, CHUNK = 7, 5, 3, 37, 8
# softcap and scale of the student, of the teacher, and: is the kernel tied?
HEADS = {
    0.5: ((3.0, 0.7), (None, 1.3), True),
    1: ((None, None), (None, None), False),
    2.5: ((None, -0.6), (4.0, None), False),
}
OPTIONS = {
    "generalized_jsd": {"beta": 0.3},
    "skew_forward_kl": {"alpha": 0.2},
    "skew_reverse_kl": {"alpha": 0.2},
}


def quick(*names, of=api.DENSE):
  """All kinds; those that are not named are slow."""
  return [
      k if k in names else pytest.param(k, marks=pytest.mark.slow) for k in of
  ]


@functools.cache
def arrays(v=V):
  """Weights, hidden states, and a mask as the cotangent of the losses."""
  rng = np.random.default_rng(0)
  return {
      "hidden": rng.normal(size=(N, D)),
      "kernel": rng.normal(size=(D, v)),
      "bias": rng.normal(size=(v,)),
      "t_hidden": rng.normal(size=(N, E)),
      "t_kernel": rng.normal(size=(E, v)),
      "r_hidden": rng.normal(size=(N, 4)),
      "r_kernel": rng.normal(size=(4, v)),
      "weights": rng.normal(size=(N,)) * (np.arange(N) % 3 > 0),
  }


def logits(hidden, kernel, bias=None, cap=(None, None)):
  """A head's logits in full, as the docstring of `Head` has them."""
  z = jnp.matmul(hidden, kernel, precision="highest")
  z = z if bias is None else z + bias[None, :]
  softcap, scale = cap
  z = z if scale is None else scale * z
  return z if softcap is None else softcap * jnp.tanh(z / softcap)


def plain(kind, s, t, r=None, **options):
  if kind == "gopd":
    return losses.gopd_loss(s, t, r, **options)
  return getattr(losses, kind)(s, t, **options)


def assert_close(got, want, tolerance):
  """Relative to the largest entry of each array."""
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    np.testing.assert_allclose(
        a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-2)
    )


def both(kind, temperature, x, fused=None, **options):
  """((values, gradients) of the fused form, those of the plain one)."""
  student_cap, teacher_cap, tied = HEADS[temperature]
  weights = x["weights"]
  w = {k: x[k] for k in ("hidden", "kernel", "bias")}

  def run_fused(w):
    kernel = w["kernel"].T if tied else w["kernel"]
    head = kernels.Head(kernel, w["bias"], *student_cap, tied=tied)
    teacher = (x["t_hidden"], kernels.Head(x["t_kernel"], None, *teacher_cap))
    reference = (x["r_hidden"], x["r_kernel"]) if kind == "gopd" else None
    return kernels.linear_divergence(
        w["hidden"], head, teacher, kind=kind, temperature=temperature,
        reference=reference, chunk_size=CHUNK, **(fused or {}), **options,
    )  # fmt: skip

  def run_plain(w):
    s = logits(w["hidden"], w["kernel"], w["bias"], student_cap)
    t = logits(x["t_hidden"], x["t_kernel"], None, teacher_cap)
    r = logits(x["r_hidden"], x["r_kernel"])
    return plain(kind, s, t, r, temperature=temperature, **options)

  def scalar(run, w):
    values = run(w)
    return jnp.sum(values * weights), values

  return [
      jax.jit(jax.value_and_grad(functools.partial(scalar, f), has_aux=True))
      for f in (run_fused, run_plain)
  ], w


def hessian_times(slopes, w, tangents):
  """Tangents of the gradients that `slopes` gives after its values."""
  along = lambda w: jax.jvp(lambda w: slopes(w)[1], (w,), (tangents,))[1]
  return jax.jit(along)(w)


@functools.cache
def oracle_numbers(kind, temperature):
  """(values, gradients) of the plain loss in float64, as NumPy arrays."""
  with jax.enable_x64(True):
    x = cast(arrays(), jnp.float64)
    (_, oracle), w = both(kind, temperature, x, **OPTIONS.get(kind, {}))
    (_, values), gradients = oracle(w)
    return jax.tree.map(np.asarray, (values, gradients))


def cast(tree, dtype):
  return {k: jnp.asarray(a, dtype) for k, a in tree.items()}


def assert_as_plain(fused, plain, oracle, x):
  """(values, gradients) at logits of 1e3: as near as the plain ones."""
  # A logit of 1e3 is rounded to 1e3 2^-24, and a few of them are compared;
  # where q moves with it, the plain loss loses as much in float32.
  got, rounded, want = (np.asarray(a[0]) for a in (fused, plain, oracle))
  allowed = 2 * np.abs(rounded - want) + 1e3 * 2**-22
  assert np.all(np.abs(got - want) <= allowed)
  # A slope has the rounding of the logits it compares, times what follows.
  follows = {"hidden": x["kernel"], "kernel": x["hidden"], "bias": 1}
  for k, f in follows.items():
    wanted = np.asarray(oracle[1][k])
    worst = [
        np.abs(np.asarray(a[1][k]) - wanted).max() for a in (fused, plain)
    ]
    assert worst[0] <= 2 * worst[1] + 1e3 * 2**-22 * np.abs(f).max()


# Every kind at 1 and at one more temperature; the third is slow.
CASES = [
    pytest.param(
        kind, t, marks=() if t in (1, (0.5, 2.5)[i % 2]) else pytest.mark.slow
    )
    for i, kind in enumerate(api.DENSE)
    for t in HEADS
]


@pytest.mark.parametrize(("kind", "temperature"), CASES)
def test_every_kind_is_the_plain_loss(kind, temperature, x64, strict):
  x = cast(arrays(), jnp.float64)
  (fused, _), w = both(kind, temperature, x, **OPTIONS.get(kind, {}))
  (_, values), gradients = fused(w)
  want = oracle_numbers(kind, temperature)
  assert_close((values, gradients), want, 1e-13)


@pytest.mark.parametrize("temperature", quick(1, of=HEADS))
@pytest.mark.parametrize("kind", quick("reverse_kl", "skew_forward_kl"))
def test_float32_to_its_last_digits(kind, temperature):
  options = OPTIONS.get(kind, {})
  x = cast(arrays(), jnp.float32)
  (fused, _), w = both(kind, temperature, x, **options)
  (_, got), gradients = fused(w)
  want, wanted = oracle_numbers(kind, temperature)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
  assert_close(gradients, wanted, 1e-6)


@pytest.mark.parametrize("kind", quick("reverse_kl", "generalized_jsd"))
def test_exact_is_the_same_value(kind, x64):
  x = cast(arrays(), jnp.float64)
  options = OPTIONS.get(kind, {})
  (fused, _), w = both(kind, 2.5, x, {"exact": True}, **options)
  (_, values), gradients = fused(w)
  assert_close((values, gradients), oracle_numbers(kind, 2.5), 1e-13)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
def test_exact_keeps_a_tiny_kl(kind):
  # KL = Var(difference) / 2 to first order: about 1e-8 here, a tenth of a
  # rounding of the logits.
  x = arrays()
  near = x["hidden"] + 1e-4 * np.roll(x["hidden"], 1, axis=0)
  run = lambda exact, dtype: kernels.linear_divergence(
      *(jnp.asarray(a, dtype) for a in (near, x["kernel"])),
      tuple(jnp.asarray(a, dtype) for a in (x["hidden"], x["kernel"])),
      kind=kind, exact=exact, chunk_size=CHUNK,
  )  # fmt: skip
  got = run(True, jnp.float32)
  with jax.enable_x64(True):
    want = run(False, jnp.float64)
  assert np.all(np.asarray(want) < 1e-6)
  assert np.all(np.asarray(got) > 0)
  # The hidden states' own rounding is 1e-3 of the difference.
  np.testing.assert_allclose(got, want, rtol=2e-2)


def test_the_ends_are_the_kls():
  x = cast(arrays(), jnp.float32)
  s = (x["hidden"], x["kernel"])
  t = (x["t_hidden"], x["t_kernel"])
  run = lambda kind, **options: np.asarray(
      kernels.linear_divergence(
          *s, t, kind=kind, chunk_size=CHUNK, **options
      )
  )  # fmt: skip
  forward, reverse = run("forward_kl"), run("reverse_kl")
  assert np.all(np.abs(forward - reverse) > 1e-2)
  assert np.array_equal(run("generalized_jsd", beta=0), forward)
  assert np.array_equal(run("generalized_jsd", beta=1), reverse)
  assert np.array_equal(run("skew_forward_kl", alpha=0), forward)
  assert np.array_equal(run("skew_reverse_kl", alpha=0), reverse)
  assert np.array_equal(run("gopd", reward_scale=1), reverse)
  assert np.array_equal(run("skew_forward_kl", alpha=1), np.zeros(N))


def test_reward_scale_per_token(x64):
  x = cast(arrays(), jnp.float64)
  scale = jnp.linspace(0.5, 2.0, N)
  (fused, oracle), w = both("gopd", 1, x, reward_scale=scale)
  assert_close(fused(w), oracle(w), 1e-13)


# --- sparse teachers -----------------------------------------------------


def top_k(x, k):
  log_p = jax.nn.log_softmax(logits(x["t_hidden"], x["t_kernel"]) / 1.5)
  log_p, ids = jax.lax.top_k(log_p, k)
  return ids.astype(jnp.int32), log_p


def both_sparse(kind, x, teacher, tangents=None, **options):
  """((values, gradients) of the fused form, those of the plain one).

  With tangents: the gradients' tangents.
  """
  w = {k: x[k] for k in ("hidden", "kernel", "bias")}

  def fused(w):
    return kernels.linear_divergence(
        w["hidden"], kernels.Head(w["kernel"], w["bias"]), teacher, kind=kind,
        chunk_size=CHUNK, **options,
    )  # fmt: skip

  def oracle(w):
    s = logits(w["hidden"], w["kernel"], w["bias"])
    return getattr(losses, kind)(s, *teacher, **options)

  def scalar(run, w):
    values = run(w)
    return jnp.sum(values * x["weights"]), values

  def run(f):
    slopes = jax.value_and_grad(functools.partial(scalar, f), has_aux=True)
    if tangents is not None:
      return hessian_times(slopes, w, tangents)
    (_, values), gradients = jax.jit(slopes)(w)
    return values, gradients

  return run(fused), run(oracle)


# Each tail at a temperature, one direction of it; the rest is slow.
TAILS = {"bucket": 0.5, "renormalize": 1, "drop": 2.5}
SPARSE_CASES = [
    pytest.param(
        kind, tail, t,
        marks=() if TAILS[tail] == t and (i + j) % 2 == 0 else pytest.mark.slow,
    )
    for i, kind in enumerate(api.SPARSE)
    for j, tail in enumerate(TAILS)
    for t in HEADS
]  # fmt: skip


@pytest.mark.parametrize(("kind", "tail", "temperature"), SPARSE_CASES)
def test_a_cached_teacher(kind, tail, temperature, x64, strict):
  x = cast(arrays(), jnp.float64)
  got, want = both_sparse(
      kind, x, top_k(x, 6), tail=tail, temperature=temperature
  )
  assert_close(got, want, 1e-13)


@pytest.mark.parametrize("temperature", quick(1, of=HEADS))
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", quick("sparse_reverse_kl", of=api.SPARSE))
def test_a_cached_teacher_in_float32_and_below(kind, tail, temperature):
  low = cast(arrays(), jnp.float32)
  teacher = top_k(low, 6)
  options = {"tail": tail, "temperature": temperature}
  got, _ = both_sparse(kind, low, teacher, **options)
  with jax.enable_x64(True):
    x = cast(arrays(), jnp.float64)
    known = (teacher[0], teacher[1].astype(jnp.float64))
    _, want = both_sparse(kind, x, known, **options)
  assert got[0].dtype == jnp.float32
  np.testing.assert_allclose(got[0], want[0], rtol=1e-6, atol=1e-6)
  # A temperature below 1 multiplies the rounding of a logit.
  assert_close(got[1], want[1], 1e-6 / min(temperature, 1))


@pytest.mark.slow
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", api.SPARSE)
def test_a_cached_teacher_of_huge_logits(kind, tail):
  x = arrays()
  x = {**x, **{k: 300 * x[k] for k in ("kernel", "t_kernel")}}
  low = cast(x, jnp.float32)
  teacher = top_k(low, 6)
  got, rounded = both_sparse(kind, low, teacher, tail=tail)
  with jax.enable_x64(True):
    known = (teacher[0], teacher[1].astype(jnp.float64))
    _, want = both_sparse(kind, cast(x, jnp.float64), known, tail=tail)
  assert np.abs(logits(x["hidden"], x["kernel"])).max() > 1e3
  assert_as_plain(got, rounded, want, x)


@pytest.mark.slow
@pytest.mark.parametrize(("v", "k"), [(V, 6), (V, V), (1, 1)])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", api.SPARSE)
def test_a_cached_teacher_that_is_the_student(kind, tail, v, k):
  x = cast(arrays(), jnp.float32)
  kernel = x["kernel"][:, :v]
  log_q = jax.nn.log_softmax(logits(x["hidden"], kernel))
  teacher = jax.lax.top_k(log_q, k)[::-1]
  value, vjp = jax.vjp(
      jax.jit(lambda h: kernels.linear_divergence(
          h, kernel, teacher, kind=kind, tail=tail, chunk_size=CHUNK
      )),
      x["hidden"],
  )  # fmt: skip
  np.testing.assert_allclose(value, 0, atol=2e-6)
  if tail != "drop" or k == v:
    # What is dropped has a slope: mass may leave the top.
    np.testing.assert_allclose(vjp(jnp.ones(N))[0], 0, atol=3e-6)


@pytest.mark.parametrize("kind", api.SPARSE)
def test_all_of_the_vocabulary_is_no_tail(kind, x64):
  x = cast(arrays(11), jnp.float64)
  got = kernels.linear_divergence(
      x["hidden"], x["kernel"], top_k(x, 11), kind=kind, temperature=1.5,
      chunk_size=4,
  )  # fmt: skip
  s = logits(x["hidden"], x["kernel"])
  t = logits(x["t_hidden"], x["t_kernel"])
  want = getattr(losses, kind.removeprefix("sparse_"))(s, t, temperature=1.5)
  assert_close(got, want, 1e-13)


# --- statistics ----------------------------------------------------------


def statistics(w, x, ids, **options):
  return kernels.linear_token_statistics(
      w["hidden"], kernels.Head(w["kernel"], w["bias"], *HEADS[0.5][0]),
      (x["t_hidden"], x["t_kernel"]), ids=ids, top_k=4, temperature=1.5,
      **{"chunk_size": 3, **options},
  )  # fmt: skip


def plain_statistics(w, x, ids, kind="reverse_kl", v=V):
  s = logits(w["hidden"], w["kernel"], w["bias"], HEADS[0.5][0])[:, :v]
  t = logits(x["t_hidden"], x["t_kernel"])[:, :v]
  log_q, log_p = jax.nn.log_softmax(s), jax.nn.log_softmax(t)
  at = lambda a, i: jnp.take_along_axis(a, i, axis=1)
  (top_q, ids_q), (top_p, ids_p) = (jax.lax.top_k(a, 4) for a in (log_q, log_p))
  return kernels.LinearTokenStatistics(
      loss=plain(kind, s, t, temperature=1.5),
      student_entropy=-jnp.sum(jnp.exp(log_q) * log_q, axis=1),
      teacher_entropy=-jnp.sum(jnp.exp(log_p) * log_p, axis=1),
      student_log_probs=at(log_q, ids),
      teacher_log_probs=at(log_p, ids),
      student_log_normalizer=jax.nn.logsumexp(s, axis=1),
      teacher_log_normalizer=jax.nn.logsumexp(t, axis=1),
      student_top_ids=ids_q,
      student_top_log_probs=top_q,
      teacher_top_ids=ids_p,
      teacher_top_log_probs=top_p,
      student_top_teacher_log_probs=at(log_p, ids_q),
      topk_overlap=losses.topk_overlap(ids_q, ids_p),
      forward_kl=losses.forward_kl(s, t),
      reverse_kl=losses.reverse_kl(s, t),
  )


def some_of(s, weights):
  """A scalar that everything differentiable is in."""
  picks = jnp.array([1.0, -0.5], s.loss.dtype)
  return jnp.sum(
      weights * (s.loss + 0.7 * s.student_entropy)
      + jnp.sum(s.student_log_probs * picks[None, :], axis=1)
      + 0.3 * weights**2 * s.student_log_normalizer
  )


def some_ids():
  return jnp.asarray(
      np.random.default_rng(1).integers(0, 30, (N, 2)), jnp.int32
  )


def test_statistics_and_their_gradients(x64, strict):
  x, ids = cast(arrays(), jnp.float64), some_ids()
  w = {k: x[k] for k in ("hidden", "kernel", "bias")}

  def run(f, w):
    s = f(w, x, ids)
    return some_of(s, x["weights"]), s

  run_jit = lambda f: jax.jit(
      jax.value_and_grad(functools.partial(run, f), has_aux=True)
  )(w)
  got, want = run_jit(statistics), run_jit(plain_statistics)
  assert_close(got, want, 1e-13)


def test_nobody_pays_for_the_slopes_of_what_is_only_logged():
  x, ids = cast(arrays(), jnp.float32), some_ids()
  w = {k: x[k] for k in ("hidden", "kernel", "bias")}

  def of(*fields):
    def scalar(w):
      s = statistics(w, x, ids)
      kept = sum(jnp.sum(getattr(s, f)) for f in fields)
      return kept, (s.student_entropy, s.student_log_probs)

    found = re.search(
        r"linear_head_backward\[.*?outputs=\(([^)]*)\)",
        str(jax.make_jaxpr(jax.grad(scalar, has_aux=True))(w)), re.S,
    )  # fmt: skip
    return found[1].replace("'", "").rstrip(",").split(", ")

  assert of("loss") == ["loss"]
  assert of("loss", "student_entropy") == ["loss", "entropy"]
  assert of("student_log_probs") == ["lse", "picks"]


@pytest.mark.slow
def test_statistics_with_a_cached_teacher(x64):
  x, ids = cast(arrays(), jnp.float64), some_ids()
  teacher = top_k(x, 6)
  s = jax.jit(lambda: kernels.linear_token_statistics(
      x["hidden"], x["kernel"], teacher, kind="sparse_forward_kl",
      ids=ids[:, 0], temperature=1.5, chunk_size=CHUNK,
  ))()  # fmt: skip
  z = logits(x["hidden"], x["kernel"])
  want = losses.sparse_forward_kl(z, *teacher, temperature=1.5)
  assert_close(s.loss, want, 1e-13)
  log_q = jnp.take_along_axis(jax.nn.log_softmax(z), ids, axis=1)
  # Flat ids give flat log-probabilities.
  assert_close(s.student_log_probs, log_q[:, 0], 1e-13)
  for name in ("teacher_entropy", "teacher_log_probs", "topk_overlap"):
    assert getattr(s, name) is None


# --- derivatives of both modes -------------------------------------------


@pytest.mark.parametrize(
    "reverse", [False, pytest.param(True, marks=pytest.mark.slow)]
)
def test_forward_mode_and_hessian_vector_products(reverse, x64):
  x, ids = cast(arrays(), jnp.float64), some_ids()
  w = {k: x[k] for k in ("hidden", "kernel", "bias")}
  rng = np.random.default_rng(2)
  t = {k: jnp.asarray(rng.normal(size=a.shape)) for k, a in w.items()}

  def run(f, **options):
    value = lambda w: some_of(
        f(w, x, ids, kind="skew_reverse_kl", **options), x["weights"]
    )
    tangent = lambda w: jax.jvp(value, (w,), (t,))[1]
    if reverse:
      return jax.jit(jax.grad(tangent))(w)
    return jax.jit(
        lambda w: (tangent(w), jax.jvp(jax.grad(value), (w,), (t,))[1])
    )(w)

  got = run(statistics, chunk_size=CHUNK)
  assert_close(got, run(plain_statistics), 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.5, 2.5])
@pytest.mark.parametrize("kind", api.DENSE)
def test_a_hessian_times_a_vector_of_every_kind(kind, temperature, x64):
  x = cast(arrays(), jnp.float64)
  rng = np.random.default_rng(3)
  for exact in (False, True):
    programs, w = both(
        kind, temperature, x, {"exact": exact}, **OPTIONS.get(kind, {})
    )
    t = {k: jnp.asarray(rng.normal(size=a.shape)) for k, a in w.items()}
    got, want = (hessian_times(f, w, t) for f in programs)
    assert_close(got, want, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("kind", api.SPARSE)
def test_a_hessian_times_a_vector_with_a_cached_teacher(kind, tail, x64):
  x = cast(arrays(), jnp.float64)
  rng = np.random.default_rng(3)
  t = {
      k: jnp.asarray(rng.normal(size=x[k].shape))
      for k in ("hidden", "kernel", "bias")
  }
  got, want = both_sparse(
      kind, x, top_k(x, 6), t, tail=tail, temperature=2.5
  )
  assert_close(got, want, 1e-11)


@pytest.mark.slow
def test_vmap_and_reverse_over_reverse(x64):
  x = cast(arrays(), jnp.float64)
  hidden = jnp.stack([x["hidden"], 2 * x["hidden"]])
  teacher = (x["t_hidden"], x["t_kernel"])

  def fused(hidden, kernel):
    return jnp.sum(x["weights"] * kernels.linear_divergence(
        hidden, kernel, teacher, kind="reverse_kl", chunk_size=16
    ))  # fmt: skip

  def oracle(hidden, kernel):
    return jnp.sum(
        x["weights"] * losses.reverse_kl(
            logits(hidden, kernel), logits(*teacher)
        )
    )  # fmt: skip

  def run(f):
    per_row = jax.vmap(jax.value_and_grad(f, (0, 1)), (0, None))
    norm = lambda k: jnp.sum(jax.grad(f, 1)(x["hidden"], k) ** 2)
    return jax.jit(lambda k: (per_row(hidden, k), jax.grad(norm)(k)))(
        x["kernel"]
    )

  assert_close(run(fused), run(oracle), 1e-12)


def test_the_teacher_is_frozen():
  x = cast(arrays(), jnp.float32)

  def value(t):
    return jnp.sum(
        kernels.linear_divergence(
            x["hidden"], x["kernel"], (t["hidden"], t["kernel"]), kind="gopd",
            reference=(t["r_hidden"], t["r_kernel"]), chunk_size=CHUNK,
            reward_scale=t["scale"],
        )
    )  # fmt: skip

  t = {
      "hidden": x["t_hidden"],
      "kernel": x["t_kernel"],
      "r_hidden": x["r_hidden"],
      "r_kernel": x["r_kernel"],
      "scale": jnp.full((N,), 1.5),
  }
  for a in jax.tree.leaves(jax.grad(value)(t)):
    assert not np.any(a)


# --- shapes and extremes -------------------------------------------------


def test_no_array_of_rows_times_vocabulary_and_no_padded_head():
  x = cast(arrays(), jnp.float32)
  for kind in ("reverse_kl", "generalized_jsd"):
    (fused, oracle), w = both(kind, 1, x)
    text = fused.lower(w).as_text()
    assert not re.search(rf"{N}x{V}x|{V}x{N}x|stablehlo.pad", text)
    # Of the kernel's own shape: the gradient, never a transposed copy.
    assert f"{V}x{D}x" not in text
    assert re.search(rf"{N}x{V}x", oracle.lower(w).as_text())


@pytest.mark.parametrize(
    "platform,expected",
    [("tpu", (4096, 2048, 1024)), ("gpu", (2048, 2048, 1024)),
     ("cuda", (2048, 2048, 1024)), ("cpu", (2048, 1024, 2048)),
     ("another", (4096, 2048, 1024))],
)  # fmt: skip
def test_the_chunk_of_a_platform(platform, expected, monkeypatch):
  monkeypatch.setattr(api.platform, "platform", lambda: platform)
  h, w = jnp.ones((3, 2)), jnp.ones((2, 9000))

  def widest(teacher=(h, w), **options):
    fn = lambda h: kernels.linear_divergence(h, w, teacher, **options)
    text = str(jax.make_jaxpr(fn)(h))
    return max(int(a) for a in re.findall(r"f32\[3,(\d+)\]", text))

  assert widest(kind="reverse_kl") == expected[0]
  assert widest(kind="gopd", reference=(h, w)) == expected[1]
  cached = (jnp.zeros((3, 1), jnp.int32), jnp.zeros((3, 1)))
  assert widest(cached, kind="sparse_forward_kl") == expected[2]


def test_logits_as_teacher_and_trimmed_vocabularies(x64):
  x = cast(arrays(), jnp.float64)
  t = logits(x["t_hidden"], x["t_kernel"])[:, :31]
  r = logits(x["r_hidden"], x["r_kernel"])[:, :33]
  run = lambda f: jax.jit(
      jax.value_and_grad(lambda k: jnp.sum(x["weights"] * f(k)))
  )(x["kernel"])
  got = run(lambda k: kernels.linear_divergence(
      x["hidden"], k, t, kind="gopd", reference=r, vocab_size=29,
      chunk_size=CHUNK,
  ))  # fmt: skip
  want = run(lambda k: losses.gopd_loss(
      logits(x["hidden"], k), t, r, vocab_size=29
  ))  # fmt: skip
  assert_close(got, want, 1e-13)
  assert not np.any(got[1][:, 29:])


@pytest.mark.parametrize("kind", ["reverse_kl", "sparse_forward_kl"])
def test_only_the_chosen_rows_reach_the_head(kind):
  x = cast(arrays(), jnp.float32)
  rows = jnp.array([5, 0, 5])
  sparse = kind.startswith("sparse")
  teacher = top_k(x, 3) if sparse else (x["t_hidden"], x["t_kernel"])

  @jax.jit
  def run(rows=None):
    return kernels.linear_divergence(
        x["hidden"], x["kernel"], teacher, kind=kind, chunk_size=CHUNK,
        rows=rows,
    )  # fmt: skip

  np.testing.assert_allclose(run(rows=rows), run()[rows], atol=1e-6)
  text = run.lower(rows=rows).as_text()
  assert f"{N}x{CHUNK}x" not in text
  assert f"3x{CHUNK}x" in text


@pytest.mark.parametrize("kind", quick("generalized_jsd"))
def test_bfloat16_in_float32_statistics(kind):
  x = cast(arrays(), jnp.bfloat16)
  x["weights"] = x["weights"].astype(jnp.float32)
  (fused, _), w = both(kind, 1, x)
  (_, got), gradients = fused(w)
  with jax.enable_x64(True):
    wide = {k: jnp.asarray(np.asarray(a, np.float64)) for k, a in x.items()}
    (_, oracle), w = both(kind, 1, wide)
    (_, want), wanted = oracle(w)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
  assert {a.dtype for a in gradients.values()} == {jnp.dtype(jnp.bfloat16)}
  # Slopes and results are rounded to bfloat16 once each.
  assert_close(gradients, wanted, 2 * 2**-8)


@pytest.mark.parametrize("kind", quick("forward_kl"))
def test_huge_logits(kind):
  x = arrays()
  x = {**x, **{k: 300 * x[k] for k in ("kernel", "t_kernel", "r_kernel")}}
  (fused, low), w = both(kind, 1, cast(x, jnp.float32))
  (_, got), gradients = fused(w)
  (_, rounded), slopes = low(w)
  with jax.enable_x64(True):
    (_, oracle), w = both(kind, 1, cast(x, jnp.float64))
    (_, want), wanted = oracle(w)
  assert np.abs(logits(x["hidden"], x["kernel"])).max() > 1e3
  assert_as_plain((got, gradients), (rounded, slopes), (want, wanted), x)


@pytest.mark.parametrize("kind", quick("forward_kl", "skew_reverse_kl"))
def test_identical_models_and_one_token(kind):
  x = cast(arrays(), jnp.float32)

  def run(kernel):
    same = (x["hidden"], kernel)
    return jax.jit(jax.vjp, static_argnums=0)(
        lambda h: kernels.linear_divergence(
            h, kernel, same, kind=kind, reference=same,
            chunk_size=CHUNK,
        ),
        x["hidden"],
    )  # fmt: skip

  value, vjp = run(x["kernel"])
  # A few roundings of sums of order log v.
  np.testing.assert_allclose(value, 0, atol=2e-6)
  np.testing.assert_allclose(vjp(jnp.ones(N))[0], 0, atol=2e-6)
  one, vjp = run(x["kernel"][:, :1])
  assert not np.any(one) and not np.any(vjp(jnp.ones(N))[0])


@pytest.mark.parametrize("kind", quick("forward_kl", of=api.DENSE[:-1]))
def test_tokens_outside_the_support(kind, x64):
  # The first chunk and one token of the others have no mass in either model.
  x = cast(arrays(), jnp.float64)
  dead = jnp.where((jnp.arange(V) < CHUNK) | (jnp.arange(V) == 20), -jnp.inf, 0)
  head = lambda k: kernels.Head(k, dead)
  run = lambda f: jax.jit(
      jax.value_and_grad(lambda h: jnp.sum(x["weights"] * f(h)))
  )(x["hidden"])
  got = run(lambda h: kernels.linear_divergence(
      h, head(x["kernel"]), (x["t_hidden"], head(x["t_kernel"])), kind=kind,
      chunk_size=CHUNK,
  ))  # fmt: skip
  want = run(lambda h: plain(
      kind, logits(h, x["kernel"], dead),
      logits(x["t_hidden"], x["t_kernel"], dead),
  ))  # fmt: skip
  assert np.all(np.isfinite(want[1]))
  assert_close(got, want, 1e-13)


# --- a vocabulary cut over devices ---------------------------------------


def sharded_loss(w, x, ids, axis_name, vocab_size):
  options = {"axis_name": axis_name, "vocab_size": vocab_size}
  if vocab_size is not None:
    # Three of the last device's eight columns are padding.
    value = kernels.linear_divergence(
        w["hidden"], kernels.Head(w["kernel"].T, w["bias"], tied=True),
        (x["t_hidden"], x["t_kernel"]), kind="reverse_kl", chunk_size=3,
        **options,
    )  # fmt: skip
    return jnp.sum(value * x["weights"]), value
  s = statistics(w, x, ids, kind="generalized_jsd", **options)
  sparse = kernels.linear_divergence(
      w["hidden"], w["kernel"], some_top_k(ids), kind="sparse_forward_kl",
      chunk_size=5, **options,
  )  # fmt: skip
  return some_of(s, x["weights"]) + jnp.sum(sparse * x["weights"]), s


def some_top_k(ids):
  distinct = jnp.stack([ids[:, 0], (ids[:, 0] + 11) % 29], axis=1)
  return distinct, jnp.log(jnp.full(distinct.shape, 0.3))


CUT = {
    "hidden": P(), "kernel": P(None, "v"), "bias": P("v"), "t_hidden": P(),
    "t_kernel": P(None, "v"), "weights": P(),
}  # fmt: skip


@pytest.mark.parametrize(
    "vocab_size", [None, pytest.param(29, marks=pytest.mark.slow)]
)
def test_four_devices_are_one(vocab_size, x64, strict):
  x, ids = cast(arrays(32), jnp.float64), some_ids() % 29
  x = {k: x[k] for k in CUT}
  w = {k: x.pop(k) for k in ("hidden", "kernel", "bias")}
  grad = lambda axis_name: jax.value_and_grad(
      lambda w, x: sharded_loss(w, x, ids, axis_name, vocab_size),
      has_aux=True,
  )
  want = jax.jit(grad(None))(w, x)
  mesh = jax.make_mesh(
      (4,), ("v",), (AxisType.Auto,), devices=jax.devices()[:4]
  )
  cut = lambda tree: {k: NamedSharding(mesh, CUT[k]) for k in tree}
  placed = jax.device_put((w, x), (cut(w), cut(x)))
  if vocab_size is None:
    # The user's code has no shard_map.
    with jax.set_mesh(mesh):
      program = jax.jit(grad("v"))
      got = program(*placed)
      text = program.lower(*placed).as_text()
    # What is reduced has rows, or rows and hidden width, never columns.
    reduced = re.findall(
        r'"stablehlo.all_reduce".*?\}\) : \(([^)]*)\)', text, re.S
    )
    assert len(reduced) > 3
    for shapes in reduced:
      for dims in re.findall(r"tensor<((?:\d+x)*)", shapes):
        assert np.prod([int(d) for d in dims.split("x")[:-1]]) <= 4 * N * D
    assert "all_gather" not in text
    assert got[1]["kernel"].sharding.spec == P(None, "v")
  else:
    specs = lambda tree: {k: CUT[k] for k in tree}
    got = jax.jit(
        jax.shard_map(
            grad("v"), mesh=mesh, in_specs=(specs(w), specs(x)),
            out_specs=((P(), P()), specs(w)),
        )
    )(*placed)  # fmt: skip
  assert_close(got, want, 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", api.DENSE + api.SPARSE)
def test_four_devices_are_one_for_every_kind(kind, x64):
  x = cast(arrays(32), jnp.float64)
  teacher = (x["t_hidden"], x["t_kernel"])
  options = {**OPTIONS.get(kind, {}), "temperature": 2.5}
  if kind in api.SPARSE:
    teacher = top_k(x, 6)
  elif kind == "gopd":
    options["reference"] = (x["r_hidden"], x["r_kernel"])

  def loss(w, axis_name):
    head = kernels.Head(w["kernel"], w["bias"])
    values = kernels.linear_divergence(
        w["hidden"], head, teacher, kind=kind, chunk_size=3,
        axis_name=axis_name, **options,
    )  # fmt: skip
    return jnp.sum(values * x["weights"]), values

  w = {k: x[k] for k in ("hidden", "kernel", "bias")}
  run = lambda axis_name: jax.jit(
      jax.value_and_grad(
          functools.partial(loss, axis_name=axis_name), has_aux=True
      )
  )(w)
  mesh = jax.make_mesh(
      (4,), ("v",), (AxisType.Auto,), devices=jax.devices()[:4]
  )
  want = run(None)
  with jax.set_mesh(mesh):
    got = run("v")
  assert_close(got, want, 1e-12)


def test_axis_name_without_a_mesh_or_a_cut_head():
  x = cast(arrays(32), jnp.float32)
  run = lambda hidden, kernel: kernels.linear_divergence(
      hidden, kernel, (x["t_hidden"], x["t_kernel"]), kind="forward_kl",
      axis_name="v",
  )  # fmt: skip
  with one_line_error("axis_name must be an axis of a shard_map"):
    run(x["hidden"], x["kernel"])
  mesh = jax.make_mesh(
      (4,), ("v",), (AxisType.Auto,), devices=jax.devices()[:4]
  )
  for options in ({}, {"check_vma": False}):
    whole = jax.shard_map(
        run, mesh=mesh, in_specs=P(), out_specs=P(), **options
    )
    with one_line_error("student_head must be cut over axis_name='v'"):
      whole(x["hidden"], x["kernel"])
  with jax.set_mesh(mesh), one_line_error("divisible by its 4 devices"):
    kernels.linear_divergence(
        x["hidden"], x["kernel"][:, :30], jnp.zeros((N, 30)),
        kind="forward_kl", axis_name="v",
    )  # fmt: skip


# --- training ------------------------------------------------------------


CURVES = {
    **{kind: {} for kind in api.DENSE},
    "reverse_kl exact": {"exact": True},
    "skew_reverse_kl exact": {"exact": True},
    **{
        f"{kind} {tail}": {"tail": tail}
        for kind in api.SPARSE for tail in TAILS
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CURVES)
def test_the_same_training_curve_as_the_plain_loss(case):
  kind, options = case.partition(" ")[0], CURVES[case]
  x = cast(arrays(), jnp.float32)
  mix = OPTIONS.get(kind, {})
  teacher = (x["t_hidden"], x["t_kernel"])
  reference = (x["r_hidden"], x["r_kernel"]) if kind == "gopd" else None
  if kind in api.SPARSE:
    teacher = top_k(x, 6)

  def fused(w):
    return kernels.linear_divergence(
        w["hidden"], w["kernel"], teacher, kind=kind, chunk_size=CHUNK,
        reference=reference, **options, **mix,
    )  # fmt: skip

  def materialised(w):
    s = logits(w["hidden"], w["kernel"])
    if kind in api.SPARSE:
      return getattr(losses, kind)(s, *teacher, **options)
    r = logits(*reference) if reference else None
    return plain(kind, s, logits(*teacher), r, **mix)

  def curve(loss):
    def step(w, _):
      value, g = jax.value_and_grad(lambda w: jnp.mean(loss(w)))(w)
      return jax.tree.map(lambda a, b: a - 0.5 * b, w, g), value

    w = {"hidden": x["hidden"], "kernel": x["kernel"]}
    return jax.jit(lambda w: jax.lax.scan(step, w, None, length=20)[1])(w)

  got, want = curve(fused), curve(materialised)
  # The slowest, total variation, comes down by 9 %.
  assert want[-1] < want[0] - 0.05 * abs(want[0])
  # A step carries the roundings of those before it.
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


# --- bad input -----------------------------------------------------------


def bad(match, kind="forward_kl", fn=None, **changes):
  x = arrays()
  given = {
      "hidden": x["hidden"], "head": x["kernel"],
      "teacher": (x["t_hidden"], x["t_kernel"]),
  }  # fmt: skip
  given.update({k: changes.pop(k) for k in list(changes) if k in given})
  with one_line_error(match):
    (fn or kernels.linear_divergence)(*given.values(), kind=kind, **changes)


def test_bad_input_is_one_line():
  x = arrays()
  t = (x["t_hidden"], x["t_kernel"])
  bad("student_head must be .*d=5 like student_hidden", head=x["t_kernel"])
  bad("teacher_head must be .*d=3", teacher=(x["t_hidden"], x["kernel"]))
  bad(
      "share one vocabulary, .* pass vocab_size=31",
      teacher=(t[0], t[1][:, :31]),
  )
  bad(r"vocab_size must be in \[1, 37\]", vocab_size=38)
  bad("teacher_hidden must be .*n=7", teacher=(t[0][:3], t[1]))
  bad("teacher_logits must be .*n=7", teacher=np.zeros((3, V)))
  bad("teacher must be .hidden, head. or logits", teacher=None)
  bad("teacher must be .*got 3", teacher=(1.0, 2.0, 3.0))
  bad("temperature must be in", temperature=0)
  bad("temperature must be in", temperature=-1.0)
  bad("temperature must be a Python number", temperature=np.ones(N))
  bad("beta must be in", kind="generalized_jsd", beta=1.5)
  bad("alpha must be in", kind="skew_forward_kl", alpha=-0.1)
  bad("did you mean 'reverse_kl'", kind="reversekl")
  bad("tail must be one of", tail="zero")
  bad("implementation must be one of 'xla'", implementation="pallas")
  bad("chunk_size must be in", chunk_size=0)
  bad("reference must be given unless", kind="gopd")
  bad("reward_scale must be a number or", kind="gopd", reference=t,
      reward_scale=np.ones(3))  # fmt: skip
  bad("softcap must be in", head=kernels.Head(x["kernel"], softcap=0))
  bad("scale must be finite and not 0", head=kernels.Head(x["kernel"], scale=0))
  bad("bias must be", head=kernels.Head(x["kernel"], np.zeros(3)))
  bad("must be a floating array", hidden=np.zeros((N, D), np.int32))
  bad(r"student_hidden must be \[n, d\]", hidden=np.zeros((2, N, D)))
  ids, log_p = np.zeros((N, 1), np.int32), np.zeros((N, 1), np.float32)
  bad("or kind one of 'sparse_forward_kl'", teacher=(ids, log_p))
  bad("teacher must be cached top-k", kind="sparse_forward_kl")
  bad("teacher_log_probs must be", kind="sparse_forward_kl",
      teacher=(ids, log_p[:3]))  # fmt: skip
  bad("teacher_ids must be .*n=7", kind="sparse_forward_kl",
      teacher=(ids[:3], log_p[:3]))  # fmt: skip
  wide = (np.zeros((N, 38), np.int32), np.zeros((N, 38), np.float32))
  bad("1 <= k <= 37", kind="sparse_forward_kl", teacher=wide)
  fn = kernels.linear_token_statistics
  bad(r"ids must be \[n\] or \[n, k\]", fn=fn, ids=np.zeros((3,), np.int32))
  bad("ids must be an integer array", fn=fn, ids=np.zeros((N,)))
  bad(r"top_k must be in \[1, 37\]", fn=fn, top_k=38)


def test_ids_are_checked_under_debug():
  ids = np.full((N, 2), [3, 3], np.int32)
  log_p = np.log(np.full((N, 2), 0.4, np.float32))
  with distilljax.debug():
    bad("distinct within a row", "sparse_forward_kl", teacher=(ids, log_p))
    bad(r"teacher_ids must be in \[0, 36\]", "sparse_forward_kl",
        teacher=(ids + [0, 40], log_p))  # fmt: skip
    bad(r"ids must be in \[0, 36\]", fn=kernels.linear_token_statistics,
        ids=np.full((N,), 37))  # fmt: skip
    bad(r"rows must be in \[0, 6\]", rows=np.array([7]))


def test_docstrings():
  assert doctest.testmod(api).failed == 0
