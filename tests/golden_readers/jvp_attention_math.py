"""Attention with its tangent and two orders of gradients, from autodiff.

The file is head-major; its masks, bias and lengths are keys that a case may
have or lack.
"""

import functools

import jax
import jax.numpy as jnp

from distilljax import kernels

_CASE = r".+_"
CALLS = {
    _CASE + "(o|lse)": "kernels.attention(return_lse=True)",
    _CASE + "(to|tlse)": "kernels.attention under jax.jvp",
    _CASE + "d(q|k|v|bias)": "gradient of <do, o>",
    _CASE + "ddto_(q|k|v|bias)": "gradient of <dto, to>, t being fixed",
}
NOT_REPRODUCED = {}


@functools.partial(jax.jit, static_argnames=("scale", "causal", "segments"))
def _case(x, t, ids, do, dto, scale, causal, segments):
  swap = lambda a: jnp.swapaxes(a, 1, 2)

  def attend(x):
    o, lse = kernels.attention(
        *(swap(x[n]) for n in "qkv"),
        bias=x.get("bias"),
        causal=causal,
        scale=scale,
        q_segment_ids=ids[0] if segments else None,
        kv_segment_ids=ids[1] if segments else None,
        return_lse=True,
    )
    return swap(o), swap(lse)

  (o, lse), (to, tlse) = jax.jvp(attend, (x,), (t,))
  first = jax.grad(lambda x: jnp.sum(do * attend(x)[0]))(x)
  second = jax.grad(
      lambda x: jnp.sum(dto * jax.jvp(attend, (x,), (t,))[1][0])
  )(x)
  return {
      "o": o, "lse": lse, "to": to, "tlse": tlse,
      **{f"d{n}": g for n, g in first.items()},
      **{f"ddto_{n}": g for n, g in second.items()},
  }  # fmt: skip


def _segments(golden, case, x):
  """Segment ids of a case: its own, and padding as a segment of its own."""
  b, _, n, _ = x["q"].shape
  m = x["k"].shape[2]
  ids = [jnp.zeros((b, n), jnp.int32), jnp.zeros((b, m), jnp.int32)]
  given = False
  if f"{case}_q_segment_ids" in golden:
    given = True
    ids = [golden[f"{case}_{side}_segment_ids"] for side in ("q", "kv")]
  if f"{case}_kv_lengths" in golden:
    given = True
    there = jnp.arange(m)[None] < golden[f"{case}_kv_lengths"][:, None]
    ids[1] = jnp.where(there, ids[1], jnp.min(ids[0]) - 1)
  return given, tuple(ids)


def reproduce(golden):
  values = {}
  for case in golden.cases(r"(.+)_scale"):
    names = ["q", "k", "v"] + ["bias"] * (f"{case}_bias" in golden)
    x = {n: golden[f"{case}_{n}"] for n in names}
    t = {n: golden[f"{case}_t{n}"] for n in names}
    segments, ids = _segments(golden, case, x)
    out = _case(
        x, t, ids, golden[f"{case}_do"], golden[f"{case}_dto"],
        scale=golden.number(f"{case}_scale"),
        causal=golden.number(f"{case}_causal"),
        segments=segments,
    )  # fmt: skip
    for name, value in out.items():
      # A case may lack a gradient that another records.
      if f"{case}_{name}" in golden:
        values[f"{case}_{name}"] = value
  return values
