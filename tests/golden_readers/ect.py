"""Easy Consistency Tuning: pairs and loss of the official code."""

import functools

import jax
import jax.numpy as jnp

from distilljax import losses, processes

CALLS = {
    r"e\d+_r": "processes.ect_next_times",
    r"e\d+_loss_per_sample": "losses.consistency_loss(metric=pseudo_huber,"
    " weight=consistency_weight('inverse_gap'))",
    r"e\d+_grad_.*": "gradient of its mean",
}
NOT_REPRODUCED = {}
_CANCELS = "sqrt(s + c^2) - c cancels in the official float32 run"
TOLERANCE = {
    r"e\d+_loss_per_sample": (1e-4, _CANCELS),
    r"e\d+_grad_.*": (2e-4, "gradients' default"),
}

_DEFAULTS = {"q": 2.0, "k": 8.0, "b": 1.0, "c": 0.0, "adj": "sigmoid"}


def _denoiser(params, x, sigma):
  wide = lambda c: c[:, None, None, None]
  c_skip, c_out, c_in = losses.edm_scalings(sigma, sigma_data=0.5)
  c_noise = 0.25 * jnp.log(jnp.maximum(sigma, 1e-8))[:, None]
  h = jnp.tanh(
      (wide(c_in) * x).reshape(x.shape[0], -1) @ params["W1"]
      + c_noise * params["b1"]
  )
  return wide(c_skip) * x + wide(c_out) * (h @ params["W2"]).reshape(x.shape)


@functools.partial(jax.jit, static_argnames=("stage", "cfg"))
def _case(params, x, eps, t, stage, cfg):
  cfg = dict(cfg)
  r = processes.ect_next_times(
      t, stage, q=cfg["q"], k=cfg["k"], b=cfg["b"], adjust=cfg["adj"]
  )
  at = lambda sigma: x + sigma[:, None, None, None] * eps

  def loss(params):
    fn = functools.partial(_denoiser, params)
    rows = losses.consistency_loss(
        fn, fn, at(t), t, at(r), r,
        metric=functools.partial(losses.pseudo_huber, c=cfg["c"]),
        weight=losses.consistency_weight(t, r, kind="inverse_gap"),
    )  # fmt: skip
    return rows.mean(), rows

  grads, rows = jax.grad(loss, has_aux=True)(params)
  out = {"r": r, "loss_per_sample": rows}
  return out | {f"grad_{k}": g for k, g in grads.items()}


def reproduce(golden):
  values = {}
  for case in golden.cases(r"(e\d+)_.*"):
    cfg = {
        k: golden.number(f"{case}_cfg_{k}", v) for k, v in _DEFAULTS.items()
    }
    for match in list(golden.match(f"{case}_cfg_.*")):
      golden.number(match.group(0))  # how t was drawn
    golden.number(f"{case}_ratio_1_minus_inv", 0.0)  # 1 - q^-(stage + 1)
    out = _case(
        golden.inputs("param_"),
        golden["x"],
        golden[f"{case}_eps"],
        golden[f"{case}_t"],
        golden.number(f"{case}_stage"),
        tuple(cfg.items()),
    )
    values |= {f"{case}_{k}": v for k, v in out.items()}
  return values
