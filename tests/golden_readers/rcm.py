"""rCM's conversions, consistency term, DMD term and critic.

Networks are straight-path velocities at a time of 0..1000, wrapped into
TrigFlow with sigma_data = 1.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import losses, processes

_SCM = r"scm_fd[012]_it\d+_"
_DMD = r"dmd_it\d+_"
CALLS = {
    "conv_c_(skip|out|in|noise)": "losses.trigflow_coefficients",
    "conv_trig_to_rf": "losses.trigflow_coefficients",
    "conv_(rf_to_trig|sigma_to_rf)": "processes paths at equal log_snr",
    r"conv_shift\d+": "processes.shift_time",
    "scm_xt": "processes.TrigFlow.add_noise",
    "scm_F_theta": "losses.make_trigflow_network",
    "scm_F_teacher_cfg": "losses.make_trigflow_network, processes.guide",
    "scm_x0_teacher": "processes.TrigFlow.convert (F to x0)",
    _SCM + "loss_per_sample": "losses.rcm_tangent, normalize_tangent, rcm_loss",
    _SCM + "grad_.*": "gradient of the same, mean over rows",
    "jvpF_(tan_)?F": "losses.make_trigflow_network under jax.jvp",
    "dcm_time": "processes.shift_time",
    "dcm_loss_per_sample": "losses.consistency_loss, processes.euler",
    "dcm_grad_.*": "gradient of the same, mean over rows",
    _DMD + "D_time": "processes.shift_time",
    _DMD + "G_x0": "processes.predict_and_renoise",
    _DMD + "D_xt": "processes.TrigFlow.add_noise",
    _DMD + "x0_theta_(fake|teacher)": "processes.TrigFlow.convert",
    _DMD + "loss_per_sample": "losses.dmd_direction, losses.surrogate_loss",
    _DMD + "grad_.*": "gradient of the same, mean over rows",
    "critic_x0_theta_fake": "processes.TrigFlow.convert",
    "critic_loss_per_sample": "losses.denoising_loss",
    "critic_grad_.*": "gradient of the same, mean over rows",
}
NOT_REPRODUCED = {
    _SCM + "df_dt": "only logged there, and no derivative: it adds J, which is"
    " already multiplied by cos sin, to terms that are not",
    r"phase_.*|ema_.*": "the training loop's schedule and moving average, which"
    " belong to the method and not to a loss",
}

_DERIVATIVES = {"0": "exact", "1": "semi", "2": "backward"}
_TRIG = processes.TrigFlow()


def _network(params, uncond, x, t):
  shape = x.shape
  h = jnp.tanh(
      x.reshape(shape[0], -1) @ params["W1"]
      + t[:, None] * params["b1"]
      + params["b0"]
      + (0.25 if uncond else 0.0)
  )
  return (h @ params["W2"]).reshape(shape)


def _f(params, uncond=False):
  return losses.make_trigflow_network(
      functools.partial(_network, params, uncond)
  )


def _guided_f(params, scale):
  cond, uncond = _f(params), _f(params, True)
  if not scale > 1:
    return cond
  return lambda x, angle: processes.guide(
      uncond(x, angle), cond(x, angle), scale
  )


def _x0(f):
  """(x, t) -> x0 on the TrigFlow path, from (x, angle) -> F."""

  def fn(x, t):
    return _TRIG.convert(f(x, _TRIG.angle(t)), x, t, "F", "x0")

  return fn


def _rf_to_trig(t):
  return _TRIG.t_from_log_snr(processes.RectifiedFlow().log_snr(t))


def _draw(uniform, shift):
  """A uniform draw as a TrigFlow time."""
  return _rf_to_trig(processes.shift_time(uniform, shift=shift))


def _with_grads(loss, params):
  def mean(params):
    rows, rest = loss(params)
    return rows.mean(), (rows, rest)

  grads, (rows, rest) = jax.grad(mean, has_aux=True)(params)
  return {"loss_per_sample": rows, **rest} | {
      f"grad_{k}": g for k, g in grads.items()
  }


@functools.partial(jax.jit, static_argnames=("cases", "cfg"))
def _scm(nets, x0, a, cases, cfg):
  cfg = dict(cfg)
  angle = a["time"].reshape(-1)
  t = _TRIG.t_from_angle(angle)
  x_t = _TRIG.add_noise(x0, a["eps"], t)
  teacher = _guided_f(nets["net_teacher"], cfg["teacher_guidance"])
  goal = teacher(x_t, angle)
  out = {
      "xt": x_t,
      "F_theta": _f(nets["net"])(x_t, angle),
      "F_teacher_cfg": goal,
      "x0_teacher": _x0(teacher)(x_t, t),
  }
  # One program for all warm-ups of a kind.
  for kind in dict.fromkeys(kind for kind, _ in cases):
    steps = [step for k, step in cases if k == kind]
    warmups = jnp.stack([
        losses.tangent_warmup(int(k), warmup_steps=cfg["tangent_warmup"])
        for k in steps
    ])

    def loss(params, kind, warmup):
      f, g = losses.rcm_tangent(
          _f(params), x_t, goal, angle, warmup=warmup,
          derivative=_DERIVATIVES[kind], step=cfg["fd_size"],
      )  # fmt: skip
      g = losses.normalize_tangent(g, norm="l2")
      rows = losses.rcm_loss(f, g, scale=cfg["loss_scale"], elements="sum")
      return rows, {}

    grads = jax.vmap(
        lambda r, kind=kind, loss=loss: _with_grads(
            functools.partial(loss, kind=kind, warmup=r), nets["net"]
        )
    )(warmups)
    for i, step in enumerate(steps):
      out |= {f"fd{kind}_it{step}_{k}": v[i] for k, v in grads.items()}
  return out


@functools.partial(jax.jit, static_argnames="cfg")
def _dcm(nets, x0, eps, uniform, cfg):
  cfg = dict(cfg)
  n, m = cfg["dcm_total_steps"], cfg["dcm_skipping_interval_steps"]
  first = 1 - uniform.reshape(-1) * (1 - m / n)
  grid = jnp.stack([
      _draw(first - k / n, cfg["dcm_timestep_shift"]) for k in range(m + 1)
  ])
  x_t = _TRIG.add_noise(x0, eps, grid[0])
  teacher = _guided_f(nets["net_teacher"], cfg["teacher_guidance"])
  x_s = processes.euler(teacher, x_t, _TRIG.angle(grid))

  def loss(params):
    rows = losses.consistency_loss(
        _x0(_f(params)), _x0(_f(params)), x_t, grid[0], x_s, grid[-1],
        metric=functools.partial(losses.squared_distance, elements="sum"),
    )  # fmt: skip
    return cfg["loss_scale"] * rows, {}

  return {"time": _TRIG.angle(grid[0])[:, None]} | _with_grads(
      loss, nets["net"]
  )


@functools.partial(jax.jit, static_argnames="cfg")
def _dmd(nets, noises, uniforms, cfg):
  cfg = dict(cfg)
  draws = _draw(uniforms[..., 0], cfg["dcm_timestep_shift"])
  times = jax.lax.cummin(
      jnp.concatenate([jnp.ones_like(draws[:1]), draws[:-1]])
  )
  path = _TRIG

  def loss(params):
    student = _x0(_f(params))
    x, t = processes.predict_and_renoise(
        student, noises[0], times, noises[1:-1], times.shape[0] - 1, path=path
    )
    x0 = student(x, t)
    noisy = path.add_noise(x0, noises[-1], draws[-1])
    fake = _x0(_f(nets["net_fake_score"]))(noisy, draws[-1])
    real = _x0(_guided_f(nets["net_teacher"], cfg["teacher_guidance"]))(
        noisy, draws[-1]
    )
    direction = losses.dmd_direction(x0, real, fake, eps=0.0, floor=1e-5)
    rows = 2 * losses.surrogate_loss(x0, direction, elements="sum")
    return rows, {
        "G_x0": x0,
        "D_xt": noisy,
        "D_time": path.angle(draws[-1])[:, None],
        "x0_theta_fake": fake,
        "x0_theta_teacher": real,
    }

  return _with_grads(loss, nets["net"])


@jax.jit
def _critic(fake, sample, x_t, angle):
  angle = angle.reshape(-1)

  def loss(params):
    x0 = _x0(_f(params))(x_t, _TRIG.t_from_angle(angle))
    sigma = _TRIG.at_angle(angle).sigma
    weight = losses.denoising_weight(sigma, kind="inverse")
    rows = losses.denoising_loss(
        x0, sample, kind="x0", weight=weight, elements="sum"
    )
    return rows, {"x0_theta_fake": x0}

  return _with_grads(loss, fake)


@functools.partial(jax.jit, static_argnames=("shifts", "n"))
def _convert(trig_t, rf_t, sigma, shifts, n):
  c_skip, c_out, c_in, t = losses.trigflow_coefficients(trig_t)
  out = {
      "c_skip": c_skip,
      "c_out": c_out,
      "c_in": c_in,
      "c_noise": 1000 * t,
      "trig_to_rf": t[:n],
      "rf_to_trig": _TRIG.angle(_rf_to_trig(rf_t)),
  }
  for shift in shifts:
    out[f"shift{shift}"] = processes.shift_time(rf_t, shift=float(shift))
  edm = processes.EDM()
  out["sigma_to_rf"] = processes.RectifiedFlow().t_from_log_snr(
      edm.log_snr(edm.t_from_sigma(sigma))
  )
  return {f"conv_{k}": v for k, v in out.items()}


def _conversions(golden):
  # The recording's levels are no key: exp of an even grid from -4 to 4.
  count = golden.theirs("conv_sigma_to_rf").shape[0]
  return _convert(
      golden["conv_trig_t"],
      golden["conv_rf_t"],
      jnp.asarray(np.exp(np.linspace(-4, 4, count)), golden["conv_rf_t"].dtype),
      tuple(m.group(1) for m in golden.match(r"conv_shift(\d+)")),
      golden.theirs("conv_trig_to_rf").shape[0],
  )


def reproduce(golden):
  nets = {
      k: golden.inputs(f"{k}_", "W1|W2|b0|b1")
      for k in ("net", "net_teacher", "net_fake_score")
  }
  cfg = tuple(
      (m.group(1), golden.number(m.group(0)))
      for m in list(golden.match("cfg_(.*)"))
  )
  x0 = golden["x0"]
  values = {}
  if "conv_trig_t" in golden:
    values |= _conversions(golden)
  cases = dict.fromkeys(
      m.groups() for m in golden.match(r"scm_fd([012])_it(\d+)_df_dt")
  )
  out = _scm(nets, x0, golden.inputs("scm_", "eps|time"), tuple(cases), cfg)
  values |= {f"scm_{k}": v for k, v in out.items()}
  a = golden.inputs("jvpF_", "xt|t|tan_x|tan_t")
  f, tan = jax.jit(
      lambda x, t, tan_x, tan_t: jax.jvp(
          _f(nets["net"]), (x, t), (tan_x, tan_t)
      )
  )(a["xt"], a["t"].reshape(-1), a["tan_x"], a["tan_t"].reshape(-1))
  values |= {"jvpF_F": f, "jvpF_tan_F": tan}
  if "dcm_eps" in golden:
    out = _dcm(nets, x0, golden["dcm_eps"], golden["dcm_u_unit"], cfg)
    values |= {f"dcm_{k}": v for k, v in out.items()}
  for case in golden.cases(r"(dmd_it\d+)_.*"):
    golden.number(f"{case}_sim_steps")  # the number of draws says it too
    out = _dmd(
        nets, golden[f"{case}_noises"], golden[f"{case}_unit_uniforms"], cfg
    )
    values |= {f"{case}_{k}": v for k, v in out.items()}
  if "critic_G_x0" in golden:
    out = _critic(
        nets["net_fake_score"],
        golden["critic_G_x0"],
        golden["critic_D_xt"],
        golden["critic_D_time"],
    )
    values |= {f"critic_{k}": v for k, v in out.items()}
  return values
