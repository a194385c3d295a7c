"""The train step: the only one, and it knows nothing about any paper."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from distilljax import _checks
from distilljax.models import axes as axes_lib
from distilljax.train import method as method_lib
from distilljax.train import metrics as metrics_lib
from distilljax.train import sharding
from distilljax.train.metrics import Mean
from distilljax.typing import Array, Params, PyTree


class State(NamedTuple):
  """Everything that training changes; what a checkpoint holds.

  Attributes:
    step: steps done. Scalar int32.
    key: the stage's key, a constant: a step's key is folded from it.
    params: trained and EMA networks by name.
    opt_state: optimizer states by name.
    carry: the method's small extra state.
    skipped: by name, int32 [2]: updates skipped because a gradient or loss was
      not finite; in all, and in a row until now.
  """

  step: Array
  key: Array
  params: dict[str, Params]
  opt_state: dict[str, PyTree]
  carry: Any
  skipped: dict[str, Array]


def _select(ok: Array, new: PyTree, old: PyTree) -> PyTree:
  return jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)


def _all_finite(tree: PyTree) -> Array:
  leaves = [
    jnp.all(jnp.isfinite(x))
    for x in jax.tree.leaves(tree)
    if jnp.issubdtype(x.dtype, jnp.inexact)
  ]
  return jnp.all(jnp.stack(leaves)) if leaves else jnp.bool_(True)


def _cast(tree: PyTree, dtype: Any) -> PyTree:
  if dtype is None:
    return tree
  return jax.tree.map(
    lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
    tree,
  )


def _cut(batch: PyTree, part: int, parts: int) -> PyTree:
  """Row i goes to part i mod n: cutting a sharded batch moves no data."""
  return jax.tree.map(
    lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:])[:, part],
    batch,
  )


def _placed(shapes: PyTree, places: PyTree) -> PyTree:
  return jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    places,
  )


def _add(a: PyTree, b: PyTree) -> PyTree:
  return jax.tree.map(jnp.add, a, b)


def map_slices(
  fn: Callable[[PyTree], PyTree],
  batch: PyTree,
  *,
  slices: int,
  unroll: bool = True,
) -> PyTree:
  """Row-wise `fn` over `slices` strided slices of the rows, put together again.

  For forwards inside `prepare`, which sees the whole batch: only one slice's
  activations are held at a time where `unroll` is False.

  Args:
    fn: maps a pytree of rows to a pytree of as many rows.
    batch: pytree of arrays with a common leading axis.
    slices: number of slices; must divide the rows.
    unroll: a Python loop (fast for convolutions on CPU) instead of a scan.

  Returns:
    `fn(batch)`, up to rounding.
  """
  if slices == 1:
    return fn(batch)
  stacked = jax.tree.map(
    lambda x: jnp.moveaxis(
      x.reshape(x.shape[0] // slices, slices, *x.shape[1:]), 1, 0
    ),
    batch,
  )
  if unroll:
    parts = [
      fn(jax.tree.map(lambda x, i=i: x[i], stacked)) for i in range(slices)
    ]
    out = jax.tree.map(lambda *x: jnp.stack(x), *parts)
  else:
    out = jax.lax.map(fn, stacked)
  return jax.tree.map(
    lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), out
  )


class Step:
  """A method's train step on a mesh. Made by `make_step`.

  Attributes:
    method: the method.
    mesh: the devices.
    rules: the sharding rule of every network by name.
    accumulation: micro-batches a step.
    jitted: the program of the last call, None before the first: `jitted(
      updates, state, frozen, batch)`.
  """

  def __init__(self, method, optimizers, mesh, rules, **options):
    self.method = method
    self.mesh = mesh
    self.rules = rules
    self.jitted = None
    self._shapes = None
    self._optimizers = optimizers
    self._axes = options["axes"]
    self.accumulation = options["accumulation"]
    self._unit = sharding.row_parts(mesh) * self.accumulation
    self._unroll = options["unroll"]
    self._dtype = options["compute_dtype"]
    self._frozen_dtype = options["frozen_dtype"]
    # Of the trained networks that are cut, by name; known from the first state.
    self._cut = {}

  def __call__(
    self,
    updates: tuple[str, ...],
    state: State,
    frozen: Mapping[str, Params],
    batch: Mapping[str, Array],
  ) -> tuple[State, dict[str, Mean]]:
    """One step: updates the named networks, donates `state`."""
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % self._unit:
      self._refuse(rows)
    if self.jitted is None:
      self._build(state, frozen)
    return self.jitted(updates, state, dict(frozen), batch)

  def trace(self, updates, state, frozen, batch):
    """The step of these arrays or `ShapeDtypeStruct`s, traced, not run.

    The result has the program as a `jaxpr`, and `lower()`.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % self._unit:
      self._refuse(rows)
    self._build(state, frozen)
    return self.jitted.trace(updates, state, dict(frozen), batch)

  def lower(self, updates, state, frozen, batch):
    """The step of these arrays or `ShapeDtypeStruct`s, lowered, not run."""
    return self.trace(updates, state, frozen, batch).lower()

  def _refuse(self, rows):
    parts = sharding.row_parts(self.mesh)
    _checks.fail(
      "step",
      "batch",
      f"of rows divisible by devices {parts} x accumulation"
      f" {self.accumulation} = {self._unit}",
      f"{rows}; nearest: {sharding.nearest_multiple(rows, self._unit)}",
    )

  def init(self, params: Mapping[str, Params], key: Array) -> State:
    """The first state, in its shardings; `params` are copied, never aliased.

    Args:
      params: initial parameters of every trained network by name (others are
        passed over; an EMA network without an entry starts as its source).
      key: the stage's key (typed, threefry).
    """
    start, shapes = self._start(params, key)
    places = self.places(shapes)
    return jax.jit(self._make_state, out_shardings=places)(start, key)

  def abstract(self, params: Mapping[str, PyTree], key: Array) -> State:
    """The first state's shapes in their shardings: nothing is computed.

    Args:
      params: as for `init`; shapes (`jax.ShapeDtypeStruct`) suffice.
      key: the stage's key, or its shape.
    """
    _, shapes = self._start(params, key)
    return _placed(shapes, self.places(shapes))

  def _start(self, params, key):
    """What a state starts from, and the shapes of that state."""
    roles = self.method.networks
    start = {n: params[n] for n in self.method.named(method_lib.Trained)}
    for name in self.method.named(method_lib.Ema):
      start[name] = params.get(name, params[roles[name].of])
    shapes = jax.eval_shape(self._make_state, start, key)
    if shapes != self._shapes:
      self._shapes, self.jitted = shapes, None
    return start, shapes

  def place(self, frozen: Mapping[str, Params]) -> dict[str, Params]:
    """Frozen networks as the step wants them: cut by rule, in their dtype.

    Args:
      frozen: parameters by name, the same on every process.
    """
    frozen = self._in_dtype(frozen)
    places = self._network_places(frozen)
    if jax.process_count() == 1:
      return jax.device_put(frozen, places)
    return jax.jit(lambda tree: tree, out_shardings=places)(frozen)

  def abstract_place(
    self, frozen: Mapping[str, PyTree]
  ) -> dict[str, PyTree]:
    """The shapes of what `place` gives, in their shardings.

    Args:
      frozen: parameters or shapes by name.
    """
    shapes = jax.eval_shape(self._in_dtype, dict(frozen))
    return _placed(shapes, self._network_places(shapes))

  def _in_dtype(self, frozen):
    return {n: _cast(p, self._frozen_dtype) for n, p in frozen.items()}

  def places(self, state: State) -> State:
    """The shardings of a state (or of its shapes): what jit is given.

    Args:
      state: arrays or `jax.ShapeDtypeStruct`s.
    """
    whole = sharding.replicated(self.mesh)
    params = self._network_places(state.params)
    return State(
      step=whole,
      key=whole,
      params=params,
      opt_state={
        n: sharding.like_params(s, state.params[n], params[n])
        for n, s in state.opt_state.items()
      },
      carry=jax.tree.map(lambda _: whole, state.carry),
      skipped=jax.tree.map(lambda _: whole, state.skipped),
    )

  def not_finite(
    self,
    name: str,
    state: State,
    frozen: Mapping[str, Params],
    batch: Mapping[str, Array],
  ) -> list[int] | None:
    """Rows whose own loss or gradient is not finite: why an update was skipped.

    Rows are tried one by one with the keys of the step that is done, which
    takes a while: for a run that stops.

    Args:
      name: the network whose update was skipped.
      state: the state after that step.
      frozen: frozen networks.
      batch: that step's batch.

    Returns:
      Row numbers, or None where rows cannot be told apart (a method with
      `prepare`, gradients of its own or coupled rows; several processes).
    """
    method = self.method
    if method.prepare or method.gradients or method.couples_rows:
      return None
    if jax.process_count() > 1:
      return None
    step = state.step - 1
    key = jax.random.fold_in(state.key, step)
    updates = method.schedule.updates(int(step))
    context = method_lib.Context(step, key, updates, state.carry)
    count = jax.tree.leaves(batch)[0].shape[0]
    rows = {**batch, "key": method_lib.row_keys(key, count)}

    def finite(params, rows, context, i):
      part = jax.tree.map(lambda x: x[i][None], rows)
      context = method_lib.Context(*context[:2], updates, context[2])

      def total(tree):
        cast = {
          k: _cast(v, self._dtype) for k, v in {**params, name: tree}.items()
        }
        terms, _ = method.losses[name](cast, part, context)
        return sum(t.sum / jnp.maximum(t.count, 1) for t in terms.values())

      value, grads = jax.value_and_grad(total)(params[name])
      return jnp.isfinite(value) & _all_finite(grads)

    one = jax.jit(finite)
    params = {**frozen, **state.params}
    given = (context.step, context.key, context.carry)
    return [
      i for i in range(count) if not one(params, rows, given, jnp.int32(i))
    ]

  def _network_places(self, params):
    return {
      n: sharding.shardings(n, p, self.rules[n], self.mesh, self._axes)
      for n, p in params.items()
    }

  def _build(self, state, frozen):
    """The jitted step of states of these shapes."""
    whole, rows = sharding.replicated(self.mesh), sharding.rows(self.mesh)
    places = self.places(state)
    self._cut = {
      n: places.params[n] for n in state.opt_state if self.rules[n] != "dp"
    }
    # On CPU the compiler's third optimization level costs a third more compile
    # time and runs no faster (measured on a UNet step: 62 against 61 ms).
    on_cpu = self.mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 1} if on_cpu else None
    self.jitted = jax.jit(
      self.traced,
      static_argnums=0,
      donate_argnums=1,
      in_shardings=(places, self._network_places(frozen), rows),
      out_shardings=(places, whole),
      compiler_options=options,
    )

  def _make_state(self, params, key):
    trained = self.method.named(method_lib.Trained)
    return State(
      step=jnp.int32(0),
      key=key,
      params=jax.tree.map(jnp.array, params),
      opt_state={n: self._optimizers[n].init(params[n]) for n in trained},
      carry=None if self.method.carry is None else self.method.carry(),
      skipped={n: jnp.zeros(2, jnp.int32) for n in trained},
    )

  def traced(self, updates, state, frozen, batch):
    """The step as a plain function, to be traced inside another program."""
    # For networks and kernels that say where their activations lie.
    with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
      return self._step(updates, state, frozen, batch)

  def _step(self, updates, state, frozen, batch):
    method = self.method
    key = jax.random.fold_in(state.key, state.step)
    rows = jax.tree.leaves(batch)[0].shape[0]
    batch = {**batch, "key": method_lib.row_keys(key, rows)}
    params = {**frozen, **state.params}
    context = method_lib.Context(state.step, key, updates, state.carry)
    carry = state.carry
    if method.prepare is not None:
      batch, carry = method.prepare(params, batch, context)
      context = context._replace(carry=carry)
      carry = _select(_all_finite(carry), carry, state.carry)

    new_params = dict(state.params)
    opt_state = dict(state.opt_state)
    skipped = dict(state.skipped)
    metrics: dict[str, Mean] = {}
    for name in updates:
      grads, values, total = self._gradients(name, params, batch, context)
      if name in self._cut:
        # A gradient is scattered where it is summed, not held whole.
        grads = jax.lax.with_sharding_constraint(grads, self._cut[name])
      norm = optax.tree.norm(grads)
      ok = jnp.isfinite(norm) & jnp.isfinite(total)
      own = {n: state.params[n] for n in self._moved_with(name)}
      moved, opt_state[name] = self._update(
        name, ok, grads, own, state.opt_state[name], state.step
      )
      new_params.update(moved)
      skipped[name] = jnp.where(
        ok,
        state.skipped[name] * jnp.array([1, 0]),
        state.skipped[name] + jnp.array([1, 1]),
      )
      values["loss"] = metrics_lib.once(total)
      values["grad_norm"] = metrics_lib.once(norm)
      # A skipped update says so and leaves its numbers out of the averages.
      for metric, value in values.items():
        metrics[f"{name}/{metric}"] = Mean(
          *_select(ok, value, Mean(*jax.tree.map(jnp.zeros_like, value)))
        )
      metrics[f"{name}/skipped"] = metrics_lib.once(~ok)
    return (
      State(state.step + 1, state.key, new_params, opt_state, carry, skipped),
      metrics,
    )

  def _moved_with(self, name):
    """The network itself and the EMA networks that follow it."""
    roles = self.method.networks
    emas = self.method.named(method_lib.Ema)
    return [name, *(n for n in emas if roles[n].of == name)]

  def _update(self, name, ok, grads, own, opt_state, step):
    """Optimizer and EMA where `ok`, everything as it was where not.

    A branch instead of a select per array: nothing in it is a convolution, and
    it compiles in half the time.
    """

    def move(own, opt_state):
      change, opt_state = self._optimizers[name].update(
        grads, opt_state, own[name]
      )
      new = {name: optax.apply_updates(own[name], change)}
      for ema in set(own) - {name}:
        decay = self.method.networks[ema].decay
        decay = decay(step) if callable(decay) else decay
        new[ema] = jax.tree.map(
          lambda e, p, d=decay: (d * e + (1 - d) * p).astype(e.dtype),
          own[ema],
          new[name],
        )
      return new, opt_state

    return jax.lax.cond(ok, move, lambda *same: same, own, opt_state)

  def _gradients(self, name, params, batch, context):
    loss = self.method.losses[name]

    def evaluate(tree, part):
      cast = {
        k: _cast(v, self._dtype) for k, v in {**params, name: tree}.items()
      }
      return loss(cast, part, context)

    def objective(tree, part, counts):
      terms, extra = evaluate(tree, part)
      total = sum(
        term.sum / jnp.maximum(counts[k], 1) for k, term in terms.items()
      )
      return total, (terms, extra)

    def counts_of(part):
      return {k: t.count for k, t in evaluate(params[name], part)[0].items()}

    differentiate = jax.value_and_grad(objective, has_aux=True)

    def accumulate(fn, rows=batch):
      """Sum over micro-batches of the pytree `fn(micro-batch)`."""
      parts = self.accumulation
      if parts == 1:
        return fn(rows)
      if self._unroll:
        out = fn(_cut(rows, 0, parts))
        for i in range(1, parts):
          out = _add(out, fn(_cut(rows, i, parts)))
        return out
      stacked = jax.tree.map(
        lambda x: jnp.moveaxis(
          x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0
        ),
        rows,
      )
      first = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(fn, jax.tree.map(lambda x: x[0], stacked)),
      )
      return jax.lax.scan(
        lambda total, part: (_add(total, fn(part)), None), first, stacked
      )[0]

    tree = params[name]
    if self.method.gradients is not None:
      grads, extra = self.method.gradients(
        evaluate, tree, batch, context, accumulate
      )
      return grads, dict(extra), jnp.float32(0)
    if self.accumulation == 1:
      # One pass: the counts are those of the only micro-batch.
      def whole(tree):
        terms, extra = evaluate(tree, batch)
        total = sum(t.sum / jnp.maximum(t.count, 1) for t in terms.values())
        return total, (terms, extra)

      (total, (terms, extra)), grads = jax.value_and_grad(whole, has_aux=True)(
        tree
      )
    else:
      counts = accumulate(counts_of)
      (total, (terms, extra)), grads = accumulate(
        lambda part: differentiate(tree, part, counts)
      )
    return grads, {**terms, **extra}, total


def make_step(
  method: method_lib.Method,
  optimizers: Mapping[str, optax.GradientTransformation],
  mesh: jax.sharding.Mesh | None = None,
  rules: str | Mapping[str, str] = "dp",
  *,
  axes: axes_lib.AxisTable = (),
  accumulation: int = 1,
  unroll: bool = True,
  compute_dtype: Any = None,
  frozen_dtype: Any = None,
) -> Step:
  """The train step of a method: `step(updates, state, frozen, batch)`.

  One jitted function with `updates` static (a program per distinct entry of the
  schedule), state donated, shardings in = out. Every loss of a step sees the
  parameters before any update. The step adds `batch["key"]`, one key a row. A
  network whose loss or gradient is not finite is left as it was, with its
  optimizer and EMA; the skip is counted.

  Args:
    method: the method.
    optimizers: an optax transformation for every trained network by name.
    mesh: devices, see `make_mesh`; None is all of them, as the axis `data`.
    rules: how networks and their optimizers are cut over the mesh: "dp"
      (replicated), "fsdp", "fsdp+tensor", "fsdp+context"; one for all networks,
      or by name (an EMA that is not named follows its source, others are
      replicated).
    axes: names of the axes of parameters that the zoo does not know: (pattern
      of the end of a path, names of the last axes); see `models.axes`.
    accumulation: micro-batches a step; must divide the batch over the devices.
      Counts of all micro-batches are summed before any gradient, so the number
      changes nothing but memory (and rounding).
    unroll: run the micro-batches as a Python loop; False is a scan, which saves
      the memory (but a convolution in it is 8-19 times slower on CPU).
    compute_dtype: dtype that parameters are cast to at the losses' door; None
      leaves them. Master parameters and gradients stay as they are.
    frozen_dtype: dtype in which `Step.place` holds the frozen networks; None
      leaves them.

  Returns:
    A `Step`: callable `(updates, state, frozen, batch) -> (state, metrics)`,
    with `init(params, key) -> State` and `place(frozen)`.

  Raises:
    ValueError: an optimizer is missing, accumulation is asked of a method
      whose loss couples rows, or a rule does not fit networks and mesh.
  """
  method_lib.check_method(method)
  trained = method.named(method_lib.Trained)
  if missing := sorted(set(trained) - set(optimizers)):
    raise ValueError(
      f"make_step: optimizers must have an entry for {trained}, got none for"
      f" {missing}"
    )
  if accumulation < 1:
    _checks.fail("make_step", "accumulation", ">= 1", accumulation)
  if method.couples_rows and accumulation > 1:
    raise ValueError(
      f"make_step: accumulation must be 1 for {method.name}, whose loss"
      f" couples the rows of a batch, got {accumulation}"
    )
  mesh = sharding.make_mesh() if mesh is None else mesh
  sources = {n: getattr(r, "of", None) for n, r in method.networks.items()}
  return Step(
    method,
    dict(optimizers),
    mesh,
    sharding.rule_of(sources, rules, mesh),
    axes=axes,
    accumulation=accumulation,
    unroll=unroll,
    compute_dtype=compute_dtype,
    frozen_dtype=frozen_dtype,
  )
