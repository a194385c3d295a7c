"""Diff-Instruct: the plain difference of two denoisings times the sample."""

import jax
import jax.numpy as jnp

from distilljax import losses, processes

CALLS = {
    r"g_loss_elem": (
        "losses.surrogate_loss(diff_instruct_direction, elements='none',"
        " form='linear')"
    ),
    r"g_grad_images": (
        "losses.surrogate_loss(diff_instruct_direction, elements='sum')"
    ),
}
NOT_REPRODUCED = {}


def denoise(net, x, sigma, skip):
  """The stand-in denoiser."""
  hidden = jnp.einsum("oc,bchw->bohw", net["W"], x)
  level = net["u"] * jnp.log(sigma)[:, None] / 4
  return skip * x + jnp.tanh(hidden + (net["b"] + level)[:, :, None, None])


def reproduce(golden):
  skip = golden.number("skip")
  path = processes.EDM()
  nets = golden.inputs("teacher_"), golden.inputs("fake_")
  images, noise = golden["images"], golden["g_noise"]
  # The paper's critic levels: ln sigma ~ N(-1.2, 1.2^2).
  sigma = jnp.exp(1.2 * golden["g_rnd_normal"].reshape(-1) - 1.2)

  def loss(images, **how):
    x_t = path.add_noise(images, noise, path.t_from_sigma(sigma))
    direction = losses.diff_instruct_direction(
        *(denoise(net, x_t, sigma, skip) for net in nets)
    )
    return losses.surrogate_loss(images, direction, **how)

  @jax.jit
  def run():
    total = lambda images: losses.masked_sum_and_count(
        loss(images, elements="sum")
    )[0]
    return (
        loss(images, elements="none", form="linear"), jax.grad(total)(images)
    )

  elements, grad = run()
  return {"g_loss_elem": elements, "g_grad_images": grad}
