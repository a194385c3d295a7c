"""The house's train step against the same step written by hand.

python -m benchmarks.step [task ...] [--rounds N] [--json FILE]

Tasks: <method>_<data>, see `TASKS`. Both steps use the same network, optimizer,
batch and losses; the hand-written ones (below, some 30 lines each) have no row
keys, no metrics, no count of skipped steps and no branch on non-finite
gradients. They run in turn in one process, and the ratio is that of the median
wall times of a cycle of the method's schedule (the ratio of CPU seconds beside
it suffers less from other load on the machine).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distilljax import data, methods, models, train

# task: (network, hyper-parameters, batch, most overhead allowed)
NETWORKS = {
    "ring8": ("mlp", {"width": 96, "depth": 3}, 256),
    "digits": ("dit", {"num_classes": 10}, 64),
    "fashion14": ("unet", {"channels": 32, "num_classes": 10}, 64),
}
GOALS = {"mean_flow": 1.02, "dmd2": 1.03}
TASKS = tuple(f"{m}_{d}" for m in GOALS for d in NETWORKS)


def _wide(t, x):
  return t.reshape(t.shape + (1,) * (x.ndim - 1))


def _follow(ema, params, decay=0.99):
  return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)


def mean_flow_by_hand(apply, optimizer):
  """MeanFlow, as one would write it down: a step, and its first state."""

  def step(state, frozen, batch):
    params, ema, opt, key = state
    key, *keys = jax.random.split(key, 4)
    x = batch["x"]
    cond = {k: v for k, v in batch.items() if k == "label"}
    noise = jax.random.normal(keys[0], x.shape)
    pair = jax.nn.sigmoid(
        -0.4 + jax.random.normal(keys[1], (2, x.shape[0]))
    )
    t, low = jnp.max(pair, axis=0), jnp.min(pair, axis=0)
    same = jax.random.uniform(keys[2], t.shape) < 0.75
    r = jnp.where(same, t, low)
    x_t = (1 - _wide(t, x)) * x + _wide(t, x) * noise
    v = noise - x

    def loss(params):
      u, slope = jax.jvp(
          lambda x, t, r: apply(params, x, t, r=r, **cond),
          (x_t, t, r), (v, jnp.ones_like(t), jnp.zeros_like(r)),
      )  # fmt: skip
      target = jax.lax.stop_gradient(v - _wide(t - r, x) * slope)
      error = jnp.sum(jnp.square(u - target).reshape(x.shape[0], -1), axis=1)
      return jnp.mean(error / jax.lax.stop_gradient(error + 0.01))

    value, grads = jax.value_and_grad(loss)(params)
    change, opt = optimizer.update(grads, opt, params)
    params = optax.apply_updates(params, change)
    return (params, _follow(ema, params), opt, key), value

  def init(params, key):
    copy = lambda: jax.tree.map(jnp.array, params["student"])
    return copy(), copy(), optimizer.init(params["student"]), key

  return (jax.jit(step, donate_argnums=0),), init


def dmd2_by_hand(apply, optimizer):
  """DMD2 without a GAN: a step with the student, one without, first state."""

  def noised(x, keys, low, high):
    noise = jax.random.normal(keys[0], x.shape)
    t = low + (high - low) * jax.random.uniform(keys[1], x.shape[:1])
    return (1 - _wide(t, x)) * x + _wide(t, x) * noise, noise, t

  def step(state, teacher, batch, with_student):
    params, ema, opts, key = state
    key, *keys = jax.random.split(key, 6)
    cond = {k: v for k, v in batch.items() if k == "label"}
    latent = jax.random.normal(keys[0], batch["x"].shape)
    one = jnp.ones(latent.shape[0])

    def generate(student):
      return latent - apply(student, latent, one, **cond)

    def student_loss(student):
      x = generate(student)
      x_t, _, t = noised(x, keys[1:3], 0.02, 0.98)
      real = x_t - _wide(t, x) * apply(teacher["teacher"], x_t, t, **cond)
      fake = x_t - _wide(t, x) * apply(params["critic"], x_t, t, **cond)
      axes = tuple(range(1, x.ndim))
      size = jnp.mean(jnp.abs(x - real), axis=axes, keepdims=True) + 1e-6
      goal = jax.lax.stop_gradient(x - (fake - real) / size)
      return jnp.mean(0.5 * jnp.square(x - goal))

    def critic_loss(critic):
      x = jax.lax.stop_gradient(generate(params["student"]))
      x_t, noise, t = noised(x, keys[3:], 0.001, 1.0)
      error = apply(critic, x_t, t, **cond) - (noise - x)
      return jnp.mean(jnp.square(error))

    names = ("student", "critic") if with_student else ("critic",)
    fns = {"student": student_loss, "critic": critic_loss}
    new, values = dict(params), {}
    opts = dict(opts)
    for name in names:
      values[name], grads = jax.value_and_grad(fns[name])(params[name])
      change, opts[name] = optimizer.update(grads, opts[name], params[name])
      new[name] = optax.apply_updates(params[name], change)
    if with_student:
      ema = _follow(ema, new["student"])
    return (new, ema, opts, key), values

  def init(params, key):
    copy = lambda n: jax.tree.map(jnp.array, params[n])
    names = ("student", "critic")
    return (
        {n: copy(n) for n in names}, copy("student"),
        {n: optimizer.init(params[n]) for n in names}, key,
    )  # fmt: skip

  jitted = jax.jit(step, donate_argnums=0, static_argnums=3)
  return tuple(
      lambda state, frozen, batch, w=w: jitted(state, frozen, batch, w)
      for w in (True, False)
  ), init


def _problem(task: str):
  """(method's name, apply_fns and parameters by name, batch)."""
  slug, name = task.rsplit("_", 1)
  kind, hyper, rows = NETWORKS[name]
  second = slug == "mean_flow"
  network = models.make(
      kind, jax.random.key(0), second_time=second, **hyper
  )
  rng = np.random.default_rng(0)
  if name == "ring8":
    angle = rng.integers(8, size=rows) * np.pi / 4
    x = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    x = x + 0.1 * rng.normal(size=x.shape)
    batch = {"x": jnp.asarray(x, jnp.float32)}
  else:
    arrays = data.load(name)
    batch = {k: jnp.asarray(v[:rows]) for k, v in arrays.items()}
  names = ("student",) if second else ("student", "critic", "teacher")
  return slug, network.apply_fn, {n: network.params for n in names}, batch


def _house(slug, apply, params, optimizer):
  """(cycle of steps, first state) of the library's step."""
  # Not zero: a zero-initialised last layer is a special case of no interest.
  hyper = {"ema_decay": 0.99}
  if slug == "dmd2":
    hyper |= {"ratio": 2, "gan_weight": 0.0, "gan_critic_weight": 0.0}
  method = methods.get(slug).make(dict.fromkeys(params, apply), **hyper)
  step = train.make_step(
      method, dict.fromkeys(method.named(train.Trained), optimizer)
  )
  cycle = tuple(
      lambda state, frozen, batch, names=names: step(
          names, state, frozen, batch
      )
      for names in method.schedule.cycle
  )
  return cycle, step.init


def _run(cycle: tuple[Callable[..., Any], ...], state, frozen, batch):
  """(state, wall seconds, CPU seconds) of one cycle."""
  wall, cpu = time.perf_counter(), time.process_time()
  for step in cycle:
    state, _ = step(state, frozen, batch)
  jax.block_until_ready(state)
  return state, time.perf_counter() - wall, time.process_time() - cpu


def compare(task: str, rounds: int) -> dict[str, Any]:
  """Times a task's two steps in turn."""
  slug, apply, params, batch = _problem(task)
  optimizer = train.make_optimizer(learning_rate=1e-4, steps=1000)
  frozen = {n: p for n, p in params.items() if n == "teacher"}
  by_hand = {"mean_flow": mean_flow_by_hand, "dmd2": dmd2_by_hand}[slug]
  sides = {
      "house": _house(slug, apply, params, optimizer),
      "hand": by_hand(apply, optimizer),
  }
  states, compiled, wall, cpu = {}, {}, {}, {}
  for side, (cycle, init) in sides.items():
    state = init(params, jax.random.key(1))
    state, compiled[side], _ = _run(cycle, state, frozen, batch)
    states[side], wall[side], cpu[side] = state, [], []
  for i in range(rounds + 2):
    for side in list(sides) if i % 2 else list(reversed(sides)):
      states[side], seconds, used = _run(
          sides[side][0], states[side], frozen, batch
      )
      if i >= 2:
        wall[side].append(seconds)
        cpu[side].append(used)
  median = {s: statistics.median(wall[s]) for s in sides}
  return {
      "task": task,
      "rounds": rounds,
      "house_ms": 1e3 * median["house"],
      "hand_ms": 1e3 * median["hand"],
      "ratio": median["house"] / median["hand"],
      "cpu_ratio": statistics.median(cpu["house"])
      / statistics.median(cpu["hand"]),
      "least_ratio": min(wall["house"]) / min(wall["hand"]),
      "goal": GOALS[slug],
      "house_compile_s": compiled["house"],
      "hand_compile_s": compiled["hand"],
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("task", nargs="*", help=", ".join(TASKS))
  parser.add_argument("--rounds", type=int, default=100)
  parser.add_argument("--json", help="file for the table")
  args = parser.parse_args()
  print(f"{jax.devices()[0].platform}, jax {jax.__version__}; ms a cycle")
  print(
      f"{'task':20s} {'house':>8s} {'hand':>8s} {'ratio':>6s} {'of CPU':>6s}"
      f" {'of min':>6s} {'goal':>5s}  compile s (house, hand)"
  )
  rows = []
  for task in args.task or TASKS:
    row = compare(task, args.rounds)
    rows.append(row)
    print(
        f"{task:20s} {row['house_ms']:8.2f} {row['hand_ms']:8.2f}"
        f" {row['ratio']:6.3f} {row['cpu_ratio']:6.3f}"
        f" {row['least_ratio']:6.3f} {row['goal']:5.2f} "
        f" {row['house_compile_s']:.1f}, {row['hand_compile_s']:.1f}",
        flush=True,
    )
  if args.json:
    with open(args.json, "w", encoding="utf-8") as f:
      json.dump({"jax": jax.__version__, "rows": rows}, f, indent=2)


if __name__ == "__main__":
  main()
