"""Regression on a teacher's ODE pairs: the warm-up of one-step students.

Yin et al., One-step Diffusion with Distribution Matching Distillation, 2023,
arXiv:2311.18828 (its regression loss, here with the squared error in place of
LPIPS), and the warm-up of DMD2's SDXL student (arXiv:2405.14867). The student's
one-step sample from a latent is pulled to where the teacher's probability flow
takes the same latent. Source read: official code and the paper from memory.

Networks: `student` (trained), `ema`. Batch: `latent` [b, *s] unit noise, `x`
[b, *s] the teacher's endpoint, `label` [b] (optional).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from distilljax import losses, processes, train
from distilljax.methods import _common

DEFAULTS = {
  "path": processes.RectifiedFlow(),  # ours; the official code: EDM, SD
  "prediction": "velocity",  # what the student predicts
  "ema_decay": 0.999,  # ours; the official code has none
}


def make(
  apply_fns: Mapping[str, Callable[..., Any]], **hyper: Any
) -> train.Method:
  """Regression on ODE pairs as a `Method`.

  Args:
    apply_fns: `student`: (params, x, t, *, label) -> prediction.
    **hyper: see `DEFAULTS`.

  Returns:
    The method; `sample` is one call of the EMA at t = 1 whatever `steps` says.
  """
  slug = "ode_regression"
  h = _common.hyper_parameters(slug, DEFAULTS, hyper)
  (apply,) = _common.networks_for(slug, apply_fns, ["student"])
  path = h["path"]

  def one_step(params, latent, cond):
    t = jnp.ones(latent.shape[:1])
    x = _common.start_noise(latent, path)
    prediction = apply(params, x, t, **cond)
    return path.convert(prediction, x, t, h["prediction"], "x0")

  def loss(params, batch, context):
    del context
    cond = _common.conditioning(batch)
    ours = one_step(params["student"], batch["latent"], cond)
    values = losses.denoising_loss(ours, batch["x"], kind="x0")
    return {"regression": train.mean(values)}, {}

  def sample(params, inputs, key, *, steps):
    del key, steps
    return one_step(
      params["ema"], inputs["noise"], _common.conditioning(inputs)
    )

  return train.Method(
    name=slug,
    paper="arXiv:2311.18828",
    networks={
      "student": train.Trained(),
      "ema": train.Ema(of="student", decay=h["ema_decay"]),
    },
    losses={"student": loss},
    schedule=train.Schedule(cycle=(("student",),)),
    sample=sample,
  )
