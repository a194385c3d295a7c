"""The sampler against a Python loop of full forwards and against exact laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distilljax import debug, lm, models
from distilljax.lm import rollout
from distilljax.oracles import markov
from tests.helpers import one_line_error

V, EOS, PAD = 7, 5, 0
B, P, T = 4, 5, 6
_LENGTHS = (5, 3, 1, 4)  # of the prompts
# float32 rounding of log-probabilities of size up to 10.
_TOLERANCE = dict(rtol=0, atol=5e-6)


@functools.cache
def _net():
  net = models.make(
      "transformer", jax.random.key(3), vocab_size=V, width=8, depth=1, heads=2
  )
  # Larger numbers, so that the model has opinions.
  return net.apply_fn, jax.tree.map(lambda a: 1.7 * a, net.params)


def _prompts():
  rng = np.random.default_rng(0)
  rows = [rng.integers(0, V, size=n).tolist() for n in _LENGTHS]
  return rows, *lm.pad(rows, side="left", pad_id=PAD, length=P)


def _keys(b=B, seed=7):
  return jax.random.split(jax.random.key(seed), b)


@functools.cache
def _sampler(**options):
  options = {"max_new_tokens": T, "eos_id": EOS, "pad_id": PAD, **options}
  return lm.make_sampler(_net()[0], **options)


def _sample(*, keys=None, limits=None, rows=slice(None), **options):
  _, prompts, where = _prompts()
  keys = _keys() if keys is None else keys
  return jax.tree.map(
      np.asarray,
      _sampler(**options)(
          _net()[1],
          prompts[rows],
          keys[rows],
          prompt_where=where[rows],
          limits=np.full(B, T)[rows] if limits is None else limits,
      ),
  )


@functools.cache
def _score():
  """(logits, hidden) of a rollout by one full forward."""
  return jax.jit(
      lambda params, rollout: lm.rollout_logits(
          _net()[0], params, rollout, features=True
      )
  )


@functools.cache
def _forward():
  """Logits after the tokens of one row; no cache, one shape for all lengths."""
  apply = jax.jit(
      lambda params, x, where: _net()[0](params, x, where=where)[0, -1]
  )
  return lambda params, row: apply(
      params, *lm.pad([row], side="left", pad_id=PAD, length=P + T)
  )


def _log_softmax(x):
  x = np.asarray(x, np.float64)
  x = x - x.max()
  return x - np.log(np.exp(x).sum())


def _filtered(logits, temperature, top_k, top_p):
  """Log-probabilities [v] of the sampling distribution, from its definition."""
  x = np.asarray(logits, np.float64) / temperature
  order = sorted(range(len(x)), key=lambda i: (-x[i], i))
  order = order[: top_k or len(x)]
  if top_p is not None:
    p = np.exp(_log_softmax(x[order]))
    n = 1
    while n < len(p) and p[:n].sum() < top_p:
      n += 1
    order = order[:n]
  out = np.full(len(x), -np.inf)
  out[order] = _log_softmax(x[order])
  return out


def _python_loop(row, key, *, samples=1, temperature=1.0, top_k=None,
                 top_p=None, limit=T):  # fmt: skip
  """Tokens and log-probs of a prompt's samples, by full forwards."""
  out = []
  for j in range(samples):
    read, tokens, plain, sampling = list(row), [], [], []
    row_key = jax.random.fold_in(key, j)
    while len(tokens) < limit and (not tokens or tokens[-1] != EOS):
      logits = _forward()(_net()[1], read)
      uniform = jax.random.uniform(jax.random.fold_in(row_key, len(tokens)))
      if temperature == 0:
        token = int(np.argmax(logits))
        sampling.append(0.0)
      else:
        law = _filtered(logits, temperature, top_k, top_p)
        token = int(np.argmax(np.cumsum(np.exp(law)) > float(uniform)))
        sampling.append(law[token])
      plain.append(_log_softmax(logits)[token])
      tokens.append(token)
      read.append(token)
    out.append((tokens, plain, sampling))
  return out


_SETTINGS = {
    "plain": {},
    "warm": dict(temperature=1.6, num_samples=2),
    "greedy": dict(temperature=0),
    "both": dict(top_k=4, top_p=0.7, temperature=1.3),
}


@pytest.mark.parametrize("name", _SETTINGS)
def test_the_sampler_is_the_loop(name):
  options = _SETTINGS[name]
  got = _sample(**options)
  samples = options.get("num_samples", 1)
  rows, prompts, where = _prompts()
  for i, row in enumerate(rows):
    arguments = {k: v for k, v in options.items() if k != "num_samples"}
    loop = _python_loop(row, _keys()[i], samples=samples, **arguments)
    for j, (tokens, plain, sampling) in enumerate(loop):
      r, n = i * samples + j, len(tokens)
      assert got.tokens[r].tolist() == tokens + [PAD] * (T - n)
      assert got.where[r].tolist() == [True] * n + [False] * (T - n)
      assert got.lengths[r] == n
      assert got.finished[r] == (tokens[-1] == EOS)
      for array, want in (
          (got.log_probs, plain), (got.sampling_log_probs, sampling)
      ):  # fmt: skip
        np.testing.assert_allclose(array[r, :n], want, **_TOLERANCE)
        assert (array[r, n:] == 0).all()
      np.testing.assert_array_equal(got.prompts[r], prompts[i])
      np.testing.assert_array_equal(got.prompt_where[r], where[i])
  assert got.steps == got.lengths.max()
  assert got.tokens.dtype == got.prompts.dtype == np.int32
  assert got.log_probs.dtype == np.float32


def test_the_cases_above_are_of_use():
  """Rows of different lengths, ended by EOS and not, and distinct samples."""
  plain, warm = _sample(), _sample(**_SETTINGS["warm"])
  assert plain.finished.any() and not plain.finished.all()
  assert len(set(warm.lengths.tolist())) > 1
  assert (warm.tokens[::2] != warm.tokens[1::2]).any()


def test_log_probs_are_those_of_a_teacher_forced_forward():
  got = _sample(**_SETTINGS["warm"])
  logits, hidden = _score()(_net()[1], got)
  assert logits.shape == (2 * B, T, V) and hidden.shape == (2 * B, T, 8)
  for temperature, want in (
      (1.0, got.log_probs), (1.6, got.sampling_log_probs)
  ):  # fmt: skip
    scored = lm.token_log_probs(
        logits, jnp.asarray(got.tokens), temperature=temperature
    )
    np.testing.assert_allclose(
        np.where(got.where, scored, 0), want, **_TOLERANCE
    )
  np.testing.assert_allclose(
      hidden @ models.output_head(_net()[1]), logits, **_TOLERANCE
  )


def test_the_loop_ends_with_the_rows():
  """Limits 2, 0, 1, 2: two steps for T = 6; the rest is padding."""
  full = _sample(eos_id=None)
  assert full.steps == T and not full.finished.any()
  got = _sample(eos_id=None, limits=np.asarray([2, 0, 1, 2]))
  assert got.steps == 2
  assert got.lengths.tolist() == [2, 0, 1, 2]
  for r, n in enumerate(got.lengths):
    np.testing.assert_array_equal(got.tokens[r, :n], full.tokens[r, :n])
    assert (got.tokens[r, n:] == PAD).all() and not got.where[r, n:].any()
  assert not got.finished.any()
  scalar = _sample(eos_id=None, limits=np.int32(3))
  assert scalar.steps == 3 and scalar.lengths.tolist() == [3] * B
  assert _sample(eos_id=None, limits=np.int32(99)).steps == T


def test_samples_of_a_prompt_share_its_limit():
  full = _sample(**_SETTINGS["warm"])
  limits = np.asarray([2, 4, 1, 3])
  got = _sample(limits=limits, **_SETTINGS["warm"])
  np.testing.assert_array_equal(
      got.lengths, np.minimum(full.lengths, limits.repeat(2))
  )
  assert (got.lengths < full.lengths).any()


def test_eos_ends_the_loop():
  """EOS drawn first everywhere: one step, and the first token is counted."""
  apply_fn, _ = _markov_net()
  certain = markov.MarkovLM(
      jnp.zeros(V), jnp.full((V, V), -50.0).at[:, EOS].set(0.0)
  )
  got = lm.make_sampler(apply_fn, max_new_tokens=T, eos_id=EOS, pad_id=PAD)(
      certain._asdict(), np.zeros((B, P), int), _keys()
  )
  assert int(got.steps) == 1 and got.finished.all()
  assert (got.lengths == 1).all() and (got.tokens[:, 0] == EOS).all()


def test_the_last_token_may_be_eos():
  """A row whose limit falls on its EOS has finished."""
  full = _sample()
  row = int(np.flatnonzero(full.finished & (full.lengths < T))[0])
  n = int(full.lengths[row])
  assert n >= 1
  got = _sample(limits=np.full(B, n))
  assert got.finished[row] and got.lengths[row] == n


def test_a_stop_function_ends_rows_and_carries_state():
  """Rows end once the sum of their tokens + 1 passes 4; logits are kept."""

  def stop_fn(state, step):
    total, seen = state
    total = total + jnp.where(step.alive, step.tokens + 1, 0)
    seen = jax.lax.dynamic_update_slice(
        seen, step.logits[:, None], (0, step.index, 0)
    )
    return (total, seen), total > 4

  sample = _sampler(stop_fn=stop_fn, eos_id=None)
  _, prompts, where = _prompts()
  got = sample(
      _net()[1], prompts, _keys(), prompt_where=where,
      stop_state=(jnp.zeros(B, jnp.int32), jnp.zeros((B, T, V))),
  )  # fmt: skip
  total, seen = got.stop_state
  full = _sample(eos_id=None)
  for r in range(B):
    sums = np.cumsum(full.tokens[r] + 1)
    n = int(np.argmax(sums > 4)) + 1
    assert got.lengths[r] == n
    np.testing.assert_array_equal(got.tokens[r, :n], full.tokens[r, :n])
    assert total[r] == sums[n - 1]
  assert int(got.steps) == int(got.lengths.max()) < T
  assert not got.finished.any()
  logits = _score()(_net()[1], got)[0]
  keep = np.asarray(got.where)
  np.testing.assert_allclose(
      np.asarray(seen)[keep], np.asarray(logits)[keep], **_TOLERANCE
  )


def test_rows_do_not_know_each_other():
  """Another order, a part of the batch: the same tokens row by row."""
  whole = _sample(**_SETTINGS["both"])
  order = np.asarray([2, 0, 3, 1])
  turned = _sample(rows=order, **_SETTINGS["both"])
  part = _sample(rows=slice(1, 2), **_SETTINGS["both"])
  for name in ("tokens", "where", "lengths", "finished"):
    np.testing.assert_array_equal(
        getattr(turned, name), getattr(whole, name)[order]
    )
    np.testing.assert_array_equal(
        getattr(part, name), getattr(whole, name)[1:2]
    )
  np.testing.assert_allclose(
      turned.log_probs, whole.log_probs[order], **_TOLERANCE
  )


def test_two_devices_sample_what_one_does():
  if len(jax.devices()) < 2:
    pytest.skip("one device")
  mesh = Mesh(np.asarray(jax.devices()[:2]), ("data",))
  rows = NamedSharding(mesh, PartitionSpec("data"))
  _, prompts, where = _prompts()
  put = lambda a: jax.device_put(a, rows)
  got = _sampler(**_SETTINGS["both"])(
      jax.device_put(_net()[1], NamedSharding(mesh, PartitionSpec())),
      put(jnp.asarray(prompts)),
      put(_keys()),
      prompt_where=put(jnp.asarray(where)),
  )
  assert len(got.tokens.sharding.device_set) == 2
  want = _sample(**_SETTINGS["both"])
  for name in ("tokens", "where", "lengths", "finished"):
    np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
  np.testing.assert_allclose(got.log_probs, want.log_probs, **_TOLERANCE)


def test_a_cache_in_parts_changes_nothing():
  """Four uneven parts; also where the rows end in the first of them."""
  options = _SETTINGS["warm"] | {"eos_id": None}
  for limits in (None, np.full(B, 2)):
    whole = _sample(limits=limits, **options)
    got = _sample(limits=limits, cache_parts=4, **options)
    assert got.steps == whole.steps == (T if limits is None else 2)
    for name in ("tokens", "where", "lengths", "finished"):
      np.testing.assert_array_equal(getattr(got, name), getattr(whole, name))
    np.testing.assert_allclose(got.log_probs, whole.log_probs, **_TOLERANCE)


def test_a_part_reads_no_slot_that_it_does_not_fill():
  """T = 6 in 4 parts: 2, 3, 5 and 6 tokens, the last of which is not read."""
  seen = []

  def apply_fn(params, tokens, **kw):
    if not isinstance(kw["cache"], int):
      seen.append(kw["cache"].where.shape[1] - P)
    return _net()[0](params, tokens, **kw)

  jax.eval_shape(
      lambda params, prompts: lm.generate(
          apply_fn, params, prompts, _keys(), max_new_tokens=T, eos_id=EOS,
          cache_parts=4,
      ).tokens,
      _net()[1], np.zeros((B, P), int),
  )  # fmt: skip
  assert seen == [1, 2, 4, 5]


def test_samples_share_one_prefill():
  """The network reads each prompt once, whatever num_samples is: by FLOPs."""
  calls = []

  def counting(params, tokens, **kw):
    calls.append(tokens.shape)
    return _net()[0](params, tokens, **kw)

  _, prompts, where = _prompts()
  make = lambda n: jax.make_jaxpr(
      lambda params, keys: lm.generate(
          counting, params, prompts, keys, prompt_where=where,
          max_new_tokens=T, eos_id=EOS, num_samples=n,
      ).tokens
  )(_net()[1], _keys())  # fmt: skip
  make(8)
  assert calls == [(B, P), (8 * B, 1)]  # the second is the loop's body

  def flops(n, long):
    def first(params, keys):
      return lm.generate(
          _net()[0], params, np.zeros((B, 64 if long else 2), int), keys,
          max_new_tokens=1, eos_id=EOS, num_samples=n, temperature=0,
      ).tokens  # fmt: skip

    return jax.jit(first).lower(_net()[1], _keys()).cost_analysis()["flops"]

  # What a longer prompt costs more does not grow with the samples: only the
  # repetition of its cache does (one operation an entry); 8 reads would be 8.
  one, many = flops(1, True) - flops(1, False), flops(8, True) - flops(8, False)
  assert many < 1.2 * one


@functools.cache
def _markov_net():
  """A Markov model with the call form of a transformer; no cache is needed."""

  def apply_fn(params, tokens, *, where=None, cache=None, last=False):
    log_step = jax.nn.log_softmax(params["transition"], axis=-1)
    logits = log_step[tokens[:, -1:] if last else tokens]
    return logits if cache is None else (logits, jnp.zeros(()))

  return apply_fn, markov.make_markov_lm(jax.random.key(1), V)


@pytest.mark.parametrize(
    "options",
    [{}, dict(top_p=0.5), dict(top_k=4, top_p=0.8, temperature=1.5)],
    ids=str,
)  # fmt: skip
def test_frequencies_are_the_exact_ones(options):
  """Pairs (y1, y2) of 4 000 samples against the filtered Markov law."""
  apply_fn, model = _markov_net()
  n = 4000
  got = lm.make_sampler(
      apply_fn, max_new_tokens=2, eos_id=None, num_samples=n, **options
  )(model._asdict(), np.asarray([[2]]), _keys(1))
  law = [
      np.exp(_filtered(row, options.get("temperature", 1),
                       options.get("top_k"), options.get("top_p")))
      for row in np.asarray(model.transition)
  ]  # fmt: skip
  want = law[2][:, None] * np.stack(law)
  counts = np.zeros((V, V))
  np.add.at(counts, tuple(np.asarray(got.tokens).T), 1)
  assert counts[want == 0].sum() == 0  # excluded tokens never come
  alive = want > 0
  chi2 = np.sum((counts - n * want)[alive] ** 2 / (n * want[alive]))
  degrees = alive.sum() - 1
  # Four standard deviations of chi-square.
  assert chi2 < degrees + 4 * (2 * degrees) ** 0.5


@pytest.mark.parametrize("v", [1, 2, 7, 16, 101])
def test_the_token_is_where_the_distribution_function_passes(v):
  """Against NumPy's float64 sums, at the steps' middles and beside them."""
  rng = np.random.default_rng(v)
  p = rng.exponential(size=v) * (rng.random(v) < 0.7)
  p[rng.integers(v)] += 1
  p /= p.sum()
  upto = np.cumsum(p)
  edges = np.concatenate([[0.0], upto])
  inside = [edges[i] + f * p[i] for i in range(v) for f in (0.01, 0.5, 0.99)]
  want = [i for i in range(v) for _ in range(3)]
  keep = [i for i, token in enumerate(want) if p[token] > 0]
  got, total = rollout._invert(
      jnp.tile(jnp.asarray(p, jnp.float32), (len(keep), 1)),
      jnp.asarray(np.asarray(inside)[keep], jnp.float32),
  )
  assert got.tolist() == [want[i] for i in keep]
  np.testing.assert_allclose(total, 1, rtol=1e-6)


def test_a_number_on_an_edge_belongs_to_what_comes_after():
  """Exact sums: halves and quarters, one level and two."""
  weights = jnp.asarray([[1.0, 1.0, 0.0, 2.0]])
  wide = jnp.pad(weights, ((0, 0), (70, 30)))
  for u, want in ((0.0, 0), (0.25, 1), (0.5, 3), (0.75, 3)):
    for w, shift in ((weights, 0), (wide, 70)):
      got, total = rollout._invert(w, jnp.asarray([u]))
      assert got.tolist() == [want + shift] and total.tolist() == [4.0]


@pytest.mark.parametrize("v", [37, 130])
def test_no_rounding_draws_a_token_of_no_weight(v):
  """Both ends of the numbers, sums below and above 1, weights at the rims."""
  rng = np.random.default_rng(0)
  p = np.abs(rng.normal(size=(400, v))) * (rng.random((400, v)) < 0.3)
  p[:, rng.integers(v)] += 1e-3
  p = (p / p.sum(1, keepdims=True)).astype(np.float32)
  for scale in (1.0, 1 - 1e-6, 1 + 1e-6):
    for u in (0.0, np.float32(1) - np.float32(2) ** -24):
      got = np.asarray(
          rollout._invert(
              jnp.asarray(p * scale), jnp.full(400, u, jnp.float32)
          )[0]
      )
      allowed = [np.flatnonzero(row) for row in p]
      ends = [a[0] if u == 0 else a[-1] for a in allowed]
      assert got.tolist() == ends


@pytest.mark.parametrize(
    "options",
    [
        dict(temperature=0.5), dict(top_k=2), dict(top_p=0.7), dict(top_p=1e-9),
        dict(top_k=V), dict(top_p=1), dict(temperature=2.0, top_k=5, top_p=0.9),
    ],
    ids=str,
)  # fmt: skip
def test_sampling_logits_are_the_definition(options):
  logits = np.random.default_rng(5).normal(size=(2, 3, V)).astype(np.float32)
  got = lm.sampling_logits(logits, **options)
  for i in np.ndindex(2, 3):
    want = _filtered(
        logits[i],
        options.get("temperature", 1.0),
        options.get("top_k"),
        options.get("top_p"),
    )
    np.testing.assert_allclose(got[i], want, **_TOLERANCE)


def test_ties_go_to_the_lower_id():
  logits = np.asarray([[1.0, 2.0, 2.0, 2.0]], np.float32)
  kept = lambda **kw: np.isfinite(lm.sampling_logits(logits, **kw))[0].tolist()
  assert kept(top_k=2) == [False, True, True, False]
  assert kept(temperature=0) == [False, True, False, False]
  assert (lm.sampling_logits(logits, temperature=0)[0, 1]) == 0
  # .288 each for the three: .5 takes two of them.
  assert kept(top_p=0.5) == [False, True, True, False]


def test_bfloat16_logits_give_float32_log_probs():
  logits = jnp.asarray([[0.0, 1.0]], jnp.bfloat16)
  assert lm.sampling_logits(logits).dtype == jnp.float32
  assert lm.sampling_logits(logits, temperature=0).dtype == jnp.float32


@pytest.mark.parametrize(
    "change, match",
    [
        (dict(prompts=np.zeros(3, int)), r"prompts must be \[b, p\]"),
        (dict(prompts=np.zeros((B, P))), "prompts must be an integer array"),
        (dict(prompts=np.zeros((B, 0), int)), "prompts must be a non-empty"),
        (dict(keys=np.zeros((B, 2), np.uint32)), "keys must be typed keys"),
        (dict(keys=_keys(3)), r"keys must be \[b\]=\[4\] like prompts"),
        (dict(max_new_tokens=0), "max_new_tokens must be an int >= 1, got 0"),
        (dict(num_samples=0), "num_samples must be an int >= 1, got 0"),
        (dict(cache_parts=0), "cache_parts must be an int >= 1, got 0"),
        (dict(cache_parts=2), "cache_parts must be 1 where the cache has no"),
        (dict(temperature=-1.0), "temperature must be in"),
        (dict(temperature=float("nan")), "temperature must be"),
        (dict(temperature=float("inf")), "temperature must be finite"),
        (dict(top_k=0), "top_k must be an int >= 1 or None, got 0"),
        (dict(top_k=2.5), "top_k must be an int"),
        (dict(top_k=V + 1), "top_k must be <= the vocabulary, 7, got 8"),
        (dict(top_p=0.0), r"top_p must be in \(0, 1\]"),
        (dict(top_p=1.5), r"top_p must be in \(0, 1\]"),
        (dict(prompt_where=np.ones((B, P))), "prompt_where must be a bool"),
        (
            dict(prompt_where=np.ones((B, 2), bool)),
            r"prompt_where must be \[b, p\]=\[4, 5\]",
        ),
        (dict(limits=np.ones(B)), "limits must be an integer"),
        (dict(limits=np.ones(3, int)), r"limits must be \[b\]=\[4\]"),
        (
            dict(stop_fn=lambda s, step: (s, jnp.zeros(3, bool))),
            r"stop_fn's second result must be \[n\]=\[4\]",
        ),
    ],
)
def test_bad_input(change, match):
  arguments = dict(
      prompts=np.zeros((B, P), int), keys=_keys(), max_new_tokens=T, eos_id=EOS
  )
  arguments |= change
  apply_fn, model = _markov_net()
  prompts, keys = arguments.pop("prompts"), arguments.pop("keys")
  with one_line_error(match):
    lm.generate(apply_fn, model._asdict(), prompts, keys, **arguments)


@pytest.mark.parametrize(
    "where",
    [[1, 1, 1, 1, 0], [1, 0, 1, 1, 1], [0, 0, 0, 0, 0]],
    ids=["right", "hole", "empty"],
)
def test_debug_reports_prompts_not_padded_on_the_left(where):
  class Reached(Exception):
    pass

  def apply_fn(*_, **__):
    raise Reached

  call = lambda where: lm.generate(
      apply_fn, {}, np.zeros((B, P), int), _keys(),
      max_new_tokens=1, eos_id=EOS, prompt_where=np.asarray([where] * B, bool),
  )  # fmt: skip
  with debug(), one_line_error("prompt_where must be true at the last"):
    call(where)
  for good in ([0, 0, 1, 1, 1], [1] * 5, [0, 0, 0, 0, 1]):
    with debug(), pytest.raises(Reached):
      call(good)
