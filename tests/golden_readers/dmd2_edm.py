"""DMD2 on EDM: distribution matching, critic, GAN on the critic's features."""

import jax
import jax.numpy as jnp

from distilljax import losses, processes

CALLS = {
    r"dm_(loss|grad_latents)": "losses.surrogate_loss(dmd_direction(eps=0))",
    r"fake_(loss|grad_\w)": (
        "losses.denoising_loss(weight=denoising_weight(kind='edm'))"
    ),
    r"gcls_(loss|grad_latents)": "losses.gan_generator_loss",
    r"dcls_(loss|grad_\w+)": "losses.gan_discriminator_loss",
}
NOT_REPRODUCED = {}


def denoise(net, x, sigma, skip):
  """The stand-in denoiser."""
  hidden = jnp.einsum("oc,bchw->bohw", net["W"], x)
  level = net["u"] * jnp.log(sigma)[:, None] / 4
  return skip * x + jnp.tanh(hidden + (net["b"] + level)[:, :, None, None])


def reproduce(golden):
  skip, sigma_data = golden.number("skip"), golden.number("sigma_data")
  karras = golden["karras_sigmas"]
  path = processes.EDM(sigma_min=float(karras[0]), sigma_max=float(karras[-1]))
  real_net = golden.inputs("real_", r"\w")
  fake_net = golden.inputs("fake_", r"[Wbu]")
  head = golden.inputs("head_")
  x, real_image = golden["latents"], golden["real_image"]
  names = (
      "dm_timesteps dm_noise fake_timesteps fake_noise gcls_timesteps"
      " gcls_noise dcls_t_real dcls_noise_real dcls_t_fake dcls_noise_fake"
  )
  draws = {name: golden[name] for name in names.split()}

  def noised(x, timesteps, noise):
    sigma = karras[timesteps.reshape(-1)]
    return path.add_noise(x, noise, path.t_from_sigma(sigma)), sigma

  def logits(net, head, x, timesteps, noise):
    feature = denoise(net, *noised(x, timesteps, noise), skip).mean((2, 3))
    return feature @ head["w"] + head["c"]

  def matching(x, draws):
    at = noised(x, draws["dm_timesteps"], draws["dm_noise"])
    direction = losses.dmd_direction(
        x, denoise(real_net, *at, skip), denoise(fake_net, *at, skip), eps=0.0
    )
    return losses.masked_mean(losses.surrogate_loss(x, direction))

  def critic(net, draws):
    x_t, sigma = noised(x, draws["fake_timesteps"], draws["fake_noise"])
    weight = losses.denoising_weight(sigma, kind="edm", sigma_data=sigma_data)
    return losses.masked_mean(
        losses.denoising_loss(denoise(net, x_t, sigma, skip), x, weight=weight)
    )

  def generator_gan(x, draws):
    fake = logits(fake_net, head, x, draws["gcls_timesteps"],
                  draws["gcls_noise"])
    return losses.masked_mean(losses.gan_generator_loss(fake))

  def discriminator(nets, draws):
    real = logits(*nets, real_image, draws["dcls_t_real"],
                  draws["dcls_noise_real"])
    fake = logits(*nets, x, draws["dcls_t_fake"], draws["dcls_noise_fake"])
    return losses.masked_mean(losses.gan_discriminator_loss(real, fake))

  @jax.jit
  def run(draws):
    grad = jax.value_and_grad
    return (
        grad(matching)(x, draws),
        grad(critic)(fake_net, draws),
        grad(generator_gan)(x, draws),
        grad(discriminator)((fake_net, head), draws),
    )

  dm, fake, gcls, (dcls_loss, (net_grad, head_grad)) = run(draws)
  out = {"dm_loss": dm[0], "dm_grad_latents": dm[1]}
  out |= {"fake_loss": fake[0]}
  out |= {f"fake_grad_{k}": g for k, g in fake[1].items()}
  out |= {"gcls_loss": gcls[0], "gcls_grad_latents": gcls[1]}
  out |= {"dcls_loss": dcls_loss}
  out |= {f"dcls_grad_fake_{k}": g for k, g in net_grad.items()}
  out |= {f"dcls_grad_head_{k}": g for k, g in head_grad.items()}
  return out
