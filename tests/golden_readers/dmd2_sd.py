"""DMD2 on Stable Diffusion's path: losses, and the backward simulation."""

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import losses, processes

CALLS = {
    r"dm_(loss|grad_latents)": "losses.surrogate_loss(dmd_direction(eps=0))",
    r"fake_(loss|grad_\w)": "losses.denoising_loss(kind='epsilon')",
    r"gcls_(loss|grad_latents)": "losses.gan_generator_loss",
    r"bs\d+_image": (
        "processes.multistep_consistency (the last clean prediction before the"
        " exit; at exit 0 predict_and_renoise's own input)"
    ),
    r"bs\d+_timesteps": "processes.predict_and_renoise (time of the exit)",
}
NOT_REPRODUCED = {}


def epsilon(net, x, embedding, index, skip):
  """(noise estimate, bottleneck feature) of the stand-in network."""
  y = x + embedding[:, :, None, None]
  hidden = jnp.einsum("oc,bchw->bohw", net["W"], y)
  level = net["b"] + net["u"] * index.astype(x.dtype)[:, None] / 1000
  out = skip * y + jnp.tanh(hidden + level[:, :, None, None])
  return out, out.mean((2, 3))


def reproduce(golden):
  skip, w = golden.number("skip"), golden.number("guidance_scale")
  path = processes.VariancePreserving.from_table(golden["alphas_cumprod"])
  real_net, fake_net, head, gen_net = (
      golden.inputs(f"{name}_", r"[Wbuwc]")
      for name in ("real", "fake", "head", "gen")
  )
  x, cond, uncond = (golden[k] for k in ("latents", "cond_emb", "uncond_emb"))
  draws = {
      f"{k}_{part}": golden[f"{k}_{part}"]
      for k in ("dm", "fake", "gcls")
      for part in ("timesteps", "noise")
  }

  def noised(x, draws, name):
    index = draws[f"{name}_timesteps"].reshape(-1)
    t = path.t_from_index(index).astype(x.dtype)
    return path.add_noise(x, draws[f"{name}_noise"], t), index, t

  def matching(x, draws):
    x_t, index, t = noised(x, draws, "dm")
    real = processes.guide(
        epsilon(real_net, x_t, uncond, index, skip)[0],
        epsilon(real_net, x_t, cond, index, skip)[0],
        w,
    )
    fake = epsilon(fake_net, x_t, cond, index, skip)[0]
    direction = losses.dmd_direction(
        x,
        path.convert(real, x_t, t, "epsilon", "x0"),
        path.convert(fake, x_t, t, "epsilon", "x0"),
        eps=0.0,
    )
    return losses.masked_mean(losses.surrogate_loss(x, direction))

  def critic(net, draws):
    x_t, index, _ = noised(x, draws, "fake")
    prediction = epsilon(net, x_t, cond, index, skip)[0]
    return losses.masked_mean(
        losses.denoising_loss(
            prediction, x, draws["fake_noise"], kind="epsilon"
        )
    )

  def generator_gan(x, draws):
    x_t, index, _ = noised(x, draws, "gcls")
    feature = epsilon(fake_net, x_t, cond, index, skip)[1]
    logits = feature @ head["w"] + head["c"]
    return losses.masked_mean(losses.gan_generator_loss(logits))

  steps = golden["denoising_step_list"]
  times = path.t_from_index(steps).astype(x.dtype)
  start = golden["bs_init_noise"]
  exits = [int(m.group(1)) for m in golden.match(r"bs(\d+)_image")]
  noises = {k: golden[f"bs{k}_noises"] for k in exits}
  last = len(path.angles) - 1

  def student(x, t):
    index = t * last
    out = epsilon(gen_net, x, cond, index, skip)[0]
    return path.convert(out, x, t, "epsilon", "x0")

  def simulate(k, noises):
    if k == 0:
      noises = jnp.zeros((0, *start.shape), start.dtype)
    exit_x, exit_t = processes.predict_and_renoise(
        student, start, times[: k + 1], noises, k, path=path, unroll=True
    )
    image = exit_x
    if k > 0:
      image = processes.multistep_consistency(
          student, start, times[:k], noises[: k - 1], path=path, unroll=True
      )
    return image, exit_t * last

  @jax.jit
  def run(draws, noises):
    grad = jax.value_and_grad
    return (
        grad(matching)(x, draws),
        grad(critic)(fake_net, draws),
        grad(generator_gan)(x, draws),
        {k: simulate(k, noises[k]) for k in exits},
    )

  dm, fake, gcls, simulated = run(draws, noises)
  out = {"dm_loss": dm[0], "dm_grad_latents": dm[1], "fake_loss": fake[0]}
  out |= {f"fake_grad_{k}": g for k, g in fake[1].items()}
  out |= {"gcls_loss": gcls[0], "gcls_grad_latents": gcls[1]}
  for k, (image, index) in simulated.items():
    out |= {
        f"bs{k}_image": image,
        f"bs{k}_timesteps": np.rint(np.asarray(index)).astype(np.int64),
    }
  return out
