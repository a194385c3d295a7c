"""MeanFlow: one network of mean velocities, from data or from a teacher.

Geng et al., Mean Flows for One-step Generative Modeling, 2025,
arXiv:2505.13447. u(x_t, t, r) is the velocity averaged from t down to r, so
x_r = x_t - (t - r) u and one call from t = 1 to r = 0 makes a sample. The
paper's time is ours (t = 1 noise). `identity="lagrangian"` trains the same
network by the Lagrangian identity instead (Boffi et al., Flow Map Matching,
2024, arXiv:2406.07507), which needs a teacher.

With a teacher (`source="teacher"`) the velocity of the target is the teacher's
at x_t, guided by `guidance`; without, it is the path's own, and `guidance` is
refused. What is not as in the paper: end masses of (t, r) (our defaults 0 as
there; one-step sampling wants them, see `processes.sample_mean_flow_times`),
and rows with r = t are drawn row by row instead of by their index.

Networks: `student` (trained), `ema` (what is sampled from), `teacher` (frozen,
where source is "teacher"). Batch: `x` [b, *s], `label` [b] (optional).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distilljax import _checks, losses, processes, train
from distilljax.methods import _common

DEFAULTS = {
  "source": "data",  # the paper's; "teacher" distils
  "identity": "eulerian",  # the paper's; or "lagrangian" (needs a teacher)
  "path": processes.RectifiedFlow(),  # the paper's
  "time_distribution": "logit_normal",  # official default.py
  "time_mean": -0.4,  # official default.py (P_mean)
  "time_std": 1.0,  # official default.py (P_std)
  "equal": 0.75,  # share of rows with r = t; official (data_proportion)
  "t_one": 0.0,  # probability of t := 1; ours
  "r_zero": 0.0,  # probability of r := 0; ours
  "norm_p": 1.0,  # official default.py
  "norm_eps": 0.01,  # official default.py
  "elements": "sum",  # norm_eps belongs beside the official sum
  "guidance": 1.0,  # of the teacher
  "null_label": None,  # index of the null class, for guidance
  "ema_decay": 0.9999,  # official yml
}


def make(
  apply_fns: Mapping[str, Callable[..., Any]], **hyper: Any
) -> train.Method:
  """MeanFlow as a `Method`.

  Args:
    apply_fns: `student`: (params, x, t, *, r, label) -> mean velocity, and
      `teacher`: (params, x, t, *, label) -> velocity where source="teacher".
    **hyper: see `DEFAULTS`.

  Returns:
    The method. `sample` jumps `steps` times from inputs["noise"] with the EMA.
  """
  slug = "mean_flow"
  h = _common.hyper_parameters(slug, DEFAULTS, hyper)
  _checks.one_of(slug, "source", h["source"], ("data", "teacher"))
  _checks.one_of(slug, "identity", h["identity"], ("eulerian", "lagrangian"))
  distilled = h["source"] == "teacher"
  if not distilled and (h["identity"] == "lagrangian" or h["guidance"] != 1.0):
    _checks.fail(
      slug,
      "source",
      "'teacher' for the Lagrangian identity or guidance",
      "'data'",
    )
  _common.check_guidance(slug, h["guidance"], h["null_label"])
  needed = ["student", "teacher"] if distilled else ["student"]
  apply = _common.networks_for(slug, apply_fns, needed)[0]
  path = h["path"]

  def times(key, shape):
    return processes.sample_mean_flow_times(
      key,
      shape,
      distribution=h["time_distribution"],
      mean=h["time_mean"],
      std=h["time_std"],
      equal=h["equal"],
      t_one=h["t_one"],
      r_zero=h["r_zero"],
    )

  def loss(params, batch, context):
    del context
    x, keys = batch["x"], batch["key"]
    cond = _common.conditioning(batch)
    noise = train.draw(jax.random.normal, keys, "noise", x.shape[1:])
    t, r = train.draw(times, keys, "times")
    x_t = path.add_noise(x, noise, t)

    def student(x, t, r):
      return apply(params["student"], x, t, r=r, **cond)

    if distilled:
      network = _common.guided(
        apply_fns["teacher"],
        params["teacher"],
        h["guidance"],
        h["null_label"],
      )
      teacher = lambda x, t: network(x, t, **cond)
    norm = {"norm_p": h["norm_p"], "norm_eps": h["norm_eps"]}
    if h["identity"] == "lagrangian":
      residual = losses.lagrangian_residual(student, x_t, t, r, teacher)
      squares = jnp.square(residual).reshape(x.shape[0], -1)
      reduce = jnp.mean if h["elements"] == "mean" else jnp.sum
      error = reduce(squares, axis=1)
      values = losses.adaptive_loss(error, **norm)
    else:
      v = teacher(x_t, t) if distilled else path.velocity(x, noise, t)
      values, error = losses.mean_flow_terms(
        student, x_t, v, t, r, elements=h["elements"], **norm
      )
    return {h["identity"]: train.mean(values)}, {"error": train.mean(error)}

  def sample(params, inputs, key, *, steps):
    del key
    cond = _common.conditioning(inputs)
    jump = _common.jitted(
      lambda x, t, r: apply(params["ema"], x, t, r=r, **cond)
    )
    return processes.flow_map(
      jump,
      _common.start_noise(inputs["noise"], path),
      processes.time_grid(steps),
      unroll=True,
    )

  networks = {
    "student": train.Trained(),
    "ema": train.Ema(of="student", decay=h["ema_decay"]),
  }
  if distilled:
    networks["teacher"] = train.Frozen()
  return train.Method(
    name=slug,
    paper="arXiv:2505.13447",
    networks=networks,
    losses={"student": loss},
    schedule=train.Schedule(cycle=(("student",),)),
    sample=sample,
  )
