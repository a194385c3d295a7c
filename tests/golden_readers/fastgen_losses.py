"""FastGen's losses: DMD, denoising, GAN, and f-distill's weights."""

import jax
import jax.numpy as jnp

from distilljax import losses, processes

CALLS = {
    r"vsd(_bf16)?_(loss|grad)": "losses.surrogate_loss(dmd_direction)",
    r"vsd_scaled_(loss|grad)": "losses.dmd_direction(weight=additional_scale)",
    r"dsm_\w+_(loss|grad)": "losses.denoising_loss(kind=...)",
    r"gan_gen_\w+": "losses.gan_generator_loss",
    r"gan_disc_\w+": "losses.gan_discriminator_loss",
    r"fd_\w+_norm0_h\d": "losses.f_divergence_weight(density_ratio)",
    r"fd_\w+_norm1_h\d": (
        "losses.f_divergence_weight(normalize_ratio(density_ratio))"
    ),
    r"fd_rkl_bins_after": (
        "losses.normalize_ratio, after one call, where the official code raises"
    ),
    r"fd_\w+_bins_after": "losses.normalize_ratio, after all calls",
}
NOT_REPRODUCED = {}
_BF16 = "official casts the direction back to bfloat16, ours stays float32"
TOLERANCE = {r"vsd_bf16_\w+": (2e-2, _BF16)}
KINDS = {"x0": "x0", "eps": "epsilon", "v": "v", "flow": "velocity"}


def matching(golden):
  """The DMD loss, plain, weighted and from bfloat16 inputs."""
  arrays = tuple(golden[k] for k in ("gen_data", "teacher_x0", "fake_score_x0"))
  scale = golden["additional_scale"]

  def loss(x, real, fake, weight):
    direction = losses.dmd_direction(x, real, fake, weight=weight)
    return losses.masked_mean(losses.surrogate_loss(x, direction))

  @jax.jit
  def run():
    half = tuple(a.astype(jnp.bfloat16) for a in arrays)
    return {
        "vsd": jax.value_and_grad(loss)(*arrays, None),
        "vsd_scaled": jax.value_and_grad(loss)(*arrays, scale),
        "vsd_bf16": jax.value_and_grad(loss)(*half, None),
    }

  out = {}
  for name, (value, grad) in run().items():
    out |= {f"{name}_loss": value, f"{name}_grad": grad}
  return out


def denoising(golden):
  """Denoising score matching, one case for each kind of prediction."""
  prediction, x0, noise = (golden[f"dsm_{k}"] for k in ("pred", "x0", "eps"))
  angle = golden["dsm_t_trig"]
  at = processes.TrigFlow().at_angle(angle)
  names = [m.group(1) for m in golden.match(r"dsm_(\w+)_loss")]

  def loss(prediction, name):
    # "flow" is the straight path's velocity, "v" is the trigonometric path's.
    coefficients = None if name == "flow" else at
    return losses.masked_mean(
        losses.denoising_loss(
            prediction, x0, noise, coefficients, kind=KINDS[name]
        )
    )

  @jax.jit
  def run():
    return {n: jax.value_and_grad(loss)(prediction, n) for n in names}

  out = {}
  for name, (value, grad) in run().items():
    out |= {f"dsm_{name}_loss": value, f"dsm_{name}_grad": grad}
  return out


def adversarial(golden):
  """Both GAN losses on the recorded logits."""
  real, fake = golden["real_logits"], golden["fake_logits"]

  def discriminator(real, fake):
    return losses.masked_mean(losses.gan_discriminator_loss(real, fake))

  @jax.jit
  def run():
    return (
        jax.value_and_grad(
            lambda f: losses.masked_mean(losses.gan_generator_loss(f))
        )(fake),
        jax.value_and_grad(
            discriminator, argnums=(0, 1)
        )(real, fake),
    )

  generator, (loss, (on_real, on_fake)) = run()
  return {
      "gan_gen_loss": generator[0],
      "gan_gen_grad_fake": generator[1],
      "gan_disc_loss": loss,
      "gan_disc_grad_real": on_real,
      "gan_disc_grad_fake": on_fake,
  }


def f_distill(golden):
  """The weights of consecutive calls, and the histogram after them."""
  calls = [m.group(1) for m in golden.match(r"fd_logits_(\d+)")]
  logits = {c: golden[f"fd_logits_{c}"] for c in calls}
  times = {c: golden[f"fd_t_{c}"] for c in calls}
  lower, upper = (golden.number(f"fd_ratio_{k}") for k in ("lower", "upper"))
  bins = golden.number("fd_bin_num")
  how = {
      "t_min": golden.number("fd_min_t"),
      "t_max": golden.number("fd_max_t"),
      "rate": golden.number("fd_ema_rate"),
  }
  found = golden.match(r"fd_(\w+?)_(?:bins_after|norm\d_h\d+)")
  kinds = dict.fromkeys(m.group(1) for m in found)

  @jax.jit
  def run():
    out = {}
    for kind in kinds:
      histogram = losses.ratio_histogram(bins).astype(logits[calls[0]].dtype)
      for c in calls if f"fd_{kind}_norm1_h{calls[0]}" in golden else calls[:1]:
        ratio = losses.density_ratio(logits[c], lower=lower, upper=upper)
        out[f"fd_{kind}_norm0_h{c}"] = losses.f_divergence_weight(
            ratio, kind=kind
        )
        ratio, histogram = losses.normalize_ratio(
            ratio, times[c], histogram, **how
        )
        out[f"fd_{kind}_norm1_h{c}"] = losses.f_divergence_weight(
            ratio, kind=kind
        )
      out[f"fd_{kind}_bins_after"] = histogram
    return out

  return run()


def reproduce(golden):
  out = (
      matching(golden)
      | denoising(golden)
      | adversarial(golden)
      | f_distill(golden)
  )
  return {k: v for k, v in out.items() if k in golden}
