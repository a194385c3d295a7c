"""AnyFlow's scheduler, its first stage and its distribution-matching step.

Videos lie as [b, f, c, h, w] with one time a sample; times run to 1000.
"""

import functools
import re

import jax
import jax.numpy as jnp

from distilljax import losses, processes

CALLS = {
    r"sched_\w+_apply_shift": "processes.shift_time",
    r"sched_\w+_train_weight": "losses.flow_time_weight",
    r"sched_\w+_timesteps\d+": "processes.time_grid",
    "pre_[tr]": "processes.shift_time",
    "pre_dF_dt": "losses.path_derivative(derivative='central')",
    "pre_loss": "losses.anyflow_loss, mean over rows",
    "pre_grad_.*": "gradient of the same",
    "dmd_noisy": "processes.RectifiedFlow.add_noise",
    "dmd_grad": "losses.dmd_direction",
    r"step_out_\d+_\d+": "losses.flow_map_step",
}
NOT_REPRODUCED = {}

_SCALE = 1000.0
_KINDS = {"beta": "beta", "gauss": "gaussian", "unif": "uniform"}


def _network(params, prompt, x, t, r):
  frames = x.reshape(*x.shape[:2], -1)
  h = jnp.tanh(
      frames @ params["W1"]
      + t[:, None, None] * params["bt"]
      + r[:, None, None] * params["br"]
      + prompt * params["wc"]
  )
  return (h @ params["W2"]).reshape(x.shape)


@functools.partial(jax.jit, static_argnames=("shift", "eps", "w"))
def _stage_1(student, latents, noise, t, r, anchors, prompts, shift, eps, w):
  path = processes.RectifiedFlow()
  t, r = processes.shift_time(t, shift=shift), processes.shift_time(
      r, shift=shift
  )
  x_t, v = path.add_noise(latents, noise, t), path.velocity(latents, noise, t)
  setting = {"derivative": "central", "step": eps / _SCALE, "clamp": False}
  net = lambda p, k: functools.partial(_network, p, prompts[k])
  guided = w == w
  scale = w if guided else 1.0

  def loss(student):
    return losses.anyflow_loss(
        net(student, "prompt"), x_t, v, t, r,
        uncond_fn=net(student, "neg_prompt") if guided else None,
        guidance_scale=scale,
        differentiate="cond",
        time_weight=losses.flow_time_weight(t, kind="beta", shift=shift),
        anchors=anchors,
        **setting,
    ).mean()  # fmt: skip

  value, grads = jax.value_and_grad(loss)(student)
  _, slope = losses.path_derivative(
      net(student, "prompt"), x_t, v, t, r, **setting
  )
  frames = lambda a: jnp.broadcast_to(a[:, None], x_t.shape[:2]) * _SCALE
  out = {"t": frames(t), "r": frames(r), "loss": value}
  # Recorded per unit of their time, of the fused prediction's own part.
  out["dF_dt"] = slope / (_SCALE * scale)
  return out | {f"grad_{k}": g for k, g in grads.items()}


@functools.partial(jax.jit, static_argnames="extra")
def _stage_2(real, fake, pred, noise, t, prompts, extra):
  path = processes.RectifiedFlow()
  t = t / _SCALE
  noisy = path.add_noise(pred, noise, t)

  def clean(params, key):
    velocity = _network(params, prompts[key], noisy, t, t)
    return path.convert(velocity, noisy, t, "velocity", "x0")

  real_x0 = processes.guide(
      clean(real, "neg_prompt"),
      clean(real, "prompt"),
      processes.guidance_from(extra, convention="extra"),
  )
  direction = losses.dmd_direction(
      pred, real_x0, clean(fake, "prompt"), eps=0.0
  )
  return {"noisy": noisy, "grad": direction}


def reproduce(golden):
  values = {}
  shift = golden.number("cfg_shift")
  for match in list(golden.match(r"sched_s(\d+|X)_(\w+?)_u")):
    name = match.group(0)[:-2]
    here = shift if match.group(1) == "X" else float(match.group(1))
    values[f"{name}_apply_shift"] = processes.shift_time(
        golden[f"{name}_u"], shift=here
    )
    values[f"{name}_train_weight"] = losses.flow_time_weight(
        golden[f"{name}_t"] / _SCALE, kind=_KINDS[match.group(2)], shift=here
    )
    for steps in list(golden.match(re.escape(name) + r"_timesteps(\d+)")):
      values[steps.group(0)] = _SCALE * processes.time_grid(
          int(steps.group(1)), shift=here
      )
  prompts = golden.inputs("", "prompt|neg_prompt")
  latents = golden["latents_bcfhw"].transpose(0, 2, 1, 3, 4)
  golden.number("cfg_dr"), golden.number("cfg_cr")  # how t and r were drawn
  out = _stage_1(
      golden.inputs("student_"),
      latents,
      golden["pre_noise_bfchw"],
      golden["pre_unit_t"],
      golden["pre_unit_r"],
      golden["pre_is_diffusion"],
      prompts,
      shift,
      golden.number("cfg_eps"),
      golden.number("cfg_w"),
  )
  values |= {f"pre_{k}": v for k, v in out.items()}
  pred, noise = golden["dmd_pred_bfchw"], golden["dmd_noise"]
  out = _stage_2(
      golden.inputs("real_"),
      golden.inputs("fake_"),
      pred,
      noise,
      golden["dmd_t"],
      prompts,
      golden.number("cfg_rw"),
  )
  values |= {f"dmd_{k}": v for k, v in out.items()}
  for match in list(golden.match(r"step_out_(\d+)_(\d+)")):
    t, r = (
        jnp.full(pred.shape[:1], int(k) / _SCALE, pred.dtype)
        for k in match.groups()
    )
    values[match.group(0)] = losses.flow_map_step(pred, noise, t, r)
  return values
