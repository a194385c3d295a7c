"""Every family of few-step students on ring8, from the exact teacher.

`flow_map_run` and `matching_run` train the seeds of one family side by side in
one program. What differs between families is one entry of
`FLOW_MAPS` or `MATCHING`; networks, optimiser, batches, times and averages are
the same. The formulas are the library's own.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distilljax import losses, models, oracles, processes, train

PATH = processes.RectifiedFlow()
TRIG = processes.TrigFlow()  # sigma_data 1: ring8's deviation is .995
BATCH = 128
# Schedules count parts of a run, so that one program serves runs of any length.
_PARTS = 1_000_000
_RATE = train.make_schedule("cosine", 1e-3, _PARTS)
# Adaptive weight, as in configs/mean_flow_ring8.py.
_NORM = {"norm_p": 0.5, "norm_eps": 0.01}


@functools.cache
def mixture() -> oracles.GaussianMixture:
  """Ring8; a mode's class is whether its number is odd."""
  with jax.ensure_compile_time_eval():
    ring = oracles.ring8()
    return oracles.make_gaussian_mixture(
        ring.means, ring.scales, classes=[0, 1] * 4
    )


def teacher(x, t):
  """The exact velocity."""
  return mixture().predict(x, t, path=PATH, target="velocity")


class Result(NamedTuple):
  """What a run leaves.

  Attributes:
    params: the averaged parameters, every leaf with a leading axis of seeds.
    updates: of the student.
    cpu_seconds: of the process during the updates of all seeds together,
      compilation not included.
  """

  params: Any
  updates: int
  cpu_seconds: float


def _times(key, *, equal, r_zero=0.2):
  return processes.sample_mean_flow_times(
      key,
      (BATCH,),
      distribution="uniform",
      equal=equal,
      t_one=0.2,
      r_zero=r_zero,
  )


def _descend(optimizer, gradients, state, params, place):
  """One update at `place`, the share of the run that is done."""
  steps, state = optimizer.update(gradients, state, params)
  rate = _RATE(place * _PARTS)
  steps = jax.tree.map(lambda a: rate * a, steps)
  return optax.apply_updates(params, steps), state


def _average(new, old, decay, step):
  decay = train.ema_decay(decay)(step)
  return optax.incremental_update(new, old, 1 - decay)


def _roots(seeds: int) -> jax.Array:
  """One key a seed."""
  return jax.random.split(jax.random.key(0), seeds)


def _drive(init, update, *, seeds, chunk):
  """`update` as one program, mapped over the seeds.

  Args:
    init: key -> (state, averaged params).
    update: (state, averaged params, key, step, place) -> the first two, new;
      `place` is the share of the run that is done.
    seeds: how many.
    chunk: updates in one call of the program.

  Returns:
    (run, start): run(updates, start) -> Result, and start, which is
    `init` of every seed.
  """

  def scanned(state, average, key, first, total):
    def body(carry, i):
      step = first + i
      place = step.astype(jnp.float32) / total
      return update(*carry, jax.random.fold_in(key, step), step, place), None

    return jax.lax.scan(body, (state, average), jnp.arange(chunk))[0]

  roots = _roots(seeds)
  keys = jax.vmap(lambda k: jax.random.fold_in(k, 1))(roots)
  start = jax.jit(jax.vmap(init))(roots)
  program = jax.jit(jax.vmap(scanned, (0, 0, 0, None, None)))
  program = program.lower(*start, keys, jnp.int32(0), jnp.float32(1))
  # As fast as the default on small matrices, and two seconds less to compile.
  program = program.compile({"xla_backend_optimization_level": 1})

  def run(updates: int, start: Any) -> Result:
    chunks = max(round(updates / chunk), 1)
    total = jnp.float32(chunks * chunk)
    state, average = jax.block_until_ready(start)
    before = time.process_time()
    for i in range(chunks):
      state, average = program(
          state, average, keys, jnp.int32(i * chunk), total
      )
    jax.block_until_ready(average)
    return Result(average, chunks * chunk, time.process_time() - before)

  return run, start


# --- Flow maps -------------------------------------------------------------


class FlowMap(NamedTuple):
  """A family of flow maps.

  Attributes:
    title: in the table.
    loss: (student, average, x0, noise, key, place) -> [b]; the first two are
      (x, t, r) -> mean velocity.
    free_end: whether the student is trained for ends r > 0.
  """

  title: str
  loss: Callable[..., jax.Array]
  free_end: bool = True


def _eulerian(student, average, x0, noise, key, place):
  del average, place
  t, r = _times(key, equal=0.5)
  x_t = PATH.add_noise(x0, noise, t)
  return losses.flow_map_loss(
      student, x_t, t, r, identity="eulerian", v=teacher(x_t, t), **_NORM
  ).loss


def _lagrangian(student, average, x0, noise, key, place):
  del average, place
  t, r = _times(key, equal=0.5)
  x_t = PATH.add_noise(x0, noise, t)
  return losses.flow_map_loss(
      student, x_t, t, r, identity="lagrangian", teacher_fn=teacher, **_NORM
  ).loss


def _anchored(average):
  """The average, but the teacher where start and end are one."""

  def fn(x, t, r):
    return jnp.where((t == r)[:, None], teacher(x, t), average(x, t, r))

  return fn


def _semigroup(student, average, x0, noise, key, place):
  del place
  of_times, of_middle = jax.random.split(key)
  t, r = _times(of_times, equal=0.5)
  s = r + (t - r) * jax.random.uniform(of_middle, t.shape)
  return losses.flow_map_loss(
      student,
      PATH.add_noise(x0, noise, t),
      t,
      r,
      identity="semigroup",
      s=s,
      target_fn=_anchored(average),
      **_NORM,
  ).loss


def _shortcut(student, average, x0, noise, key, place):
  del place
  t, r = _times(key, equal=0.5)
  x_t = PATH.add_noise(x0, noise, t)
  target = losses.shortcut_target(_anchored(average), x_t, t, t - r)
  error = losses.squared_distance(student(x_t, t, r), target)
  return losses.adaptive_loss(error, **_NORM)


def _discrete(student, average, x0, noise, key, place, n=48):
  del place
  t, zero = _times(key, equal=0.0, r_zero=1.0)
  t = jnp.maximum(jnp.ceil(t * n), 1) / n
  s = t - 1 / n
  x_t = PATH.add_noise(x0, noise, t)

  def clean(net):
    return lambda x, t: losses.flow_map_step(x, net(x, t, zero), t, zero)

  error = losses.consistency_loss(
      clean(student),
      clean(average),
      x_t,
      t,
      processes.heun(teacher, x_t, jnp.stack([t, s])),
      s,
      metric=losses.squared_distance,
  )
  return losses.adaptive_loss(error, **_NORM)


def _continuous(student, average, x0, noise, key, place):
  del average, place
  t, r = _times(key, equal=0.0, r_zero=1.0)
  x_t = PATH.add_noise(x0, noise, t)
  return losses.flow_map_loss(
      student, x_t, t, r, identity="eulerian", v=teacher(x_t, t), **_NORM
  ).loss


def _scm(student, average, x0, noise, key, place):
  del average
  # The paper's draw, log sigma of N(-1, 1.4^2) where the data's deviation is
  # one half, at equal signal-to-noise ratio.
  sigma = 2 * processes.sample_log_normal_sigmas(
      key, (BATCH,), mean=-1.0, std=1.4
  )
  t = TRIG.t_from_log_snr(-2 * jnp.log(sigma))
  angle = TRIG.angle(t)
  x_t = TRIG.add_noise(x0, noise, t)
  network = losses.make_trigflow_network(
      lambda x, t: student(x, t, jnp.zeros_like(t))
  )
  slope = losses.make_trigflow_network(teacher)(x_t, angle)
  f, tangent = losses.trigflow_tangent(
      network,
      x_t,
      slope,
      angle,
      warmup=losses.tangent_warmup(
          (place * _PARTS).astype(jnp.int32), warmup_steps=_PARTS // 6
      ),
      sigma_data=1.0,
  )
  return losses.scm_loss(
      f, losses.normalize_tangent(tangent, c=0.1), angle, sigma_data=1.0
  )


FLOW_MAPS = {
    "eulerian": FlowMap("Eulerian (MeanFlow distillation)", _eulerian),
    "lagrangian": FlowMap("Lagrangian", _lagrangian),
    "semigroup": FlowMap("semigroup, random middle", _semigroup),
    "shortcut": FlowMap("shortcut (midpoint)", _shortcut),
    "discrete": FlowMap("discrete consistency, N = 48", _discrete, False),
    "continuous": FlowMap("continuous consistency, r = 0", _continuous, False),
    "scm": FlowMap("sCM (TrigFlow)", _scm, False),
}


@functools.cache
def _apply_fn(**hyper):
  with jax.ensure_compile_time_eval():
    return models.make("mlp", jax.random.key(0), dim=2, **hyper).apply_fn


# Low frequencies: a flow map is differentiated in time.
_FLOW_MAP = {
    "width": 96, "depth": 3, "second_time": True, "max_frequency": 3.0
}


def flow_map_fn(params):
  """(x, t, r) -> mean velocity."""
  apply_fn = _apply_fn(**_FLOW_MAP)
  return lambda x, t, r: apply_fn(params, x, t, r=r)


def flow_map_steps(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """(init, update) of one student of `FLOW_MAPS`, as `_drive` takes them."""
  family = FLOW_MAPS[name]
  optimizer = train.make_optimizer(learning_rate=1.0, steps=1)

  def init(key):
    params = models.make("mlp", key, dim=2, **_FLOW_MAP).params
    return (params, optimizer.init(params)), params

  def update(state, average, key, step, place):
    params, opt_state = state
    of_data, of_noise, of_loss = jax.random.split(key, 3)
    x0 = mixture().sample(of_data, BATCH, stratified=True)
    noise = jax.random.normal(of_noise, x0.shape)

    def mean_loss(params):
      return jnp.mean(
          family.loss(
              flow_map_fn(params), flow_map_fn(average), x0, noise, of_loss,
              place,
          )
      )

    gradients = jax.grad(mean_loss)(params)
    params, opt_state = _descend(
        optimizer, gradients, opt_state, params, place
    )
    return (params, opt_state), _average(params, average, 0.995, step)

  return init, update


def flow_map_run(
    name: str, *, seeds: int, chunk: int = 100
) -> Callable[[int], Result]:
  """Compiles a family of `FLOW_MAPS`; the result trains it: updates -> Result.

  Args:
    name: which family.
    seeds: how many students, trained side by side.
    chunk: the number of updates is rounded to a multiple of this.
  """
  run, start = _drive(*flow_map_steps(name), seeds=seeds, chunk=chunk)
  return lambda updates: run(updates, start)


# --- Distribution matching -------------------------------------------------

RATIO = 5  # critic updates for one of the generator
PAIRS = 512  # exact trajectories that the warm-up regresses on
WARM_UP = 300  # its updates
GUIDANCE = 2.0  # of the two guided rows
PHASES = (1.0, 0.5, 0.0)
SIGMAS = (0.05, 5.0)  # sigma / alpha, drawn log-uniformly
GROUP = 16  # rows that share a noise level
_GENERATOR = {"width": 64, "depth": 3}


def _real(x_t, t, label=None, guidance=None):
  """The teacher's x0; unlabelled, of one class, or guided towards it."""
  return mixture().predict(
      x_t, t, path=PATH, target="x0", labels=label, guidance=guidance
  )


class Look(NamedTuple):
  """A noised sample and what both scores say of it.

  Attributes:
    x_t: the sample, noised.
    noise: that was added.
    t: times.
    real: the teacher's x0.
    fake: the critic's x0.
  """

  x_t: jax.Array
  noise: jax.Array
  t: jax.Array
  real: jax.Array
  fake: jax.Array


class Matching(NamedTuple):
  """A family of distribution matching.

  Attributes:
    title: in the table.
    loss: (x, look, label) -> [b], where look(name) is a `Look` at x of its own
      time and noise.
    critic: whether a fake score is trained.
    labelled: whether the networks read one of two classes (odd and even modes).
    group: rows that share a time.
    steps: calls of a sample.
  """

  title: str
  loss: Callable[..., jax.Array] | None
  critic: bool = True
  labelled: bool = False
  group: int = 1
  steps: int = 1


def _dmd(x, look, label):
  del label
  at = look("score")
  return losses.surrogate_loss(x, losses.dmd_direction(x, at.real, at.fake))


def _group_dmd(x, look, label):
  del label
  at = look("score")
  groups = jnp.arange(BATCH) // GROUP
  return losses.surrogate_loss(
      x, losses.group_dmd_direction(x, at.real, at.fake, groups)
  )


def _epsilon(x0, at):
  return PATH.convert(x0, at.x_t, at.t, "x0", "epsilon")


def _vsd(x, look, label):
  del label
  at = look("score")
  direction = losses.vsd_direction(
      _epsilon(at.real, at), _epsilon(at.fake, at), PATH.sigma(at.t)
  )
  return losses.surrogate_loss(x, direction, elements="sum")


def _sds(x, look, label):
  del label
  at = look("score")
  direction = losses.sds_direction(
      _epsilon(at.real, at), at.noise, PATH.sigma(at.t)
  )
  return losses.surrogate_loss(x, direction, elements="sum")


def _diff_instruct(x, look, label):
  del label
  at = look("score")
  return losses.surrogate_loss(
      x, losses.diff_instruct_direction(at.real, at.fake), elements="sum"
  )


def _sid(x, look, label, alpha):
  del label
  at = look("score")
  return losses.sid_loss(x, at.real, at.fake, alpha=alpha)


def _guided_dmd(x, look, label):
  at = look("score")
  real = _real(at.x_t, at.t, label, GUIDANCE)
  return losses.surrogate_loss(x, losses.dmd_direction(x, real, at.fake))


def _decoupled(x, look, label):
  matching, augmentation = look("score"), look("augmentation")
  return losses.decoupled_dmd_loss(
      x,
      matching.real,
      matching.fake,
      augmentation.real,
      _real(augmentation.x_t, augmentation.t),
      guidance=GUIDANCE,
  )


MATCHING = {
    "dmd": Matching("DMD", _dmd),
    "group": Matching("DMD, group-normalised", _group_dmd, group=GROUP),
    "vsd": Matching("VSD", _vsd),
    "diff_instruct": Matching("Diff-Instruct", _diff_instruct),
    "sid_05": Matching(
        "SiD, alpha = 0.5", functools.partial(_sid, alpha=0.5)
    ),
    "sid_10": Matching(
        "SiD, alpha = 1", functools.partial(_sid, alpha=1.0)
    ),
    "sid_12": Matching(
        "SiD, alpha = 1.2", functools.partial(_sid, alpha=1.2)
    ),
    "phased": Matching("phased DMD, two experts", None, steps=2),
    "guided": Matching("DMD, guided w = 2", _guided_dmd, labelled=True),
    "decoupled": Matching("decoupled DMD, w = 2", _decoupled, labelled=True),
    "sds": Matching("SDS (control)", _sds, critic=False),
}


def _generator(family):
  """(params, x, t, label) -> x0."""
  apply_fn = _apply_fn(num_classes=2 if family.labelled else 0, **_GENERATOR)
  return lambda params, x, t, label: apply_fn(params, x, t, label=label)


def _networks(family, key):
  """Parameters of the generator and of the critic's correction (zero)."""
  hyper = {"dim": 2, "num_classes": 2 if family.labelled else 0, **_GENERATOR}
  of_generator, of_critic = jax.random.split(key)
  return {
      "generator": models.make("mlp", of_generator, **hyper).params,
      "critic": models.make("mlp", of_critic, zero_head=True, **hyper).params,
  }


def labels(family: Matching, n: int) -> jax.Array | None:
  """Both classes in turn, or None."""
  return jnp.arange(n) % 2 if family.labelled else None


@functools.cache
def _warm_generators(labelled: bool, steps: int, seeds: int, updates: int):
  """Generators of all seeds after regression on exact pairs of the teacher.

  What a family would start from in practice: it has seen the frequencies of the
  modes, and no more than `PAIRS` points. Where a sample takes two calls, both
  inputs of the exact trajectory are regressed.
  """
  family = Matching("", None, labelled=labelled, steps=steps)
  generator = _generator(family)
  optimizer = train.make_optimizer(learning_rate=1.0, steps=1)
  label = labels(family, PAIRS)
  flow = functools.partial(
      mixture().probability_flow,
      path=PATH,
      labels=label,
      guidance=GUIDANCE if labelled else None,
  )

  def one(root):
    params = _networks(family, root)["generator"]
    z = jax.random.normal(jax.random.fold_in(root, 2), (PAIRS, 2))
    pairs = [(z, 1.0)]
    if steps > 1:
      pairs.append((flow(z, 1.0, PHASES[1]), PHASES[1]))
    end = flow(z, 1.0, 0.0)

    def loss(params):
      return sum(
          jnp.mean(
              losses.denoising_loss(
                  generator(params, x, jnp.full(PAIRS, t), label), end
              )
          )
          for x, t in pairs
      )

    def body(carry, i):
      params, state = carry
      place = i.astype(jnp.float32) / updates
      gradients = jax.grad(loss)(params)
      return _descend(optimizer, gradients, state, params, place), None

    start = (params, optimizer.init(params))
    return jax.lax.scan(body, start, jnp.arange(updates))[0][0]

  return jax.jit(jax.vmap(one))(_roots(seeds))


def _matching_times(key, *, group=1, low=0.0):
  """Times of log-uniform sigma / alpha, from `low` on at the least."""
  first, last = (s / (1 + s) for s in SIGMAS)
  ends = PATH.log_snr(jnp.stack([jnp.maximum(first, low), jnp.float32(last)]))
  log_snr = jax.random.uniform(
      key, (BATCH // group,), minval=ends[1], maxval=ends[0]
  )
  return jnp.repeat(PATH.t_from_log_snr(log_snr), group)


def _pair(critic_loss, generator_loss, *, critic, init):
  """(init, update): `RATIO` critic updates, then one of the generator."""
  optimizer = train.make_optimizer(
      learning_rate=1.0, steps=1, b1=0.0, b2=0.99
  )

  def begin(key):
    state = init(key)
    params = state["params"]
    state["optimizers"] = {k: optimizer.init(p) for k, p in params.items()}
    return state, params["generator"]

  def descend(state, name, loss, key, place):
    params = state["params"]

    def mean_loss(own):
      return jnp.mean(loss({**params, name: own}, state, key))

    own, opt_state = _descend(
        optimizer,
        jax.grad(mean_loss)(params[name]),
        state["optimizers"][name],
        params[name],
        place,
    )
    return {
        **state,
        "params": {**params, name: own},
        "optimizers": {**state["optimizers"], name: opt_state},
    }

  def update(state, average, key, step, place):
    keys = jax.random.split(key, RATIO + 1)
    if critic:
      state, _ = jax.lax.scan(
          lambda s, k: (descend(s, "critic", critic_loss, k, place), None),
          state,
          keys[1:],
      )
    state = descend(state, "generator", generator_loss, keys[0], place)
    return state, _average(
        state["params"]["generator"], average, 0.99, step
    )

  return begin, update


def _one_step(family):
  generator = _generator(family)
  label = labels(family, BATCH)

  def generate(params, key):
    z = jax.random.normal(key, (BATCH, 2))
    return generator(params["generator"], z, jnp.ones(BATCH), label)

  def noised(x, key, group=1):
    of_time, of_noise = jax.random.split(key)
    t = _matching_times(of_time, group=group)
    noise = jax.random.normal(of_noise, x.shape)
    return PATH.add_noise(x, noise, t), noise, t

  def fake(params, x_t, t):
    # The critic starts as the teacher.
    correction = generator(params["critic"], x_t, t, label)
    return _real(x_t, t, label) + correction

  def critic_loss(params, state, key):
    del state
    of_latent, of_level = jax.random.split(key)
    x = generate(params, of_latent)
    x_t, _, t = noised(jax.lax.stop_gradient(x), of_level)
    return losses.denoising_loss(fake(params, x_t, t), x)

  def generator_loss(params, state, key):
    del state
    of_latent, of_level = jax.random.split(key)
    x = generate(params, of_latent)

    def look(name):
      x_t, noise, t = noised(x, train.named_key(of_level, name), family.group)
      real = _real(x_t, t, label)
      return Look(x_t, noise, t, real, fake(params, x_t, t))

    return family.loss(x, look, label)

  return _pair(
      critic_loss,
      generator_loss,
      critic=family.critic,
      init=lambda key: {"params": _networks(family, key)},
  )


def _phase_starts():
  """The least time of each phase's score, a margin above the phase's end."""
  return [low for low, _ in processes.phase_intervals(PHASES, margin=0.02)]


def _phased(family):
  """The phase is data of the state, so that one program serves both."""
  generator = _generator(family)

  def full(value):
    return jnp.broadcast_to(value, (BATCH,))

  def rollout(params, state, key):
    """(x0 projection, where the phase ends on it) of the phase's expert."""
    z = jax.random.normal(key, (BATCH, 2))
    first = generator(state["first"], z, full(1.0), None)
    middle = PATH.add_noise(first, z, full(PHASES[1]))
    x_in = jnp.where(state["phase"] == 0, z, middle)
    t_in = jnp.where(state["phase"] == 0, PHASES[0], PHASES[1])
    x0 = generator(params["generator"], x_in, full(t_in), None)
    # The noise that x_in holds stays: an Euler step of the same path.
    end = PATH.add_noise(x0, z, full(state["end"]))
    return x0, jax.lax.stop_gradient(end)

  def noised(x_end, state, key):
    of_time, of_noise = jax.random.split(key)
    t = _matching_times(of_time, low=state["low"])
    noise = jax.random.normal(of_noise, x_end.shape)
    at = PATH.coefficients(full(state["end"])), PATH.coefficients(t)
    return losses.subinterval_forward(x_end, noise, *at), noise, t, at

  def fake(params, x_t, t):
    return teacher(x_t, t) + generator(params["critic"], x_t, t, None)

  def critic_loss(params, state, key):
    of_latent, of_level = jax.random.split(key)
    _, x_end = rollout(params, state, of_latent)
    x_t, noise, t, at = noised(x_end, state, of_level)
    _, sigma = losses.subinterval_coefficients(*at)
    return losses.denoising_loss(
        fake(params, x_t, t),
        losses.subinterval_velocity_target(x_end, noise, *at),
        weight=losses.denoising_weight(sigma, kind="inverse", maximum=10.0),
    )

  def generator_loss(params, state, key):
    of_latent, of_level = jax.random.split(key)
    x0, x_end = rollout(params, state, of_latent)
    x_t, _, t, _ = noised(x_end, state, of_level)
    to_x0 = functools.partial(
        PATH.convert, x_t=x_t, t=t, source="velocity", target="x0"
    )
    direction = losses.dmd_direction(
        x0, _real(x_t, t), to_x0(fake(params, x_t, t)), floor=1e-4
    )
    return losses.surrogate_loss(x0, direction)

  def init(key):
    params = _networks(family, key)
    return {
        "params": params,
        "first": params["generator"],
        "phase": jnp.int32(0),
        "end": jnp.float32(PHASES[1]),
        "low": jnp.float32(_phase_starts()[0]),
    }

  return _pair(critic_loss, generator_loss, critic=True, init=init)


def matching_steps(name: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
  """(init, update) of one generator of `MATCHING`, as `_drive` takes them."""
  family = MATCHING[name]
  return _one_step(family) if family.loss else _phased(family)


def matching_run(
    name: str, *, seeds: int, chunk: int = 50, warm_up: int = WARM_UP
) -> Callable[[int], Result]:
  """Compiles a family of `MATCHING`: generator updates -> Result.

  Args:
    name: which family.
    seeds: how many generators, trained side by side.
    chunk: the number of updates is rounded to a multiple of this; with two
      phases that of each, which is half.
    warm_up: updates of regression on exact pairs before; 0 for none. They are
      the same for all families and not counted.
  """
  family = MATCHING[name]
  run, (state, average) = _drive(
      *matching_steps(name), seeds=seeds, chunk=chunk
  )
  if warm_up:
    average = _warm_generators(
        family.labelled, family.steps, seeds, warm_up
    )
    state["params"] = {**state["params"], "generator": average}
  start = (state, average)
  if family.loss:
    return lambda updates: run(updates, start)

  def both(updates: int) -> Result:
    first = run(updates / 2, start)
    state, average = start
    state = {
        **state,
        "first": first.params,
        "phase": jnp.ones_like(state["phase"]),
        "end": jnp.full_like(state["end"], PHASES[2]),
        "low": jnp.full_like(state["low"], _phase_starts()[1]),
    }
    second = run(updates / 2, (state, average))
    return Result(
        {"first": first.params, "second": second.params},
        first.updates + second.updates,
        first.cpu_seconds + second.cpu_seconds,
    )

  return both


def matching_sample(name: str, params: Any, z: jax.Array) -> jax.Array:
  """Samples of one seed's generator from latents [n, 2]."""
  family = MATCHING[name]
  generator = _generator(family)
  n = z.shape[0]
  if family.loss:
    return generator(params, z, jnp.ones(n), labels(family, n))
  x0 = generator(params["first"], z, jnp.ones(n), None)
  middle = jnp.full(n, PHASES[1])
  x = PATH.add_noise(x0, z, middle)
  return generator(params["second"], x, middle, None)
