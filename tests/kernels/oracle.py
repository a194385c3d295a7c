"""Attention, its tangent and its gradients in NumPy float64, from the card.

Head-major ([B, H, N, D], [B, K, M, D]) and one matrix of scores at a time; the
second-order gradients are the card's "backward of the tangent".
"""

import numpy as np


def problem(
    seed, *, b=2, n=5, m=7, h=4, kv_heads=2, d=4, e=3, bias=None, causal=False,
    segments=None, scale=None, std=1.0,
):  # fmt: skip
  """Random inputs, tangents and cotangents, in the layout of the library."""
  rng = np.random.default_rng(seed)
  draw = lambda *s: rng.normal(size=s)
  sizes = {
      "q": (b, n, h, d), "k": (b, m, kv_heads, d), "v": (b, m, kv_heads, e),
  }  # fmt: skip
  if bias is not None:
    sizes["bias"] = bias
  p = {
      "x": {name: std * draw(*s) for name, s in sizes.items()},
      "t": {name: draw(*s) for name, s in sizes.items()},
      "d": {name: draw(*s) for name, s in sizes.items()},
      "do": draw(b, n, h, e),
      "dl": draw(b, n, h),
      "options": {"causal": causal, "scale": scale},
  }
  if segments is not None:
    p["options"]["q_segment_ids"] = np.asarray(segments[0])
    p["options"]["kv_segment_ids"] = np.asarray(segments[1])
  return p


def allowed(p):
  """bool [B, N, M]: which column a row sees."""
  b, n = p["x"]["q"].shape[:2]
  m = p["x"]["k"].shape[1]
  ok = np.ones((b, n, m), bool)
  if p["options"]["causal"]:
    ok &= (np.arange(m)[None] <= np.arange(n)[:, None] + m - n)[None]
  if "q_segment_ids" in p["options"]:
    q_ids = p["options"]["q_segment_ids"]
    kv_ids = p["options"]["kv_segment_ids"]
    ok &= q_ids[:, :, None] == kv_ids[:, None, :]
  return ok


def solve(p):
  """Everything the card gives, in the layout of the library.

  Returns:
    o, lse, to, mu; dx: gradients of <do, o> + <dl, lse>; ddx: those of
    <do, to> + <dl, mu> in x, t being fixed.
  """
  x, t = p["x"], p["t"]
  b, n, h, d = x["q"].shape
  m, kv_heads, e = x["v"].shape[1:]
  group = h // kv_heads
  a = d**-0.5 if p["options"]["scale"] is None else p["options"]["scale"]
  ok = allowed(p)
  full = (b, h, n, m)
  out = {
      "o": np.zeros((b, n, h, e)), "lse": np.full((b, n, h), -np.inf),
      "to": np.zeros((b, n, h, e)), "mu": np.zeros((b, n, h)),
      "dx": {name: np.zeros_like(y) for name, y in x.items()},
      "ddx": {name: np.zeros_like(y) for name, y in x.items()},
  }  # fmt: skip
  for i in range(b):
    for j in range(h):
      g = j // group
      q, tq = x["q"][i, :, j], t["q"][i, :, j]
      k, tk = x["k"][i, :, g], t["k"][i, :, g]
      v, tv = x["v"][i, :, g], t["v"][i, :, g]
      s = a * q @ k.T
      ts = a * (tq @ k.T + q @ tk.T)
      if "bias" in x:
        s = s + np.broadcast_to(x["bias"], full)[i, j]
        ts = ts + np.broadcast_to(t["bias"], full)[i, j]
      s = np.where(ok[i], s, -np.inf)
      ts = np.where(ok[i], ts, 0.0)
      top = s.max(axis=1, keepdims=True)
      top = np.where(np.isneginf(top), 0.0, top)
      p_ = np.exp(s - top)
      total = p_.sum(axis=1, keepdims=True)
      with np.errstate(divide="ignore"):
        out["lse"][i, :, j] = (top + np.log(total))[:, 0]
      p_ = p_ / np.where(total == 0, 1.0, total)
      o = p_ @ v
      mu = (p_ * ts).sum(axis=1, keepdims=True)
      to = p_ @ tv + (p_ * ts) @ v - mu * o
      out["o"][i, :, j], out["to"][i, :, j] = o, to
      out["mu"][i, :, j] = mu[:, 0]
      # <do, o> + <dl, lse>
      do, dl = p["do"][i, :, j], p["dl"][i, :, j, None]
      dp = do @ v.T
      ds = p_ * (dp - (do * o).sum(axis=1, keepdims=True) + dl)
      grads = out["dx"]
      grads["q"][i, :, j] += a * ds @ k
      grads["k"][i, :, g] += a * ds.T @ q
      grads["v"][i, :, g] += p_.T @ do
      # <do, to> + <dl, mu>: e_ij = T_i . v_j, g_ij = T_i . tv_j
      e_ij, g_ij = do @ v.T, do @ tv.T
      e_i = (p_ * e_ij).sum(axis=1, keepdims=True)
      dts = p_ * (e_ij - e_i + dl)
      inner = g_ij + ts * (e_ij - e_i) - mu * e_ij + dl * ts
      ds2 = p_ * (inner - (p_ * inner).sum(axis=1, keepdims=True))
      second = out["ddx"]
      second["q"][i, :, j] += a * (ds2 @ k + dts @ tk)
      second["k"][i, :, g] += a * (ds2.T @ q + dts.T @ tq)
      second["v"][i, :, g] += (p_ * (ts - mu)).T @ do
      if "bias" in x:
        shape = x["bias"].shape
        where = tuple(
            slice(None) if axis > 1 else (index if size > 1 else 0)
            for axis, (index, size) in enumerate(zip((i, j, 0, 0), shape))
        )
        axes = tuple(ax - 2 for ax in (2, 3) if shape[ax] == 1)
        grads["bias"][where] += ds.sum(axis=axes, keepdims=True)
        second["bias"][where] += ds2.sum(axis=axes, keepdims=True)
  return out
