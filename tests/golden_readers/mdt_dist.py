"""MDT-dist's velocity matching and velocity distillation.

Its guidance is the "extra" convention (off where not positive) with a zero
condition as the negative one.
"""

import ast
import functools

import jax
import jax.numpy as jnp

from distilljax import losses, processes

_CASE = r"c\d+_"
CALLS = {
    _CASE + "xt": "losses.straight_path",
    _CASE + "t_target": "losses.phase_start",
    _CASE + "v_(pred|tgt)": "losses.velocity_matching_target",
    _CASE + "loss(_vm)?": "losses.squared_distance of the pair,"
    " mean over rows",
    _CASE + "loss_vd": "losses.velocity_distillation_direction,"
    " losses.surrogate_loss",
    _CASE + "grad_.*": "gradient of the sum",
}
NOT_REPRODUCED = {}
_ROUNDING = "1 / h amplifies the official run's float32 rounding"
TOLERANCE = {
    _CASE + "(v_tgt|loss.*)": (1e-4, _ROUNDING),
}


def _network(params, cond, x, t):
  h = jnp.tanh(
      x.reshape(x.shape[0], -1) @ params["W1"]
      + t[:, None] * params["b1"]
      + cond @ params["Wc"]
  )
  return (h @ params["W2"]).reshape(x.shape)


def _teacher(params, cond, x, t, scale):
  return processes.guide(
      _network(params, jnp.zeros_like(cond), x, t),
      _network(params, cond, x, t),
      processes.guidance_from(scale, convention="extra"),
  )


def _setting(cfg):
  kind = cfg["distill_type"]
  setting = {
      "step": cfg["distill_interval"],
      "clamp": False,
      "derivative": "exact" if kind == "continuous" else "backward",
      "norm": "l2" if cfg["d_norm"] else None,
      "c": 0.1,
  }
  if kind == "cm":
    setting["kind"] = "transport"
  return setting


def _gap(cfg):
  """Between the two times of a pair; the continuous form has one time."""
  paired = cfg["distill_type"] in ("discrete", "cm")
  return cfg["distill_interval"] if paired else 0.0


def _phase(cfg, t):
  return losses.phase_start(t, phases=cfg["multiphase"], step=_gap(cfg))


def _time(cfg, normal):
  """The official draw of t from a standard normal one."""
  low = cfg["sigma_min"] + _gap(cfg)
  mean, std = cfg["mean"], cfg["std"]
  return low + (1 - low) * jax.nn.sigmoid(normal * std + mean)


@functools.partial(jax.jit, static_argnames="cfg")
def _case(student, teacher, x0, noise, cond, a, cfg):
  cfg = dict(cfg)
  setting = _setting(cfg)
  path = functools.partial(losses.straight_path, sigma_min=cfg["sigma_min"])

  def extra(t):
    return {"end": _phase(cfg, t)} if "kind" in setting else {}

  def match(params, x_t, t, scale):
    return losses.velocity_matching_target(
        functools.partial(_network, params, cond),
        x_t, _teacher(teacher, cond, x_t, t, scale), t,
        **setting, **extra(t),
    )  # fmt: skip

  x_t, _ = path(x0, noise, a["t"])
  pred, target = match(student, x_t, a["t"], cfg["cfg_teacher_vm"])
  out = {
      "xt": x_t,
      "t_target": _phase(cfg, a["t"]),
      "v_pred": pred,
      "v_tgt": target,
  }
  t = _time(cfg, a["loss_t_normal"])
  eps = a["loss_noise"]

  def loss(params):
    terms = {}
    if cfg["lambda_vm"] > 0:
      x_t, _ = path(x0, eps, t)
      pair = match(params, x_t, t, cfg["cfg_teacher_vm"])
      rows = losses.squared_distance(*pair)
      terms["loss_vm"] = cfg["lambda_vm"] * rows.mean()
    if cfg["lambda_vd"] > 0:
      start = a["loss_noise_fake"]
      one, zero = jnp.ones_like(t), jnp.zeros_like(t)
      x = losses.flow_map_step(
          start, _network(params, cond, start, one), one, zero
      )
      x_t, _ = path(x, eps, t)
      direction = losses.velocity_distillation_direction(
          functools.partial(_network, params, cond),
          x_t, _teacher(teacher, cond, x_t, t, cfg["cfg_teacher_vd"]), t,
          **setting, **extra(t),
      )  # fmt: skip
      rows = losses.surrogate_loss(x, direction)
      terms["loss_vd"] = 2 * cfg["lambda_vd"] * rows.mean()
    return sum(terms.values()), terms

  (value, terms), grads = jax.value_and_grad(loss, has_aux=True)(student)
  out |= {"loss": value, **terms}
  return out | {f"grad_{k}": g for k, g in grads.items()}


def reproduce(golden):
  values = {}
  for case in golden.cases():
    cfg = {
        m.group(1): golden.number(m.group(0))
        for m in list(golden.match(f"{case}_cfg_(.*)"))
    }
    schedule = ast.literal_eval(cfg.pop("t_schedule"))
    cfg |= {k: schedule["args"][k] for k in ("mean", "std")}
    out = _case(
        golden.inputs("student_"),
        golden.inputs("teacher_"),
        golden["x0"],
        golden["noise"],
        golden["cond"],
        golden.inputs(
            f"{case}_", "t|loss_noise|loss_noise_fake|loss_t_normal"
        ),
        tuple(cfg.items()),
    )
    values |= {f"{case}_{k}": v for k, v in out.items()}
  return values

