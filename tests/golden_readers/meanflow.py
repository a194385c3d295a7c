"""MeanFlow's loss, guided velocity and solver step, from the official code."""

import functools

import jax
import jax.numpy as jnp

from distilljax import losses

_CASE = r"c\d+_"

CALLS = {
    _CASE + "v_guided": "losses.mean_flow_velocity",
    _CASE + "u": "losses.path_derivative (prediction)",
    _CASE + "du_dt": "losses.path_derivative",
    _CASE + "loss": "losses.mean_flow_loss(elements='sum'), mean over rows",
    _CASE + "grad_.*": "gradient of the same mean",
    _CASE + "v_loss_per_sample": "losses.squared_distance(elements='sum')",
    _CASE + "solver_out": "losses.flow_map_step",
}
NOT_REPRODUCED = {}


def _network(params, labels, x, t, r):
  """The stand-in: takes (t, t - r) and a label."""
  h = jnp.tanh(
      x.reshape(x.shape[0], -1) @ params["W1"]
      + t[:, None] * params["bt"]
      + (t - r)[:, None] * params["bh"]
      + params["E"][labels]
  )
  return (h @ params["W2"]).reshape(x.shape)


@functools.partial(jax.jit, static_argnames=("loss", "guide"))
def _case(params, x, e, t, r, labels, inputs, loss, guide):
  loss, guide = dict(loss), dict(guide)
  net = functools.partial(_network, params)
  x_t, v = losses.straight_path(x, e, t)
  out = {}
  if guide:
    null = jnp.full_like(labels, -1)  # the last row of the table
    out["v_guided"] = losses.mean_flow_velocity(
        v, net(labels, x_t, t, t), net(null, x_t, t, t), t, **guide
    )

  target, y = inputs["v_after_drop"], inputs["y_inp"]

  def mean_loss(params):
    return losses.mean_flow_loss(
        functools.partial(_network, params, y),
        x_t, target, t, r, elements="sum", **loss,
    ).mean()  # fmt: skip

  out["u"], out["du_dt"] = losses.path_derivative(
      functools.partial(net, y), x_t, target, t, r
  )
  out["loss"], grads = jax.value_and_grad(mean_loss)(params)
  out |= {f"grad_{k}": g for k, g in grads.items()}
  out["v_loss_per_sample"] = losses.squared_distance(
      out["u"], v, elements="sum"
  )
  solver_t, solver_r = inputs["solver_t"], inputs["solver_r"]
  out["solver_out"] = losses.flow_map_step(
      x, net(labels, x, solver_t, solver_r), solver_t, solver_r
  )
  return out


def reproduce(golden):
  values = {}
  golden.number("num_classes")
  for case in golden.cases():
    # Among these is how t, r and labels were drawn.
    cfg = {
        m.group(1): golden.number(m.group(0))
        for m in list(golden.match(f"{case}_cfg_(.*)"))
    }
    loss = tuple((k, cfg[k]) for k in ("norm_p", "norm_eps"))
    guide = ()
    if cfg["guidance_eq"]:
      names = ("omega", "kappa", "t_start", "t_end")
      guide = tuple((k, cfg[k]) for k in names if k in cfg)
    out = _case(
        golden.inputs(f"{case}_param_"),
        golden["x"],
        golden[f"{case}_e"],
        golden[f"{case}_t"].reshape(-1),
        golden[f"{case}_r"].reshape(-1),
        golden["labels"],
        golden.inputs(f"{case}_", "y_inp|v_after_drop|solver_t|solver_r"),
        loss,
        guide,
    )
    values |= {f"{case}_{k}": v for k, v in out.items()}
  return values
