"""Image problems: data, floors, scores and pictures."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from distilljax import data, evals
from distilljax.train import report


class ImageProblem:
  """Class-conditional images of the package (or a folder of the user's).

  Args:
    config: the `data` block: name, batch_size, augment, folder, rows.
    evaluation: the `evaluation` block: n, batch, noise_seed.
    log: gets one line for what takes long.

  Attributes:
    headline: the metric that a run's last line and its evaluations name.
    watchable: metrics that can be watched during training.
  """

  headline = "fcd"
  watchable = tuple(evals.METRICS)

  def __init__(
    self,
    config: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    log: Callable[[str], None] = print,
  ):
    self._config = config
    self._evaluation = evaluation
    self._log = log
    self.info = data.info(config["name"])
    self.sample_shape = self.info.sample_shape
    self.train = data.load(config["name"], "train", folder=config["folder"])
    self.test = data.load(config["name"], "test", folder=config["folder"])
    self._judge = None

  def model(self, block: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters that the data fix, for a network of the zoo."""
    known = {"num_classes": self.info.num_classes}
    if block["kind"] in ("unet", "dit"):
      known["in_channels"] = self.sample_shape[-1]
    return known

  @property
  def null_label(self) -> int:
    """The class that stands for no class."""
    return self.info.num_classes

  def exact(self, **_: Any) -> None:
    """Images have no closed-form teacher."""
    return

  def batches(
    self, batch_size: int, seed: int, role: str, rows: int
  ) -> Callable[[], Any]:
    """() -> iterator of training batches of the first `rows` rows (0: all)."""
    if role != "samples":
      raise ValueError(f"config: images have no data {role!r}, only samples")
    augment = self._config["augment"]
    arrays = {k: v[: rows or None] for k, v in self.train.items()}
    return lambda: data.make_iterator(
      arrays,
      batch_size,
      seed=seed,
      augment=dict(augment) if augment else None,
      name=self._config["name"],
    )

  def inputs(self, n: int, key: jax.Array) -> dict[str, Any]:
    """Latents and labels for `n` samples, classes in equal numbers."""
    return {
      "noise": jax.random.normal(key, (n, *self.sample_shape)),
      "label": np.arange(n, dtype=np.int32) % self.info.num_classes,
    }

  def judge(self):
    """Classifier and reference features; trained (or read) at first use."""
    if self._judge is None:
      began = time.monotonic()
      last = [began]

      def progress(step, steps, values):
        if time.monotonic() - last[0] > 10:
          last[0] = time.monotonic()
          self._log(
            f"classifier: step {step}/{steps}, loss {values['loss']:.3f}"
          )

      classifier = evals.train_classifier(
        self.train, self.test, progress=progress
      )
      reference = evals.image_reference(self.train, classifier)
      self._log(
        f"classifier: test accuracy {classifier.accuracy:.3f},"
        f" {time.monotonic() - began:.0f} s"
      )
      self._judge = classifier, reference
    return self._judge

  def floors(self) -> list[dict[str, Any]]:
    """Scores of real, blurred and random images."""
    classifier, _ = self.judge()
    return evals.image_floors(
      self.test, self.train, classifier, n=self._evaluation["n"]
    )

  def facts(self) -> dict[str, Any]:
    """Numbers about the evaluation itself, for the summary."""
    return {"classifier_accuracy": float(self.judge()[0].accuracy)}

  def score(
    self, samples: np.ndarray, inputs: Mapping[str, Any]
  ) -> dict[str, float]:
    """Metric -> value of one model's samples."""
    classifier, reference = self.judge()
    return evals.score_images(samples, inputs["label"], reference, classifier)

  def picture(self, rows: list[tuple[str, np.ndarray]], **words) -> list[Any]:
    """Figures of sample sets, one class a column, same latents."""
    classes = self.info.num_classes
    grid = []
    for name, images in rows:
      grid += [
        (name, images[i : i + classes])
        for i in range(0, min(len(images), 2 * classes), classes)
      ]
    return [report.image_grid(grid, self.info.class_names, **words)]

  def real(self) -> tuple[str, np.ndarray]:
    """One real test image a class, twice."""
    rows = []
    for copy in range(2):
      for c in range(self.info.num_classes):
        rows.append(self.test["x"][self.test["label"] == c][copy])
    return "real", np.stack(rows)
