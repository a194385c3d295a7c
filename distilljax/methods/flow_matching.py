"""Flow matching: the teacher that the other methods distil.

Lipman et al., Flow Matching for Generative Modeling, 2022, arXiv:2210.02747;
Liu et al., Flow Straight and Fast, 2022, arXiv:2209.03003 (the straight path);
logit-normal times: Esser et al., 2024, arXiv:2403.03206. The papers' time runs
from noise (0) to data (1); here t = 0 is data and t = 1 noise, and the network
learns d x_t / d t = alpha' x0 + sigma' noise.

Networks: `student` (trained), `ema` (what is sampled from and distilled).
Batch: `x` [b, *s], `label` [b] (optional).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distilljax import losses, processes, train
from distilljax.methods import _common

DEFAULTS = {
  "path": processes.RectifiedFlow(),  # arXiv:2209.03003
  "time_distribution": "logit_normal",  # or "uniform"; arXiv:2403.03206
  "time_mean": 0.0,  # of the logit; arXiv:2403.03206, table 1
  "time_std": 1.0,  # of the logit; arXiv:2403.03206, table 1
  "label_drop": 0.1,  # share of rows that see the null label
  "null_label": None,  # index of the null class; None never drops
  "guidance": 1.0,  # of `sample`: uncond + w (cond - uncond)
  "ema_decay": 0.999,  # or a function of the step
}


def make(
  apply_fns: Mapping[str, Callable[..., Any]], **hyper: Any
) -> train.Method:
  """Flow matching as a `Method`.

  Args:
    apply_fns: `student`: (params, x, t, *, label) -> velocity.
    **hyper: see `DEFAULTS`.

  Returns:
    The method. `sample(params, inputs, key, *, steps)` integrates the EMA's
    probability flow with Euler steps from inputs["noise"].
  """
  h = _common.hyper_parameters("flow_matching", DEFAULTS, hyper)
  (apply,) = _common.networks_for("flow_matching", apply_fns, ["student"])
  _common.check_guidance("flow_matching", h["guidance"], h["null_label"])
  path = h["path"]

  def times(key, shape):
    if h["time_distribution"] == "uniform":
      return jax.random.uniform(key, shape)
    logit = h["time_mean"] + h["time_std"] * jax.random.normal(key, shape)
    return jax.nn.sigmoid(logit)

  def loss(params, batch, context):
    del context
    x, keys = batch["x"], batch["key"]
    noise = train.draw(jax.random.normal, keys, "noise", x.shape[1:])
    t = train.draw(times, keys, "time")
    cond = _common.conditioning(batch)
    if h["null_label"] is not None and cond:
      drop = train.draw(jax.random.uniform, keys, "drop") < h["label_drop"]
      cond["label"] = jnp.where(drop, h["null_label"], cond["label"])
    prediction = apply(
      params["student"], path.add_noise(x, noise, t), t, **cond
    )
    values = losses.denoising_loss(
      prediction,
      x,
      noise,
      path.coefficients(t),
      kind="velocity",
    )
    return {"velocity": train.mean(values)}, {}

  def sample(params, inputs, key, *, steps):
    del key
    network = _common.guided(
      apply, params["ema"], h["guidance"], h["null_label"]
    )
    cond = _common.conditioning(inputs)
    velocity = _common.jitted(lambda x, t: network(x, t, **cond))
    return processes.euler(
      velocity,
      _common.start_noise(inputs["noise"], path),
      processes.time_grid(steps),
      unroll=True,
    )

  return train.Method(
    name="flow_matching",
    paper="arXiv:2210.02747",
    networks={
      "student": train.Trained(),
      "ema": train.Ema(of="student", decay=h["ema_decay"]),
    },
    losses={"student": loss},
    schedule=train.Schedule(cycle=(("student",),)),
    sample=sample,
  )
