"""DMD2: a one- or few-step student by distribution matching and a GAN.

Yin et al., Improved Distribution Matching Distillation for Fast Image
Synthesis, 2024, arXiv:2405.14867. A critic (fake score) learns to denoise the
student's samples; the student descends (critic's x0 - teacher's x0) at noised
samples, normalised per row, plus the GAN loss of a head on the critic's
features. Two time scales: the critic is updated at every step, the student at
every `ratio`-th (the paper's meaning; the student's and the critic's loss of a
step share one sample, made before the student's update). Few-step students see
inputs that their own sampling produces (backward simulation), with one exit
step for the whole batch. The official code's times 0..999 are t in [0, 1].

Departures from the official code: eps in the normaliser instead of nan_to_num;
the GAN may share noise and forward with the score (`gan_shares_noise`, as in a
second implementation, not the default).

Networks: `student`, `critic` (trained; the critic's tree holds the head),
`teacher` (frozen), `ema` (of the student; what is sampled from). With
gan_features="teacher" or "outside", a trained `discriminator` judges the
features of the frozen `teacher` or `features` instead.
Batch: `x` [b, *s] (real data for the GAN, else only its shape), `label` [b].
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from distilljax import _checks, losses, processes, train
from distilljax.methods import _common

DEFAULTS = {
  "path": processes.RectifiedFlow(),  # ours; the official code: EDM, SD
  "prediction": "velocity",  # what teacher, student and critic predict
  "times": (1.0,),  # the student's times; SDXL: 999, 749, 499, 249 of 1000
  "ratio": 5,  # critic updates per student update; scripts (10 for SD1.5)
  "t_min": 0.02,  # of the student's score times; args
  "t_max": 0.98,  # args
  "time_distribution": "uniform",  # or "log_sigma": uniform in log(sigma)
  "critic_t_min": 0.001,  # the critic learns over the whole range; args
  "critic_t_max": 1.0,  # args
  "critic_weight": None,  # "edm": 1/sigma^2 + 1/sigma_data^2; EDM scripts
  "sigma_data": 0.5,  # of that weight; args
  "guidance": 1.0,  # of the teacher; 1 ImageNet, 1.75 SD1.5, 8 SDXL; scripts
  "null_label": None,  # index of the null class, for guidance
  "gan_weight": 3e-3,  # lambda_G, ImageNet; 0 switches the GAN off; scripts
  "gan_critic_weight": 1e-2,  # lambda_D; scripts
  "gan_features": "critic",  # or "teacher", "outside"
  "gan_kind": "softplus",  # the paper's; or "hinge"
  "gan_shares_noise": False,  # one noise and forward for score and GAN
  "gan_t_max": 1.0,  # T_gan; args
  "eps": 1e-6,  # of the normaliser; FastGen
  "ema_decay": 0.999,  # ours; the official code has none
}


def make(
  apply_fns: Mapping[str, Callable[..., Any]], **hyper: Any
) -> train.Method:
  """DMD2 as a `Method`.

  Args:
    apply_fns: `student`, `teacher`: (params, x, t, *, label) -> prediction;
      `critic`: the same, and with logits=True -> (prediction, logits) where
      the GAN reads the critic (`models.with_head`); `discriminator`: (params,
      features) -> logits, and `teacher` or `features` with features=True ->
      (prediction, features), where it does not.
    **hyper: see `DEFAULTS`.

  Returns:
    The method. `sample` runs the EMA: predict and re-noise at the trained times
    (evenly spaced ones where `steps` is another number).
  """
  slug = "dmd2"
  h = _common.hyper_parameters(slug, DEFAULTS, hyper)
  gan = h["gan_weight"] > 0 or h["gan_critic_weight"] > 0
  _checks.one_of(
    slug, "gan_features", h["gan_features"], ("critic", "teacher", "outside")
  )
  _checks.in_range(slug, "ratio", h["ratio"], 1)
  _common.check_guidance(slug, h["guidance"], h["null_label"])
  outside = gan and h["gan_features"] != "critic"
  source = {"teacher": "teacher", "outside": "features"}.get(h["gan_features"])
  needed = ["student", "teacher", "critic"]
  if outside:
    needed += ["discriminator"] + ([source] if source != "teacher" else [])
    if h["gan_shares_noise"]:
      _checks.fail(
        slug, "gan_shares_noise", "False unless the GAN reads the critic", True
      )
  if h["critic_weight"] is not None:
    _checks.one_of(slug, "critic_weight", h["critic_weight"], ("edm",))
  student, _, critic = _common.networks_for(slug, apply_fns, needed)[:3]
  path, kind = h["path"], h["prediction"]
  student_times = jnp.asarray(h["times"], jnp.float32)

  def x0_from(prediction, x_t, t):
    return path.convert(prediction, x_t, t, kind, "x0")

  def x0_fn(params, cond):
    return lambda x, t: x0_from(student(params, x, t, **cond), x, t)

  def times(low, high):
    def draw(key, shape):
      u = jax.random.uniform(key, shape)
      if h["time_distribution"] == "uniform":
        return low + (high - low) * u
      ends = path.log_snr(jnp.array([low, high]))
      return path.t_from_log_snr(ends[0] + (ends[1] - ends[0]) * u)

    return draw

  _checks.one_of(
    slug,
    "time_distribution",
    h["time_distribution"],
    ("uniform", "log_sigma"),
  )

  def weight(t):
    """EDM's weight of an x0 loss, at the path's noise over signal."""
    if h["critic_weight"] is None:
      return None
    level = path.sigma(t) / path.alpha(t)
    return losses.denoising_weight(
      level, kind="edm", sigma_data=h["sigma_data"]
    )

  def generate(params, batch, context):
    """The student's sample, differentiable in its last call."""
    keys, shape = batch["key"], batch["x"].shape[1:]
    cond = _common.conditioning(batch)
    x = _common.start_noise(
      train.draw(jax.random.normal, keys, "latent", shape), path
    )
    n = len(h["times"])
    if n == 1:
      t = jnp.broadcast_to(student_times[0], x.shape[:1])
    else:
      noises = train.draw(jax.random.normal, keys, "renoise", (n - 1, *shape))
      exit_step = jax.random.randint(
        train.named_key(context.key, "exit"), (), 0, n
      )
      x, t = processes.predict_and_renoise(
        x0_fn(params["student"], cond),
        x,
        student_times,
        jnp.moveaxis(noises, 1, 0),
        exit_step,
        path=path,
        unroll=True,
      )
    return x0_fn(params["student"], cond)(x, t)

  def noised(x, batch, name, low, high):
    keys = batch["key"]
    noise = train.draw(jax.random.normal, keys, f"{name}/noise", x.shape[1:])
    t = train.draw(times(low, high), keys, f"{name}/time")
    return path.add_noise(x, noise, t), noise, t

  def judge(params, x_t, t, cond):
    """Logits of the discriminator at noised samples."""
    if not outside:
      return critic(params["critic"], x_t, t, logits=True, **cond)[1]
    _, features = apply_fns[source](
      params[source], x_t, t, features=True, **cond
    )
    return apply_fns["discriminator"](params["discriminator"], features)

  def student_loss(params, batch, context):
    cond = _common.conditioning(batch)
    x = generate(params, batch, context)
    teacher = _common.guided(
      apply_fns["teacher"], params["teacher"], h["guidance"], h["null_label"]
    )
    x_t, _, t = noised(x, batch, "score", h["t_min"], h["t_max"])
    shared = gan and h["gan_shares_noise"]
    if shared:
      fake, logits = critic(params["critic"], x_t, t, logits=True, **cond)
    else:
      fake = critic(params["critic"], x_t, t, **cond)
    real_x0 = x0_from(teacher(x_t, t, **cond), x_t, t)
    direction = losses.dmd_direction(
      x, real_x0, x0_from(fake, x_t, t), eps=h["eps"]
    )
    terms = {"dmd": train.mean(losses.surrogate_loss(x, direction))}
    if gan:
      if not shared:
        x_t, _, t = noised(x, batch, "gan", 0.0, h["gan_t_max"])
        logits = judge(params, x_t, t, cond)
      terms["gan"] = train.weighted(
        h["gan_weight"],
        train.mean(losses.gan_generator_loss(logits, kind=h["gan_kind"])),
      )
    spread = jnp.std(x.reshape(x.shape[0], -1), axis=1)
    return terms, {
      "sample_std": train.mean(spread),
      "direction": train.mean(
        jnp.mean(jnp.abs(direction.reshape(x.shape[0], -1)), axis=1)
      ),
    }

  def discriminator_terms(params, batch, x, cond, fake_logits=None):
    if fake_logits is None:
      fake_t, _, t = noised(x, batch, "fake", 0.0, h["gan_t_max"])
      fake_logits = judge(params, fake_t, t, cond)
    real_t, _, t = noised(batch["x"], batch, "real", 0.0, h["gan_t_max"])
    real_logits = judge(params, real_t, t, cond)
    values = losses.gan_discriminator_loss(
      real_logits, fake_logits, kind=h["gan_kind"]
    )
    term = train.weighted(h["gan_critic_weight"], train.mean(values))
    return term, {
      "real_logit": train.mean(real_logits),
      "fake_logit": train.mean(fake_logits),
    }

  def critic_loss(params, batch, context):
    cond = _common.conditioning(batch)
    x = jax.lax.stop_gradient(generate(params, batch, context))
    x_t, noise, t = noised(
      x, batch, "critic", h["critic_t_min"], h["critic_t_max"]
    )
    logits = None
    if gan and not outside and h["gan_shares_noise"]:
      prediction, logits = critic(params["critic"], x_t, t, logits=True, **cond)
    else:
      prediction = critic(params["critic"], x_t, t, **cond)
    values = losses.denoising_loss(
      prediction, x, noise, path.coefficients(t), kind=kind, weight=weight(t)
    )
    terms, metrics = {"denoising": train.mean(values)}, {}
    if gan and not outside:
      terms["gan"], metrics = discriminator_terms(
        params, batch, x, cond, logits
      )
    return terms, metrics

  def discriminator_loss(params, batch, context):
    cond = _common.conditioning(batch)
    x = jax.lax.stop_gradient(generate(params, batch, context))
    term, metrics = discriminator_terms(params, batch, x, cond)
    return {"gan": term}, metrics

  def sample(params, inputs, key, *, steps):
    cond = _common.conditioning(inputs)
    noise = inputs["noise"]
    grid = (
      student_times
      if steps == len(h["times"])
      else processes.time_grid(steps)[:-1]
    )
    noises = jax.random.normal(
      train.named_key(key, "renoise"), (steps - 1, *noise.shape)
    )
    return processes.multistep_consistency(
      _common.jitted(x0_fn(params["ema"], cond)),
      _common.start_noise(noise, path),
      grid,
      noises,
      path=path,
      unroll=True,
    )

  networks: dict[str, train.Role] = {
    "student": train.Trained(),
    "critic": train.Trained(),
    "teacher": train.Frozen(),
    "ema": train.Ema(of="student", decay=h["ema_decay"]),
  }
  losses_by_name = {"student": student_loss, "critic": critic_loss}
  always = ("critic",)
  if outside:
    networks["discriminator"] = train.Trained()
    networks.setdefault(source, train.Frozen())
    losses_by_name["discriminator"] = discriminator_loss
    always = ("critic", "discriminator")
  return train.Method(
    name=slug,
    paper="arXiv:2405.14867",
    networks=networks,
    losses=losses_by_name,
    schedule=train.Schedule(
      cycle=(("student", *always),) + (always,) * (h["ratio"] - 1)
    ),
    sample=sample,
  )
