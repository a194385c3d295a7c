"""Consistency training, distillation and PD of the first consistency paper."""

import functools

import jax
import jax.numpy as jnp

from distilljax import losses, processes

_CM = r"cm_(l1|l2|linf)_(\w+?)_(heun|euler)_(ct|cd)_(sg|nosg)"
_PD = r"pd_(l1|l2|linf)_(uniform|snr|snrp1|truncated_snr)"
_CONT = r"cont_(l1|l2)_(sg|nosg)_(cd|ct)"
_GRAD = r"_grad(student|target)?_.*"

CALLS = {
    "wrap_denoiser": "losses.edm_scalings",
    "wrap_distiller(_at_tmin)?": "losses.edm_scalings(sigma_min)",
    _CM + "_loss": "losses.consistency_loss with"
    " losses.consistency_distillation_target and losses.consistency_weight",
    _CM + _GRAD: "gradient of the same",
    _PD + "_loss": "losses.progressive_target, losses.consistency_weight",
    _PD + _GRAD: "gradient of the same",
    _CONT + "_loss": "losses.continuous_consistency_loss",
    _CONT + _GRAD: "gradient of the same",
    "ct_sched_(ema|scales)": "processes.consistency_num_scales",
    "pd_sched_scales": "losses.progressive_num_steps",
}
NOT_REPRODUCED = {}
TOLERANCE = {
    r"cont_\w+_sg_\w+_loss": (
        2e-4, "a pseudo loss: large terms of both signs, summed in float32",
    ),
}  # fmt: skip

_SIGMA_MIN, _RHO, _TRAINING_STEPS = 0.002, 7.0, 800000
_METRICS = {
    "l1": losses.absolute_distance,
    "l2": losses.squared_distance,
    "linf": losses.max_distance,
}


def _network(params, x, sigma):
  c = 0.25 * jnp.log(sigma)[:, None]
  h = jnp.tanh(
      x.reshape(x.shape[0], -1) @ params["W1"]
      + c * params["b1"]
      + params["b0"]
  )
  return (h @ params["W2"]).reshape(x.shape)


def _denoiser(params, data_std, sigma_min, x, sigma):
  c_skip, c_out, c_in = (
      c[:, None, None, None]
      for c in losses.edm_scalings(
          sigma, sigma_data=data_std, sigma_min=sigma_min
      )
  )
  return c_skip * x + c_out * _network(params, c_in * x, sigma)


def _edm(x0, noise, sigma):
  return processes.EDM(), x0 + sigma[:, None, None, None] * noise


@functools.partial(
    jax.jit, static_argnames=("cm", "pd", "cont", "n", "t_max", "data_std")
)
def _all(nets, a, cm, pd, cont, n, t_max, data_std):
  student, target, teacher = (nets[k] for k in ("student", "target", "teacher"))
  denoiser = lambda p: functools.partial(_denoiser, p, data_std, 0.0)
  distiller = lambda p: functools.partial(_denoiser, p, data_std, _SIGMA_MIN)
  levels = functools.partial(
      processes.karras_sigmas, sigma_min=_SIGMA_MIN, sigma_max=t_max, rho=_RHO
  )
  out = {}
  if "wrap_t" in a:
    t, x_t = a["wrap_t"], a["wrap_x_t"]
    out["wrap_denoiser"] = denoiser(teacher)(x_t, t)
    out["wrap_distiller"] = distiller(student)(x_t, t)
    out["wrap_distiller_at_tmin"] = distiller(student)(
        x_t, jnp.full_like(t, _SIGMA_MIN)
    )
  x0 = a["x"]
  for key, norm, weighting, solver, mode, stop in cm:
    grid = levels(n)[::-1]
    t, s = grid[a["cm_randint"]], grid[a["cm_randint"] + 1]
    _, x_t = _edm(x0, a["cm_normal"], t)
    teacher_fn = denoiser(teacher) if mode == "cd" else lambda x, t: x0
    x_s = losses.consistency_distillation_target(
        teacher_fn, x_t, t, s, solver=solver
    )
    weight = losses.consistency_weight(t, kind=weighting)

    def loss(student, target, args=(x_t, t, x_s, s), norm=norm, weight=weight,
             stop=stop):  # fmt: skip
      return losses.consistency_loss(
          distiller(student), distiller(target), *args,
          metric=_METRICS[norm], weight=weight, stop_target=stop == "sg",
      ).mean()  # fmt: skip

    out[f"{key}_loss"], grads = jax.value_and_grad(loss, argnums=(0, 1))(
        student, target
    )
    for name, grad in zip(("student", "target"), grads):
      out |= {f"{key}_grad{name}_{k}": g for k, g in grad.items()}
  for key, norm, weighting in pd:
    # Two levels a step: the whole steps are the even ones.
    grid = levels(2 * n + 1)[::-1]
    t, s, r = (grid[2 * a["pd_randint"] + i] for i in range(3))
    _, x_t = _edm(x0, a["pd_normal"], t)
    goal = losses.progressive_target(
        denoiser(target), x_t, t, s, r,
        coefficients=lambda s: processes.EDM().at_sigma(s)[:2],
    )  # fmt: skip

    def loss(student, x_t=x_t, t=t, goal=goal, norm=norm, weighting=weighting):
      return losses.consistency_loss(
          denoiser(student), lambda x, t: goal, x_t, t, x_t, t,
          metric=_METRICS[norm],
          weight=losses.consistency_weight(t, kind=weighting),
      ).mean()  # fmt: skip

    out[f"{key}_loss"], grads = jax.value_and_grad(loss)(student)
    out |= {f"{key}_grad_{k}": g for k, g in grads.items()}
  for key, norm, stop, mode in cont:
    sigma = a["cont_uniform"] ** _RHO
    path, x_t = _edm(x0, a["cont_normal"], sigma)
    clean = denoiser(teacher)(x_t, sigma) if mode == "cd" else x0
    slope = processes.convert_prediction(
        clean, x_t, path.at_sigma(sigma), source="x0", target="velocity"
    )

    def loss(student, x_t=x_t, slope=slope, sigma=sigma, norm=norm, stop=stop):
      return losses.continuous_consistency_loss(
          distiller(student), x_t, slope, sigma,
          kind="stop_gradient" if stop == "sg" else norm,
          elements="mean" if norm == "l1" else "sum",
      ).mean()  # fmt: skip

    out[f"{key}_loss"], grads = jax.value_and_grad(loss)(student)
    out |= {f"{key}_grad_{k}": g for k, g in grads.items()}
  return out


def reproduce(golden):
  names = "wrap_t|wrap_x_t|x|mask|cm_randint|cm_normal|pd_randint|pd_normal"
  arrays = golden.inputs("", names + "|cont_uniform|cont_normal")
  arrays.pop("mask")  # all ones
  groups = {
      k: tuple(
          (m.group(0)[: -len("_loss")], *m.groups())
          for m in golden.match(p + "_loss")
      )
      for k, p in (("cm", _CM), ("pd", _PD), ("cont", _CONT))
  }
  values = _all(
      {k: golden.inputs(f"{k}_") for k in ("student", "target", "teacher")},
      arrays,
      **groups,
      n=golden.number("num_scales"),
      t_max=golden.number("t_max"),
      data_std=golden.number("data_std"),
  )
  # The target's gradient is recorded only where it is not stopped.
  values = {k: v for k, v in values.items() if k in golden}
  if "ct_sched_steps" in golden:
    values["ct_sched_scales"], values["ct_sched_ema"] = (
        processes.consistency_num_scales(
            golden["ct_sched_steps"],
            _TRAINING_STEPS,
            s1=golden.number("ct_sched_end_scales"),
            mu0=golden.number("ct_sched_start_ema"),
        )
    )
  if "pd_sched_steps" in golden:
    values["pd_sched_scales"] = losses.progressive_num_steps(
        golden["pd_sched_steps"], start=golden.number("pd_sched_start_scales")
    )
  return values
