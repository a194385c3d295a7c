"""sCM (continuous-time consistency) as a public implementation computes it."""

import functools

import jax
import jax.numpy as jnp

from distilljax import losses, processes

_CASE = r"c\d+_"
CALLS = {
    _CASE + "(x_t_hat|z)": "processes.TrigFlow.add_noise and its noise",
    _CASE + "t_hat": "processes.TrigFlow.t_from_log_snr and angle",
    _CASE + "dxt_dt": "processes.TrigFlow.convert_prediction (training),"
    " processes.guide (distillation)",
    _CASE + "F": "losses.trigflow_derivative (prediction)",
    _CASE + "F_jvp": "losses.trigflow_derivative",
    _CASE + "x0_pred": "processes.convert_prediction (F to x0)",
    _CASE + "r": "losses.tangent_warmup",
    _CASE + "loss": "losses.trigflow_tangent, normalize_tangent, scm_loss",
    _CASE + "loss_unweighted": "the same with weight 1 and no logvar",
    _CASE + "grad_.*": "gradient of the loss's mean",
    _CASE + "logvar": "the stand-in network's second output",
}
NOT_REPRODUCED = {}

_SIGMA_DATA = 0.5


def _network(params, cond, x_hat, angle):
  h = jnp.tanh(
      x_hat.reshape(x_hat.shape[0], -1) @ params["W1"]
      + angle[:, None] * params["b1"]
      + cond[:, None]
  )
  return (h @ params["W2"]).reshape(x_hat.shape), h @ params["wl"]


def _path(schedule, t):
  """The net's time as TrigFlow's, by equal signal-to-noise ratio."""
  trig = processes.TrigFlow(sigma_data=_SIGMA_DATA)
  if schedule == "rf":
    log_snr = processes.RectifiedFlow().log_snr(t)
  else:
    edm = processes.EDM()
    log_snr = edm.log_snr(edm.t_from_sigma(t))
  return trig, trig.t_from_log_snr(log_snr)


@functools.partial(jax.jit, static_argnames="cfg")
def _case(net, teacher, x0, a, cfg):
  cfg = dict(cfg)
  trig, time = _path(cfg["sched"], a["t"])
  angle, cond = trig.angle(time), a["cond"]
  at = trig.at_angle(angle)
  convert = functools.partial(
      processes.convert_prediction, coefficients=at, sigma_data=_SIGMA_DATA
  )
  x_t = trig.add_noise(x0, a["z_unit"], time)
  if cfg["use_cd"]:
    slope_of = lambda cond: convert(
        _network(teacher, cond, x_t / _SIGMA_DATA, angle)[0], x_t,
        source="F", target="velocity",
    )  # fmt: skip
    slope = slope_of(cond)
    if cfg["cfg"] == cfg["cfg"]:
      slope = processes.guide(slope_of(-cond), slope, cfg["cfg"])
  else:
    slope = convert(x0, x_t, source="x0", target="velocity")
  warmup = losses.tangent_warmup(cfg["it"], warmup_steps=cfg["warm"])
  weight = jnp.ones_like(angle)
  if cfg["prior"]:
    # The rectified-flow variant weighs by its own time (see the card).
    weight = 1 / a["t"] if cfg["sched"] == "rf" else None
  setting = {
      "sigma_data": _SIGMA_DATA,
      "derivative": "central" if cfg["fd"] else "exact",
  }

  def loss(net):
    fn = lambda x, angle: _network(net, cond, x, angle)[0]
    f, g = losses.trigflow_tangent(
        fn, x_t, slope, angle, warmup=warmup, **setting
    )
    g = losses.normalize_tangent(g, norm="rms" if cfg["inv"] else "l2")
    logvar = _network(net, cond, x_t / _SIGMA_DATA, angle)[1]
    rows = losses.scm_loss(
        f, g, angle, logvar=logvar, weight=weight, sigma_data=_SIGMA_DATA,
        divide_again=cfg["div"],
    )  # fmt: skip
    plain = losses.scm_loss(f, g, angle, weight=jnp.ones_like(angle))
    return rows.mean(), (rows, plain, logvar)

  grads, (rows, plain, logvar) = jax.grad(loss, has_aux=True)(net)
  f, j = losses.trigflow_derivative(
      lambda x, angle: _network(net, cond, x, angle)[0],
      x_t, slope, angle, **setting,
  )  # fmt: skip
  out = {
      "x_t_hat": x_t,
      "z": trig.add_noise(jnp.zeros_like(x0), a["z_unit"], jnp.ones_like(time)),
      "t_hat": angle,
      "dxt_dt": slope,
      "F": f,
      "F_jvp": j,
      "x0_pred": convert(f, x_t, source="F", target="x0"),
      "r": warmup,
      "loss": rows,
      "loss_unweighted": plain,
      "logvar": logvar[:, None],
  }
  return out | {f"grad_{k}": g for k, g in grads.items()}


def reproduce(golden):
  values = {}
  for case in golden.cases():
    cfg = {
        "sched": golden.number(f"{case}_cfg_sched"),
        "use_cd": golden.number(f"{case}_cfg_use_cd"),
        "cfg": golden.number(f"{case}_cfg_cfg", float("nan")),
        "warm": golden.number(f"{case}_cfg_warm"),
        "it": golden.number(f"{case}_cfg_it"),
        "prior": golden.number(f"{case}_cfg_prior"),
        "inv": golden.number(f"{case}_cfg_inv"),
        "div": golden.number(f"{case}_cfg_div"),
        "fd": golden.number(f"{case}_cfg_fd", False),
    }
    out = _case(
        golden.inputs(f"{case}_net_"),
        golden.inputs(f"{case}_teacher_"),
        golden["x0"],
        golden.inputs(f"{case}_", "t|cond|z_unit"),
        tuple(cfg.items()),
    )
    values |= {f"{case}_{k}": v for k, v in out.items()}
  return values
