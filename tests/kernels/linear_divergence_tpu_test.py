"""The TPU kernel of `linear_divergence`, interpreted, against the chunks.

The chunks themselves are held against `losses` in linear_divergence_test.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from distilljax import kernels
from distilljax.kernels.jvp_attention import common
from distilljax.kernels.linear_head import api, pallas_tpu
from tests.helpers import one_line_error
from tests.kernels.linear_divergence_test import (
  OPTIONS,
  assert_close,
  hessian_times,
  quick,
)

# Two blocks of rows and three of columns, the last of each ragged; the teacher
# is twice as wide, so the student waits.
N, V, PADDED = 40, 300, 310


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  """Small blocks, and no chip."""
  monkeypatch.setattr(pallas_tpu, "TILE", pallas_tpu.Tile(32, 128, 128, 16))
  with common.interpret():
    yield
  jax.clear_caches()


@functools.cache
def arrays():
  rng = np.random.default_rng(0)
  draw = lambda *s: (0.3 * rng.normal(size=s)).astype(np.float32)
  return {
      "hidden": draw(N, 128), "kernel": draw(128, PADDED), "bias": draw(PADDED),
      "t_hidden": draw(N, 256), "t_kernel": draw(PADDED, 256),
      "r_hidden": draw(N, 128), "r_kernel": draw(128, PADDED),
      "ids": rng.integers(0, V, (N, 2)).astype(np.int32),
      "weights": draw(N) + 1,
  }  # fmt: skip


def program(implementation, kind, temperature=1.5, **options):
  """Everything that a pass gives, and gradients of what has one."""
  x = {k: jnp.asarray(a) for k, a in arrays().items()}
  reference = (x["r_hidden"], x["r_kernel"]) if kind == "gopd" else None

  def scalar(w):
    head = kernels.Head(w["kernel"], w["bias"], softcap=3.0, scale=1.2)
    found = kernels.linear_token_statistics(
        w["hidden"], head,
        (x["t_hidden"], kernels.Head(x["t_kernel"], tied=True)), kind=kind,
        ids=x["ids"], vocab_size=V, temperature=temperature, chunk_size=128,
        reference=reference, implementation=implementation,
        **{**OPTIONS.get(kind, {}), **options},
    )  # fmt: skip
    rows = found.loss + found.student_entropy
    return jnp.sum(x["weights"] * rows), found

  w = {k: x[k] for k in ("hidden", "kernel", "bias")}
  return jax.value_and_grad(scalar, has_aux=True), w


CASES = {
    **{kind: (kind, {}) for kind in api.DENSE},
    "reverse_kl at 1": ("reverse_kl", {"temperature": 1}),
    "forward_kl exact": ("forward_kl", {"exact": True}),
    "skew_reverse_kl exact": ("skew_reverse_kl", {"exact": True}),
    "gopd per token": ("gopd", {"reward_scale": jnp.linspace(0.5, 2, N)}),
}  # fmt: skip


@pytest.mark.parametrize("case", quick("reverse_kl", of=CASES))
def test_everything_is_that_of_the_chunks(case):
  kind, options = CASES[case]
  f, w = program("pallas_tpu", kind, **options)
  assert "linear_head_statistics" in str(jax.make_jaxpr(f)(w))
  got = jax.jit(f)(w)
  want = jax.jit(program("xla", kind, **options)[0])(w)
  # Both add up 300 columns in float32, in another order.
  assert_close(got, want, 4e-6)


@pytest.mark.slow
def test_its_derivatives_are_those_of_the_chunks():
  f, w = program("pallas_tpu", "skew_reverse_kl")
  t = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size)).reshape(a.shape), w)
  along = lambda f: hessian_times(lambda w: (None, f(w)[1]), w, t)
  assert_close(along(f), along(program("xla", "skew_reverse_kl")[0]), 1e-5)


@pytest.mark.slow
def test_bfloat16_and_logits_of_a_thousand():
  x = arrays()
  low = lambda name, by=1: jnp.asarray(by * x[name], jnp.bfloat16)

  def run(implementation, by):
    return jax.jit(lambda h: kernels.linear_divergence(
        h, low("kernel", by), (low("t_hidden"), low("t_kernel", by).T),
        kind="forward_kl", implementation=implementation, chunk_size=128,
    ))(low("hidden"))  # fmt: skip

  # bfloat16 products are exact in float32: only the order of sums differs, of
  # terms of a size of 3e3 where logits are a thousand.
  for by, allowed in ((1, 1e-5), (1000, 1e-2)):
    got, want = run("pallas_tpu", by), run("xla", by)
    assert got.dtype == jnp.float32 and np.all(np.isfinite(got))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=allowed)


@pytest.mark.slow
def test_rows_of_four_devices():
  x = {k: jnp.asarray(a) for k, a in arrays().items()}
  teacher = (x["r_hidden"], x["r_kernel"])

  def slopes(hidden, t_hidden, implementation):
    return jax.vjp(
        lambda h: kernels.linear_divergence(
            h, x["kernel"], (t_hidden, x["r_kernel"]), kind="reverse_kl",
            implementation=implementation, chunk_size=128,
        ),
        hidden,
    )[1](jnp.ones(hidden.shape[0]))[0]  # fmt: skip

  mesh = jax.make_mesh(
      (4,), ("x",), (AxisType.Auto,), devices=jax.devices()[:4]
  )
  run = jax.jit(jax.shard_map(
      functools.partial(slopes, implementation="pallas_tpu"), mesh=mesh,
      in_specs=P("x"), out_specs=P("x"), check_vma=False,
  ))  # fmt: skip
  want = jax.jit(slopes, static_argnums=2)(x["hidden"], teacher[0], "xla")
  assert_close(run(x["hidden"], teacher[0]), want, 4e-6)


def test_blocks_fit():
  for widths in ([4096, 4096], [4096, 4096, 4096], [8192, 8192], [1024, 5120]):
    found = pallas_tpu.tile(8192, 151936, widths, 2)
    assert pallas_tpu.vmem_bytes(found, widths, 2) <= pallas_tpu.SCOPED_BYTES
    assert all(width % found.depth == 0 for width in widths)


def test_what_it_cannot_do_is_one_line():
  x = arrays()
  run = lambda teacher=(x["r_hidden"], x["r_kernel"]), hidden="hidden", **o: (
      kernels.linear_token_statistics(
          x[hidden], x["kernel"], teacher, implementation="pallas_tpu",
          **{"kind": "forward_kl", **o},
      )
  )  # fmt: skip
  with one_line_error("'xla', or .* no logits, got 'pallas_tpu'"):
    run(np.zeros((N, PADDED), np.float32))
  with one_line_error("or no axis_name"):
    run(axis_name="v")
  with one_line_error("or no top_k"):
    run(top_k=2)
  with one_line_error("or at most 8 ids a row"):
    run(ids=np.zeros((N, 9), np.int32))
  with one_line_error("or widths that 128 divides"):
    run((x["r_hidden"][:, :100], x["r_kernel"][:100]))
  with one_line_error("or hidden states and heads of one dtype"):
    run((x["r_hidden"], x["r_kernel"].astype(np.float16)))
  log_p = np.full((N, 3), -2, np.float32)
  with one_line_error("or a tail other than 'bucket'"):
    run((np.arange(3)[None].repeat(N, 0), log_p), kind="sparse_forward_kl")
  with common.interpret(None), one_line_error("must be 'xla' on 'cpu', or"):
    run()
