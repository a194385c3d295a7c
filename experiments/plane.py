"""Problems in the plane: the teacher is a formula, the answer is known."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distilljax import data, evals, models, oracles, processes
from distilljax.train import report

MIXTURES = {
  "ring8": oracles.ring8,
  "unit_ring": oracles.unit_ring,
  "grid25": oracles.grid25,
}


class PlaneProblem:
  """A Gaussian mixture in the plane with its closed-form teacher.

  Args:
    config: the `data` block.
    evaluation: the `evaluation` block.
    log: unused.

  Attributes:
    headline: the metric that a run's last line and its evaluations name.
    watchable: metrics that can be watched during training.
  """

  headline = "sliced_wasserstein"
  watchable = (
    "sliced_wasserstein",
    "energy_distance",
    "mode_tv",
    "modes",
    "within_4sd",
    "map_rmse",
  )

  def __init__(
    self,
    config: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    log: Callable[[str], None] = print,
  ):
    del log
    self._evaluation = evaluation
    self.mixture = MIXTURES[config["name"]]()
    self.path = processes.RectifiedFlow()
    self.sample_shape = (self.mixture.dim,)
    self.null_label = None
    self._references = {}

  def model(self, block: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters that the data fix, for a network of the zoo."""
    return {"dim": self.mixture.dim} if block["kind"] == "mlp" else {}

  def exact(self, prediction: str = "velocity") -> models.Network:
    """The teacher: the mixture's own x0 or velocity."""
    fn = self.mixture.prediction_fn(self.path, prediction)

    def apply_fn(params, x, t, **_):
      del params
      return fn(x, t)

    return models.from_callable(apply_fn, {})

  def batches(
    self, batch_size: int, seed: int, role: str, rows: int
  ) -> Callable[[], Any]:
    """() -> iterator of batches: samples, or ODE pairs for role "pairs"."""
    if role not in ("samples", "pairs"):
      raise ValueError(
        f"config: data of a stage must be 'samples' or 'pairs', got {role!r}"
      )
    rows = rows or 65536

    def iterator():
      key = jax.random.key(seed + sum(role.encode()))
      if role == "pairs":
        latent = jax.random.normal(key, (rows, self.mixture.dim))
        arrays = {"latent": latent, "x": self.endpoint(latent)}
      else:
        arrays = {"x": self.mixture.sample(key, rows)}
      arrays = {k: np.asarray(v, np.float32) for k, v in arrays.items()}
      return data.make_iterator(arrays, batch_size, seed=seed, name="mixture")

    return iterator

  def endpoint(self, latent: jax.Array) -> jax.Array:
    """Where the exact probability flow takes latents from t = 1 to t = 0."""
    return jax.jit(
      lambda x: self.mixture.probability_flow(x, 1.0, 0.0, path=self.path)
    )(latent)

  def inputs(self, n: int, key: jax.Array) -> dict[str, Any]:
    """Latents for `n` samples."""
    return {"noise": jax.random.normal(key, (n, self.mixture.dim))}

  def _reference_sample(self, n):
    if n not in self._references:
      key = jax.random.key(self._evaluation["noise_seed"] + 1)
      self._references[n] = self.mixture.sample(key, n, stratified=True)
    return self._references[n]

  def floors(self) -> list[dict[str, Any]]:
    """Two true samples against each other, and a Gaussian of equal moments."""
    n = self._evaluation["n"]
    key = jax.random.key(self._evaluation["noise_seed"] + 2)
    rows = []
    exact = self.mixture.sample(key, n)
    reference = self._reference_sample(n)
    gaussian = jnp.mean(reference, 0) + jax.random.normal(
      jax.random.fold_in(key, 1), (n, self.mixture.dim)
    ) * jnp.std(reference, 0)
    for name, x in (
      ("floor: two true samples", exact),
      ("floor: Gaussian of equal moments", gaussian),
    ):
      for metric, value in self._plain(x).items():
        rows.append(
          {
            "model": name,
            "steps": None,
            "metric": metric,
            "value": value,
            "n": n,
          }
        )
    return rows

  def _plain(self, x) -> dict[str, float]:
    m = self.mixture
    reference = self._reference_sample(x.shape[0])
    return {
      "sliced_wasserstein": float(evals.sliced_wasserstein(x, reference)),
      "energy_distance": float(evals.energy_distance(x, reference)),
      "mode_tv": float(evals.mode_frequency_tv(x, m)),
      "modes": float(evals.modes_covered(x, m)),
      "within_4sd": float(evals.share_within(x, m)),
    }

  def score(
    self, samples: np.ndarray, inputs: Mapping[str, Any]
  ) -> dict[str, float]:
    """Metric -> value; `map_rmse` is the distance to the exact endpoint."""
    x = jnp.asarray(samples)
    gap = x - self.endpoint(inputs["noise"])
    rmse = jnp.sqrt(jnp.mean(jnp.sum(jnp.square(gap), -1)))
    return {**self._plain(x), "map_rmse": float(rmse)}

  def facts(self) -> dict[str, Any]:
    """Nothing to add to the summary."""
    return {}

  def picture(self, rows: list[tuple[str, np.ndarray]], **words) -> list[Any]:
    """Scatter plots side by side."""
    return [report.scatter_grid([(n, x[:2000]) for n, x in rows], **words)]

  def real(self) -> tuple[str, np.ndarray]:
    """A true sample."""
    key = jax.random.key(self._evaluation["noise_seed"] + 3)
    return "true", np.asarray(self.mixture.sample(key, 2000))
