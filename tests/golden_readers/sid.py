"""SiD: generator loss through both networks, and the critic's EDM loss."""

import jax
import jax.numpy as jnp

from distilljax import losses, processes

CALLS = {
    r"g_loss_elem": "losses.sid_loss(elements='none')",
    r"g_loss_sum_over_B|g_grad_images": "losses.sid_loss(elements='sum')",
    r"f_loss_elem": (
        "losses.denoising_loss(elements='none',"
        " weight=denoising_weight(kind='edm'))"
    ),
    r"f_grad_\w": "losses.denoising_loss(elements='sum')",
}
NOT_REPRODUCED = {}


def denoise(net, x, sigma, skip):
  """The stand-in denoiser."""
  hidden = jnp.einsum("oc,bchw->bohw", net["W"], x)
  level = net["u"] * jnp.log(sigma)[:, None] / 4
  return skip * x + jnp.tanh(hidden + (net["b"] + level)[:, :, None, None])


def reproduce(golden):
  skip, sigma_data = golden.number("skip"), golden.number("sigma_data")
  alpha, tmax = golden.number("alpha"), golden.number("tmax")
  p_mean, p_std = golden.number("P_mean"), golden.number("P_std")
  path = processes.EDM()
  true_net, fake_net = golden.inputs("true_"), golden.inputs("fake_")
  images = golden["images"]
  g_time = golden["g_rnd_t"].reshape(-1) * (tmax / 1000)
  f_sigma = jnp.exp(p_std * golden["f_rnd_normal"].reshape(-1) + p_mean)
  g_noise, f_noise = golden["g_noise"], golden["f_noise"]

  def generator(images, elements):
    x_t, sigma = path.add_noise(images, g_noise, g_time), path.sigma(g_time)
    return losses.sid_loss(
        images,
        denoise(true_net, x_t, sigma, skip),
        denoise(fake_net, x_t, sigma, skip),
        alpha=alpha,
        elements=elements,
    )

  def critic(net, elements):
    x_t = path.add_noise(images, f_noise, path.t_from_sigma(f_sigma))
    return losses.denoising_loss(
        denoise(net, x_t, f_sigma, skip),
        images,
        weight=losses.denoising_weight(
            f_sigma, kind="edm", sigma_data=sigma_data
        ),
        elements=elements,
    )

  @jax.jit
  def run():
    total = lambda fn: lambda a: losses.masked_mean(fn(a, "sum"))
    return (
        generator(images, "none"),
        jax.value_and_grad(total(generator))(images),
        critic(fake_net, "none"),
        jax.grad(total(critic))(fake_net),
    )

  g_elements, (g_loss, g_grad), f_elements, f_grad = run()
  out = {
      "g_loss_elem": g_elements,
      "g_loss_sum_over_B": g_loss,
      "g_grad_images": g_grad,
      "f_loss_elem": f_elements,
  }
  return out | {f"f_grad_{name}": value for name, value in f_grad.items()}
