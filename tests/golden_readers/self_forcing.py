"""Self-Forcing: DMD (also masked) and SiD on clips, times warped."""

import jax
import jax.numpy as jnp

from distilljax import losses, processes

CALLS = {
    r"(dmd|sid)_timestep": "processes.shift_time (clamped to [20, 980])",
    r"dmd_(loss|grad_latents)": "losses.surrogate_loss(dmd_direction(eps=0))",
    r"dmd_masked_(loss|grad)": (
        "losses.masked_mean(losses.surrogate_loss(dmd_direction,"
        " elements='none', where=mask), mask)"
    ),
    r"sid_(loss|grad_latents)": "losses.sid_loss(alpha=sid_alpha)",
}
NOT_REPRODUCED = {}


def denoise(net, x, embedding, timestep, skip):
  """The stand-in x0 estimate on [b, f, c, h, w]; timestep [b, f]."""
  y = x + embedding[:, None, :, None, None]
  hidden = jnp.einsum("oc,bfchw->bfohw", net["W"], y)
  level = net["b"] + net["u"] * timestep[:, :, None] / 1000
  return skip * y + jnp.tanh(hidden + level[..., None, None])


def reproduce(golden):
  skip, shift = golden.number("skip"), golden.number("timestep_shift")
  w = processes.guidance_from(golden.number("guidance"), convention="extra")
  alpha = golden.number("sid_alpha")
  real_net, fake_net = golden.inputs("real_"), golden.inputs("fake_")
  x, cond, uncond = (golden[k] for k in ("latents", "cond", "uncond"))
  sigmas, steps = golden["scheduler_sigmas"], golden["scheduler_timesteps"]
  masked = "gradient_mask" in golden
  mask = golden["gradient_mask"] if masked else None
  path = processes.RectifiedFlow()
  draws = {
      name: (golden[f"{name}_raw_timestep"], golden[f"{name}_noise"])
      for name in ("dmd", "sid")
  }

  def warped(raw):
    t = processes.shift_time(raw.astype(x.dtype) / 1000, shift=shift)
    return jnp.broadcast_to(jnp.clip(1000 * t, 20, 980), x.shape[:2])

  def scores(x, raw, noise):
    timestep = warped(raw)
    # The official noising looks the nearest step up in its table.
    nearest = jnp.argmin(jnp.abs(steps - timestep[..., None]), axis=-1)
    x_t = path.add_noise(x, noise, sigmas[nearest])
    real = processes.guide(
        denoise(real_net, x_t, uncond, timestep, skip),
        denoise(real_net, x_t, cond, timestep, skip),
        w,
    )
    return real, denoise(fake_net, x_t, cond, timestep, skip)

  def matching(x, draw, where):
    direction = losses.dmd_direction(x, *scores(x, *draw), eps=0.0)
    values = losses.surrogate_loss(
        x, direction, elements="none", where=where
    )
    return losses.masked_mean(values, where)

  def score_identity(x, draw):
    return losses.masked_mean(
        losses.sid_loss(x, *scores(x, *draw), alpha=alpha)
    )

  @jax.jit
  def run(draws):
    grad = jax.value_and_grad
    return (
        grad(matching)(x, draws["dmd"], None),
        grad(matching)(x, draws["dmd"], mask),
        grad(score_identity)(x, draws["sid"]),
        warped(draws["dmd"][0]),
        warped(draws["sid"][0]),
    )

  dmd, dmd_masked, sid, dmd_time, sid_time = run(draws)
  out = {
      "dmd_loss": dmd[0],
      "dmd_grad_latents": dmd[1],
      "dmd_masked_loss": dmd_masked[0],
      "dmd_masked_grad": dmd_masked[1],
      "sid_loss": sid[0],
      "sid_grad_latents": sid[1],
      "dmd_timestep": dmd_time,
      "sid_timestep": sid_time,
  }
  return {k: v for k, v in out.items() if k in golden}
