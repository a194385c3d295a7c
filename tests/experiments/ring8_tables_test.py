"""The ring8 tables: quick checks of the machinery, slow ones of the orders."""

import csv
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import evals
from experiments import ring8_families as families
from experiments import ring8_tables as tables


def _same_shapes(steps):
  """One update keeps the structure, shapes and dtypes of state and average."""
  init, update = steps
  start = jax.eval_shape(init, jax.random.key(0))
  end = jax.eval_shape(
      update,
      *start,
      jax.random.key(1),
      jnp.int32(0),
      jnp.float32(0),
  )
  assert jax.tree.structure(end) == jax.tree.structure(start)
  for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(start)):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)


@pytest.mark.parametrize("name", families.FLOW_MAPS)
def test_every_flow_map_family_traces(name):
  _same_shapes(families.flow_map_steps(name))


# The others differ from these by one line each; the slow test runs them.
@pytest.mark.parametrize("name", ["phased", "decoupled"])
def test_matching_families_trace(name):
  _same_shapes(families.matching_steps(name))


def test_three_updates_move_every_seed_its_own_way():
  run = families.flow_map_run("eulerian", seeds=2, chunk=3)
  result = run(3)
  assert result.updates == 3
  assert result.cpu_seconds > 0
  # The first average is the initial network, the same at every run's start.
  again = run(3)
  longer = run(7)
  assert longer.updates == 6  # rounded to a multiple of the chunk
  for a, b, c in zip(
      *(jax.tree.leaves(r.params) for r in (result, again, longer))
  ):
    assert np.isfinite(a).all()
    np.testing.assert_array_equal(a, b)
    if a.ndim > 2:  # kernels; biases start at zero for every seed
      assert not np.array_equal(a[0], a[1])
    assert not np.array_equal(a, c)


def test_anchor_is_the_teacher_where_the_times_agree():
  x = jnp.array([[0.3, -1.0], [1.2, 0.4]])
  t, r = jnp.array([0.6, 0.6]), jnp.array([0.6, 0.2])
  fn = families._anchored(lambda x, t, r: 7.0 * x)
  expected = jnp.stack([families.teacher(x, t)[0], 7.0 * x[1]])
  np.testing.assert_array_equal(fn(x, t, r), expected)


def test_matching_times_are_in_range_and_shared_by_groups():
  low, high = families.SIGMAS
  t = np.asarray(families._matching_times(jax.random.key(0)))
  ratio = t / (1 - t)
  assert low * 0.999 < ratio.min() < 2 * low
  assert high / 2 < ratio.max() < high * 1.001
  assert len(set(t.tolist())) == families.BATCH
  grouped = np.asarray(
      families._matching_times(
          jax.random.key(0), group=families.GROUP, low=0.52
      )
  ).reshape(-1, families.GROUP)
  np.testing.assert_array_equal(grouped, grouped[:, :1] + 0 * grouped)
  assert len(set(grouped[:, 0].tolist())) == len(grouped)
  assert grouped.min() > 0.52 - 1e-6


def _row(family, seed, value, arm="equal updates"):
  return {
      "family": family, "arm": arm, "seed": seed, "updates": 10,
      "cpu_seconds": 1.5, "rmse_1": value,
  }


def test_order_and_spread_say_what_the_seeds_say():
  rows = [
      _row("eulerian", 0, 0.30), _row("eulerian", 1, 0.32),
      _row("lagrangian", 0, 0.31), _row("lagrangian", 1, 0.35),
      _row("scm", 0, 0.10), _row("scm", 1, 0.12),
      _row("scm", 0, 9.0, arm="other"),
  ]
  text = tables.order(rows, "equal updates", "rmse_1")
  assert text == "scm < eulerian ~ lagrangian"
  # The sample deviation: |.30 - .32| / sqrt(2).
  runs = tables.pick(rows, "eulerian", "equal updates")
  assert tables.spread(runs, "rmse_1") == "0.310 ± 0.014"
  assert tables.spread([_row("a", 0, np.nan)] * 2, "rmse_1") == "-"
  far = [_row("a", 0, 1.0), _row("a", 1, 100.0)]
  assert tables.spread(far, "rmse_1") == "diverged"
  # Prototypes: lagrangian < scm < eulerian.
  assert tables._turned(rows) == (
      "lagrangian and scm, lagrangian and eulerian (seeds overlap)"
  )
  assert tables._turned(rows[4:6]) == "none"
  read = list(csv.DictReader(io.StringIO(tables._csv(rows).decode())))
  assert [r["family"] for r in read] == [r["family"] for r in rows]
  assert float(read[1]["rmse_1"]) == 0.32


def test_pages_written(tmp_path):
  judge = tables.Judge(64)
  judge.floors = {m: evals.Floor(0.1, 0.01) for m in ("sw2", "tv")}
  moved = judge(jnp.stack([judge.end + 1.0]))
  np.testing.assert_allclose(moved["rmse"], [np.sqrt(2)], rtol=1e-5)
  rows = [
      {**_row("eulerian", i, 0.5), "rmse_2": 0.4, "sw2_1": 0.2, "sw2_2": 0.1,
       "tv_1": 0.05}
      for i in range(3)
  ]
  picture = tables.flow_map_picture(rows, judge)
  text = tables.flow_map_text(rows, judge, 3)
  tables.write(tmp_path, "x", text, rows, picture)
  assert (tmp_path / "x.png").read_bytes()[1:4] == b"PNG"
  assert (tmp_path / "x.md").read_text() == text
  assert "true samples* |  |  |  |  | 0.100 ± 0.010 |  | 0.100" in text
  assert "| Eulerian (MeanFlow distillation) | 10 | 1.5 | 0.500 ± 0.0" in text
  assert "`python -m experiments.ring8_tables --out=docs/tables`" in text


def _separated(rows, metric, *names):
  """No seed of a family is above any of the next one."""
  runs = [
      [r[metric] for r in tables.pick(rows, n, "equal updates")] for n in names
  ]
  return all(max(a) < min(b) for a, b in zip(runs, runs[1:]))


@pytest.mark.slow
def test_flow_maps_stand_in_the_measured_order():
  rows = tables.flow_map_rows(
      tables.Judge(1024),
      seeds=3,
      updates=2500,
      names=("lagrangian", "eulerian", "scm", "semigroup", "discrete"),
      equal_seconds=False,
  )
  # Measured .23, .29, .30 (whose seeds may overlap) < .53 < .66.
  for name in ("lagrangian", "eulerian", "scm"):
    assert _separated(rows, "rmse_1", name, "semigroup", "discrete")


@pytest.mark.slow
def test_scores_match_and_the_control_collapses():
  rows, _ = tables.matching_rows(
      tables.Judge(1024),
      seeds=3,
      updates=400,
      names=("dmd", "vsd", "diff_instruct", "sds"),
  )
  for name in ("dmd", "vsd", "diff_instruct"):
    assert _separated(rows, "sw2", name, "sds")
    assert _separated(rows, "tv", name, "sds")
    assert [r["modes"] for r in tables.pick(rows, name, "equal updates")] == [
        8.0, 8.0, 8.0
    ]
  assert all(
      r["modes"] <= 2 for r in tables.pick(rows, "sds", "equal updates")
  )
