"""ProlificDreamer: SDS, and VSD with a critic that predicts epsilon or v."""

import jax
import jax.numpy as jnp

from distilljax import losses, processes

CALLS = {
    r"\w*sds\w*_grad_latents": (
        "losses.surrogate_loss(sds_direction, elements='sum')"
    ),
    r"\w*vsd_\w+_grad_latents": (
        "losses.surrogate_loss(vsd_direction, elements='sum')"
    ),
}
NOT_REPRODUCED = {}


def network(net, x, embedding, t, skip):
  """The stand-in network; t is the integer time of each row."""
  y = x + embedding[:, :, None, None]
  hidden = jnp.einsum("oc,bchw->bohw", net["W"], y)
  level = net["b"] + net["u"] * t.astype(x.dtype)[:, None] / 1000
  return skip * y + jnp.tanh(hidden + level[:, :, None, None])


def reproduce(golden):
  skip, w = golden.number("skip"), golden.number("guidance_scale")
  clip = golden.number("grad_clip")
  clip = clip if clip > 0 else None
  teacher, critic = golden.inputs("pretrain_"), golden.inputs("q_")
  latents, pose = golden["latents"], golden["pose"]
  uncond, cond = jnp.split(golden["text_embeddings_uncond_cond"], 2)
  path = processes.VariancePreserving.from_table(golden["alphas_cumprod"])
  cases = [m.group(1) for m in golden.match(r"(\w+)_grad_latents")]
  draws = {c: (golden[f"{c}_t"], golden[f"{c}_noise"]) for c in cases}

  def loss(x, case, index, noise):
    index = jnp.broadcast_to(index, x.shape[:1])
    t = path.t_from_index(index).astype(x.dtype)
    x_t = path.add_noise(x, noise, t)
    estimate = processes.guide(
        network(teacher, x_t, uncond, index, skip),
        network(teacher, x_t, cond, index, skip),
        w,
    )
    if "sds" in case:
      direction = losses.sds_direction(
          estimate, noise, path.sigma(t), clip=clip
      )
    else:
      own = network(critic, x_t, pose, index, skip)
      if "vsd_v" in case:
        own = path.convert(own, x_t, t, "v", "epsilon")
      direction = losses.vsd_direction(
          estimate, own, path.sigma(t), clip=clip
      )
    return losses.masked_mean(
        losses.surrogate_loss(x, direction, elements="sum")
    )

  @jax.jit
  def run(draws):
    return {c: jax.grad(loss)(latents, c, *draws[c]) for c in cases}

  return {f"{c}_grad_latents": g for c, g in run(draws).items()}
