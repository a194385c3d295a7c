"""Phased DMD's trainer: sub-interval kernel and target, DMD loss, guidance."""

import functools

import jax
import jax.numpy as jnp

from distilljax import losses, processes

CALLS = {
    r"(alpha|sigma)_t_given_s": "losses.subinterval_coefficients",
    r"x_t": "losses.subinterval_forward",
    r"velocity_target": "losses.subinterval_velocity_target",
    r"x0_from_velocity": "RectifiedFlow.convert('velocity', 'x0')",
    r"euler_to_s": "processes.euler",
    r"dmd_(loss|grad)": (
        "losses.surrogate_loss(dmd_direction(eps=0, floor=1e-4))"
    ),
    r"cfg_none": "processes.guide",
    r"cfg_layer_norm": (
        "processes.rescale_guidance(share=1, measure='norm', over='last')"
    ),
    r"cfg_scalar": (
        "processes.rescale_guidance(share=1, measure='norm', over='batch')"
    ),
}
NOT_REPRODUCED = {}


def reproduce(golden):
  path = processes.RectifiedFlow()
  eps = golden.number("eps_clamp")
  names = (
      "xs noise sigma_s sigma_t velocity latents fake_x0 teacher_x0 cfg_cond"
      " cfg_uncond"
  )
  w = golden.number("cfg_scale")
  arrays = {name: golden[name] for name in names.split()}
  # The official coefficients come shaped to broadcast over the samples.
  shape = (-1,) + (1,) * (arrays["xs"].ndim - 1)

  def matching(latents, teacher_x0, fake_x0):
    direction = losses.dmd_direction(
        latents, teacher_x0, fake_x0, eps=0.0, floor=1e-4
    )
    return losses.masked_mean(losses.surrogate_loss(latents, direction))

  @jax.jit
  def run(a):
    at_s = path.coefficients(a["sigma_s"])
    at_t = path.coefficients(a["sigma_t"])
    alpha, sigma = losses.subinterval_coefficients(at_s, at_t, eps=eps)
    levels = jnp.stack([a["sigma_t"], a["sigma_s"]])
    loss, grad = jax.value_and_grad(matching)(
        a["latents"], a["teacher_x0"], a["fake_x0"]
    )
    pair = a["xs"], a["noise"], at_s, at_t
    guided = processes.guide(a["cfg_uncond"], a["cfg_cond"], w)
    rescaled = functools.partial(
        processes.rescale_guidance, guided, a["cfg_cond"], share=1.0,
        measure="norm",
    )  # fmt: skip
    return {
        "alpha_t_given_s": alpha.reshape(shape),
        "sigma_t_given_s": sigma.reshape(shape),
        "x_t": losses.subinterval_forward(*pair, eps=eps),
        "velocity_target": losses.subinterval_velocity_target(*pair, eps=eps),
        "x0_from_velocity": path.convert(
            a["velocity"], a["xs"], a["sigma_t"], "velocity", "x0"
        ),
        "euler_to_s": processes.euler(
            lambda x, t: a["velocity"], a["xs"], levels
        ),
        "cfg_none": guided,
        "cfg_layer_norm": rescaled(over="last"),
        "cfg_scalar": rescaled(over="batch"),
        "dmd_loss": loss,
        "dmd_grad": grad,
    }

  return run(arrays)
