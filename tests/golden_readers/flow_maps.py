"""Targets of shortcut models and of the repository's three baselines.

Its time runs from noise at 0 to data at 1 and its networks give dx/dt in that
time, so that t is 1 - t here and velocities change sign.
"""

import functools

import jax
import jax.numpy as jnp

from distilljax import losses, processes

_CASE = r"c\d+_"
_METHOD = "(shortcut|progressive|cd|ct)"
CALLS = {
    _CASE + _METHOD + "_x_t": "losses.straight_path",
    _CASE + "(shortcut|progressive)_v_target": "losses.shortcut_target",
    _CASE + "(cd|ct)_v_target": "losses.semigroup_target(first_fn)",
}
NOT_REPRODUCED = {}

_SIGMA_MIN, _CLIP = 1e-5, 4.0


def _network(params, labels, level, x, t):
  """The stand-in in our time: minus the official output at 1 - t."""
  h = jnp.tanh(
      x.reshape(x.shape[0], -1) @ params["W1"]
      + (1 - t)[:, None] * params["bt"]
      + level[:, None] * params["bd"]
      + params["E"][labels]
  )
  return -(h @ params["W2"]).reshape(x.shape)


def _guided(params, labels, level, null, scale):
  """(x, t, r) -> mean velocity; the guidance scale is one a row."""

  def fn(x, t, r):
    cond = _network(params, labels, level, x, t)
    uncond = _network(params, null, level, x, t)
    return processes.guide(uncond, cond, scale)

  return fn


@functools.partial(jax.jit, static_argnames=("method", "cfg"))
def _case(nets, images, a, method, cfg):
  cfg = dict(cfg)
  n = cfg["denoise_timesteps"]
  labels, level = a["labels"], a["dt_base"].astype(images.dtype)
  level = jnp.broadcast_to(level, labels.shape)
  null = jnp.full_like(labels, cfg["num_classes"])
  t = 1 - a["t"]
  kind = "ema" if cfg["bootstrap_ema"] else "model"
  noise = a["noise0"]
  if method == "shortcut":
    # The first rows bootstrap, the others start again from the first image.
    b = images.shape[0]
    k = b // cfg["bootstrap_every"]
    images = jnp.concatenate([images[:k], images[: b - k]])
    noise = jnp.concatenate([noise, a["noise1"][: b - k]])
  x_t, v = losses.straight_path(images, noise, t, sigma_min=_SIGMA_MIN)
  if method in ("shortcut", "progressive"):
    rows = jnp.arange(labels.shape[0])
    finest = jnp.log2(n).astype(level.dtype)
    scaled = level == finest - 1
    if method == "shortcut":
      # Guided are the rows of the smallest step only, by their index.
      rows_a_level = k // (1 + cfg["bootstrap_dt_bias"]) // finest_of(n)
      scaled = rows < rows_a_level
    w = cfg["cfg_scale"] if cfg["bootstrap_cfg"] else 1.0
    scale = jnp.where(scaled, w, 1.0).astype(x_t.dtype)
    params = nets[("student_" if method == "shortcut" else "teacher_") + kind]
    half = _guided(params, labels, level + 1, null, scale)
    target = losses.shortcut_target(
        half, x_t, t, 2.0**-level, clip=_CLIP,
        clip_target=_CLIP if method == "shortcut" else None,
    )  # fmt: skip
    if method == "shortcut":
      target = jnp.where((rows < k)[:, None, None, None], target, v)
    return {"x_t": x_t, "v_target": -target}
  # Consistency: a short first leg, then the student's average to the data.
  student = lambda x, t, r: _network(nets["student_ema"], labels, level, x, t)
  teacher = lambda x, t, r: _network(nets["teacher_ema"], labels, level, x, t)
  first = teacher if method == "cd" else lambda x, t, r: v
  step = jnp.full_like(t, 1 / n) if method == "cd" else 2.0**-level
  target = losses.semigroup_target(
      student, x_t, t, t - step, jnp.zeros_like(t), first_fn=first,
      clip=_CLIP if method == "cd" else None,
  )  # fmt: skip
  return {"x_t": x_t, "v_target": -target}


def finest_of(n):
  return n.bit_length() - 1


def reproduce(golden):
  nets = {
      f"{who}_{kind}": golden.inputs(f"{who}_{kind}_")
      for who in ("student", "teacher")
      for kind in ("model", "ema")
  }
  golden["labels"]  # the cases hold their own, after the drop
  values = {}
  for case in golden.cases():
    cfg = {
        m.group(1): golden.number(m.group(0))
        for m in list(golden.match(f"{case}_cfg_(.*)"))
    }
    for method in dict.fromkeys(
        m.group(1) for m in golden.match(f"{case}_{_METHOD}_t")
    ):
      out = _case(
          nets,
          golden["images"],
          golden.inputs(
              f"{case}_{method}_", "t|dt_base|labels|noise0|noise1"
          ),
          method,
          tuple(cfg.items()),
      )
      values |= {f"{case}_{method}_{k}": v for k, v in out.items()}
  return values
