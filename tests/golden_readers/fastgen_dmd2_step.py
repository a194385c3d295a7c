"""FastGen's DMD2 step: the student's and the critic's losses and gradients."""

import jax
import jax.numpy as jnp

from distilljax import losses, processes

CALLS = {
    r"student_vsd_(loss|grad_\w)": "losses.surrogate_loss(dmd_direction)",
    r"student_gan_loss_gen": "losses.gan_generator_loss",
    r"student_(total_loss|grad_\w)": "the weighted sum of the two",
    r"critic_fake_score_loss": "losses.denoising_loss",
    r"critic_gan_loss_disc": "losses.gan_discriminator_loss",
    r"critic_gan_loss_ar1": "losses.approximate_r1",
    r"critic_(total_loss|grad_\w+)": "the weighted sum of the three",
}
NOT_REPRODUCED = {}
TOLERANCE = {
    r"critic_gan_loss_ar1": (
        1e-4,
        "the official float32 squares a difference of nearly equal logits",
    )
}
KINDS = {"x0": "x0", "eps": "epsilon", "v": "v", "flow": "velocity"}


def network(net, x, embedding, t, skip):
  """(x0 estimate, feature) of the stand-in network."""
  y = x + embedding[:, :, None, None]
  hidden = jnp.einsum("oc,bchw->bohw", net["W"], y)
  level = net["b"] + net["u"] * t[:, None]
  feature = jnp.tanh(hidden + level[:, :, None, None])
  return skip * y + feature, feature


def reproduce(golden):
  skip, w = golden.number("skip"), golden.number("guidance_scale")
  gan_weight = golden.number("gan_loss_weight_gen")
  r1_weight = golden.number("r1_weight", 0.0)
  r1_alpha = golden.number("r1_alpha", 0.0)
  kind = KINDS[golden.number("fake_score_pred_type")]
  student, teacher, fake, head = (
      golden.inputs(f"{name}_", r"[Wbuwc]")
      for name in ("student", "teacher", "fake", "head")
  )
  names = "real z input_student t_student t eps cond neg_cond r1_noise"
  batch = {name: golden[name] for name in names.split() if name in golden}
  path = processes.RectifiedFlow()

  def logits(head, x, d):
    feature = network(teacher, x, d["cond"], d["t"], skip)[1]
    return feature.mean((2, 3)) @ head["w"] + head["c"]

  def sample(student, d):
    x, t = d["input_student"], d["t_student"]
    return network(student, x, d["cond"], t, skip)[0]

  def student_terms(student, d):
    x = sample(student, d)
    x_t = path.add_noise(x, d["eps"], d["t"])
    real = processes.guide(
        network(teacher, x_t, d["neg_cond"], d["t"], skip)[0],
        network(teacher, x_t, d["cond"], d["t"], skip)[0],
        w,
    )
    fake_x0 = network(fake, x_t, d["cond"], d["t"], skip)[0]
    direction = losses.dmd_direction(x, real, fake_x0)
    matching = losses.masked_mean(losses.surrogate_loss(x, direction))
    gan = losses.masked_mean(losses.gan_generator_loss(logits(head, x_t, d)))
    return matching, gan

  def student_total(student, d):
    matching, gan = student_terms(student, d)
    return matching + gan_weight * gan, (matching, gan)

  def critic_total(nets, d):
    fake, head = nets
    x = sample(student, d)
    x_t = path.add_noise(x, d["eps"], d["t"])
    x0 = network(fake, x_t, d["cond"], d["t"], skip)[0]
    prediction = path.convert(x0, x_t, d["t"], "x0", kind)
    score = losses.masked_mean(
        losses.denoising_loss(
            prediction, x, d["eps"], path.coefficients(d["t"]), kind=kind
        )
    )
    real = logits(head, path.add_noise(d["real"], d["eps"], d["t"]), d)
    gan = losses.masked_mean(
        losses.gan_discriminator_loss(real, logits(head, x_t, d))
    )
    r1 = jnp.zeros_like(gan)
    if "r1_noise" in d:
      # The official code perturbs clean data and does not noise it again.
      perturbed = logits(head, d["real"] + r1_alpha * d["r1_noise"], d)
      r1 = losses.masked_mean(losses.approximate_r1(real, perturbed))
    return score + gan + r1_weight * r1, (score, gan, r1)

  @jax.jit
  def run(d):
    return (
        jax.value_and_grad(student_total, has_aux=True)(student, d),
        jax.grad(lambda s: student_terms(s, d)[0])(student),
        jax.value_and_grad(critic_total, has_aux=True)((fake, head), d),
    )

  (total, (matching, gan)), grad = (out := run(batch))[0]
  (critic, (score, disc, r1)), (fake_grad, head_grad) = out[2]
  values = {
      "student_total_loss": total,
      "student_vsd_loss": matching,
      "student_gan_loss_gen": gan,
      "critic_total_loss": critic,
      "critic_fake_score_loss": score,
      "critic_gan_loss_disc": disc,
      "critic_gan_loss_ar1": r1,
  }
  for prefix, tree in {
      "student_grad": grad,
      "student_vsd_grad": out[1],
      "critic_grad_fake": fake_grad,
      "critic_grad_head": head_grad,
  }.items():
    values |= {f"{prefix}_{name}": value for name, value in tree.items()}
  return {k: v for k, v in values.items() if k in golden}
