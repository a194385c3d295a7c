"""GDD: two logit maps, softplus ("ns") and hinge, R1."""

import jax
import jax.numpy as jnp

from distilljax import losses

CALLS = {
    r"\w+_gmain_grad_g_\w": "losses.gan_generator_loss",
    r"\w+_dmain_grad_d_\w+": "losses.gan_discriminator_loss",
    r"\w+_r1_grad_d_\w+": "losses.r1_penalty(gamma=r1_gamma)",
}
NOT_REPRODUCED = {}
KINDS = {"ns": "softplus", "hinge": "hinge"}


def generate(net, z, skip):
  """The stand-in one-step generator; 80 is its only noise level."""
  level = net["b"] + net["u"] * jnp.log(80.0).astype(z.dtype) / 4
  hidden = jnp.einsum("oc,bchw->bohw", net["W"], z)
  return skip * z + jnp.tanh(hidden + level[:, None, None])


def logits(net, x):
  """The stand-in discriminator: two maps of [b, h w]."""
  first = jnp.einsum("c,bchw->bhw", net["w1"], jnp.tanh(x))
  second = jnp.mean(net["w2"][:, None, None] * x**2, axis=1)
  return [first.reshape(len(x), -1), second.reshape(len(x), -1)]


def reproduce(golden):
  skip, gamma = golden.number("skip"), golden.number("r1_gamma")
  g, d = golden.inputs("g_"), golden.inputs("d_")
  images = golden["images"]

  def gmain(g, z, kind):
    fake = logits(d, generate(g, z, skip))
    return losses.masked_mean(losses.gan_generator_loss(fake, kind=kind))

  def dmain(d, z, kind):
    fake = logits(d, generate(g, z, skip))
    return losses.masked_mean(
        losses.gan_discriminator_loss(logits(d, images), fake, kind=kind)
    )

  def r1(d, z, kind):
    del z, kind  # R1 looks at data alone
    return losses.masked_mean(
        losses.r1_penalty(lambda x: logits(d, x), images, gamma=gamma)
    )

  stages = {"gmain": (gmain, g, "g"), "dmain": (dmain, d, "d"),
            "r1": (r1, d, "d")}
  cases = [m.groups() for m in golden.match(r"(\w+?)_(gmain|dmain|r1)_z")]

  @jax.jit
  def run(noises):
    return {
        (case, stage): jax.grad(stages[stage][0])(
            stages[stage][1], noises[case, stage], KINDS[case.split("_")[-1]]
        )
        for case, stage in noises
    }

  grads = run({c: golden[f"{c[0]}_{c[1]}_z"] for c in cases})
  return {
      f"{case}_{stage}_grad_{stages[stage][2]}_{name}": value
      for (case, stage), tree in grads.items()
      for name, value in tree.items()
  }
