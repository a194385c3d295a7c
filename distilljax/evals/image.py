"""Scores of generated images, in the feature space of a small classifier.

`score_images` gives six numbers under fixed names, all from the 64 penultimate
features (or the answers) of `train_classifier`:

| name        | what                                               | good |
|-------------|----------------------------------------------------|------|
| `fcd`       | Frechet distance between Gaussians on the features  | 0    |
| `mmd`       | squared kernel distance, unbiased (may be negative) | 0    |
| `precision` | share of samples that lie among the real images     | 1    |
| `recall`    | share of real images that lie among the samples     | 1    |
| `coverage`  | share of real images with a sample close by         | 1    |
| `accuracy`  | share of samples classified as the class asked for  | 1    |

None of them means anything alone: `image_floors` gives the same numbers for
real held-out images (the best there is at this sample size) and for two kinds
of bad images. `fcd` is biased up by a small sample, so compare equal `n` only.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np

from distilljax import _checks

_CHUNK = 1000


class MetricInfo(NamedTuple):
  """What a report says about a metric.

  Attributes:
    label: short name for a column or an axis.
    higher_is_better: its direction.
    meaning: one sentence.
    share: whether it is a share in [0, 1].
  """

  label: str
  higher_is_better: bool
  meaning: str
  share: bool = False


METRICS = {
    "fcd": MetricInfo(
        "FCD",
        False,
        "Fréchet distance between samples and training images on the features"
        " of a small classifier; grows when either fidelity or variety is off.",
    ),
    "mmd": MetricInfo(
        "MMD²",
        False,
        "squared kernel distance on the same features (RBF kernel, median"
        " width), unbiased: about 0, even slightly negative, for equal sets.",
    ),
    "precision": MetricInfo(
        "precision",
        True,
        "share of samples within reach of a real image (3 nearest neighbours):"
        " fidelity.",
        share=True,
    ),
    "recall": MetricInfo(
        "recall",
        True,
        "share of real images within reach of a sample (3 nearest neighbours):"
        " variety.",
        share=True,
    ),
    "coverage": MetricInfo(
        "coverage",
        True,
        "share of real images with a sample nearer than their 5th real"
        " neighbour.",
        share=True,
    ),
    "accuracy": MetricInfo(
        "accuracy",
        True,
        "share of samples that the classifier takes for the class that was"
        " asked for.",
        share=True,
    ),
}


def _features(fn: str, name: str, array: Any) -> np.ndarray:
  array = np.asarray(array, np.float64)
  _checks.rank(fn, name, array, 2, "[n, d]")
  if not np.isfinite(array).all():
    bad = int((~np.isfinite(array).all(axis=1)).sum())
    _checks.fail(fn, name, "finite", f"{bad} of {len(array)} rows that are not")
  return array


def _pair(fn, a, b, *, least, names=("features_a", "features_b")):
  pair = []
  for name, array in zip(names, (a, b)):
    array = _features(fn, name, array)
    if len(array) < least:
      _checks.fail(fn, name, f"at least {least} rows", len(array))
    pair.append(array)
  if pair[0].shape[1] != pair[1].shape[1]:
    _checks.fail(
        fn,
        names[1],
        f"[n, d] with d={pair[0].shape[1]} like {names[0]}",
        list(pair[1].shape),
    )
  return pair


def _root(matrix: np.ndarray) -> np.ndarray:
  """Symmetric square root; eigenvalues that rounding made negative are 0."""
  values, vectors = np.linalg.eigh(matrix)
  return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def frechet_distance(features_a: Any, features_b: Any) -> float:
  """Squared Frechet (2-Wasserstein) distance between two fitted Gaussians.

  d = |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), with means m
  and unbiased covariances C of the two sets. The root is taken of a symmetric
  matrix by eigen-decomposition, so it is real and stable for singular
  covariances (fewer rows than columns, dead features), in NumPy float64.

  Args:
    features_a: one set. Shape [n, d], n >= 2, finite.
    features_b: the other set. Shape [m, d], m >= 2, finite.

  Returns:
    A float >= 0 (up to rounding), 0 for equal means and covariances; symmetric
    in its arguments. Of the order of tr(C) (1/n + 1/m) for two samples of one
    distribution.

  Raises:
    ValueError: not [n, d] with equal d, fewer than 2 rows, or not finite.

  Example:
    >>> import numpy as np
    >>> a = np.array([[0.], [2.]])
    >>> round(frechet_distance(a, a + 3.0), 6)
    9.0

  References:
    Heusel et al., GANs Trained by a Two Time-Scale Update Rule Converge to a
    Local Nash Equilibrium, 2017, arXiv:1706.08500; departure: a small
    classifier's features in place of Inception's.
  """
  a, b = _pair("frechet_distance", features_a, features_b, least=2)
  mean = a.mean(axis=0) - b.mean(axis=0)
  cov_a = np.atleast_2d(np.cov(a, rowvar=False))
  cov_b = np.atleast_2d(np.cov(b, rowvar=False))
  root_a = _root(cov_a)
  values = np.linalg.eigvalsh(root_a @ cov_b @ root_a)
  cross = np.sqrt(np.maximum(values, 0.0)).sum()
  trace = np.trace(cov_a) + np.trace(cov_b) - 2.0 * cross
  return float(mean @ mean + trace)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """[n, m]; the expanded square, never below 0."""
  squares = np.sum(a * a, axis=1)[:, None] + np.sum(b * b, axis=1)[None, :]
  return np.maximum(squares - 2.0 * (a @ b.T), 0.0)


def kernel_distance(
    features_a: Any,
    features_b: Any,
    *,
    kernel: Literal["rbf", "polynomial"] = "rbf",
    bandwidth: float | None = None,
) -> float:
  """Squared maximum mean discrepancy, unbiased.

  MMD^2 = mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j)
          - 2 mean_{i, j} k(a_i, b_j),

  with k(x, y) = exp(-|x - y|^2 / (2 bandwidth^2)) for "rbf" (bounded, and 0
  only for equal distributions) or (x.y / d + 1)^3 for "polynomial" (KID's).
  NumPy float64.

  Args:
    features_a: one set. Shape [n, d], n >= 2, finite.
    features_b: the reference set. Shape [m, d], m >= 2, finite.
    kernel: "rbf" or "polynomial".
    bandwidth: of "rbf", > 0; None means the median distance between (at most
      1000) different rows of `features_b`, so that one reference gives one
      kernel whatever it is compared with.

  Returns:
    A float of mean 0 for two samples of one distribution, hence negative about
    half of the time there; at most 2 for "rbf".

  Raises:
    ValueError: not [n, d] with equal d, fewer than 2 rows, not finite, an
      unknown kernel, or a bandwidth that is not above 0.

  Example:
    >>> import numpy as np
    >>> a = np.arange(8.0)[:, None]
    >>> kernel_distance(a, a + 100.0) > 0.5
    True

  References:
    Gretton et al., A Kernel Two-Sample Test, 2012; Binkowski et al.,
    Demystifying MMD GANs, 2018, arXiv:1801.01401; departure: one estimate over
    all rows instead of a mean over blocks.
  """
  fn = "kernel_distance"
  _checks.one_of(fn, "kernel", kernel, ("rbf", "polynomial"))
  a, b = _pair(fn, features_a, features_b, least=2)
  if kernel == "polynomial":
    d = a.shape[1]
    k = lambda x, y: (x @ y.T / d + 1.0) ** 3
  else:
    if bandwidth is None:
      few = b[np.random.default_rng(0).permutation(len(b))[:1000]]
      squares = _squared_distances(few, few)
      upper = squares[np.triu_indices(len(few), 1)]
      bandwidth = float(np.sqrt(np.median(upper)))
      # A set of equal rows has no width; any positive number will do.
      bandwidth = bandwidth or 1.0
    _checks.in_range(fn, "bandwidth", bandwidth, 0, open_low=True)
    k = lambda x, y: np.exp(-_squared_distances(x, y) / (2.0 * bandwidth**2))

  def total(x, y):
    pieces = range(0, len(x), _CHUNK)
    return sum(float(k(x[i : i + _CHUNK], y).sum()) for i in pieces)

  def diagonal(x):
    if kernel == "rbf":
      return float(len(x))
    return float(((np.sum(x * x, axis=1) / x.shape[1] + 1.0) ** 3).sum())

  n, m = len(a), len(b)
  within_a = (total(a, a) - diagonal(a)) / (n * (n - 1))
  within_b = (total(b, b) - diagonal(b)) / (m * (m - 1))
  return within_a + within_b - 2.0 * total(a, b) / (n * m)


def _radii(x: np.ndarray, k: int) -> np.ndarray:
  """Squared distance of each row to its k-th nearest other row. [n]."""
  radii = []
  for i in range(0, len(x), _CHUNK):
    squares = _squared_distances(x[i : i + _CHUNK], x)
    rows = np.arange(len(squares))
    squares[rows, i + rows] = np.inf
    radii.append(np.partition(squares, k - 1, axis=1)[:, k - 1])
  return np.concatenate(radii)


def neighbour_scores(
    samples: Any,
    reference: Any,
    *,
    neighbours: int = 3,
    coverage_neighbours: int = 5,
) -> dict[str, float]:
  """Precision, recall, density and coverage by nearest neighbours.

  With r_k(x) the distance of a row to the k-th nearest other row of its set:
    precision = share of samples within r_k(y) of some reference row y;
    recall    = share of reference rows within r_k(s) of some sample s;
    density   = number of balls r_c(y) that hold a sample, a sample, over c;
    coverage  = share of reference rows y with a sample within r_c(y).

  Args:
    samples: features of what was generated. Shape [n, d], finite.
    reference: features of real data. Shape [m, d], finite; use m = n, since
      precision grows with m and recall with n.
    neighbours: k, of precision and recall; 1 <= k < min(n, m).
    coverage_neighbours: c, of density and coverage; 1 <= c < m.

  Returns:
    {"precision", "recall", "density", "coverage"}: shares in [0, 1], density
    from 0, about 1 for two samples of one distribution.

  Raises:
    ValueError: not [n, d] with equal d, not finite, or too few rows for the
      numbers of neighbours.

  Example:
    >>> import numpy as np
    >>> x = np.arange(10.0)[:, None]
    >>> neighbour_scores(x + 0.1, x)["coverage"]
    1.0

  References:
    Kynkaanniemi et al., Improved Precision and Recall Metric for Assessing
    Generative Models, 2019, arXiv:1904.06991; Naeem et al., Reliable Fidelity
    and Diversity Metrics for Generative Models, 2020, arXiv:2002.09797.
  """
  fn = "neighbour_scores"
  s, y = _pair(fn, samples, reference, least=2, names=("samples", "reference"))
  most = min(len(s), len(y)) - 1
  _checks.in_range(fn, "neighbours", neighbours, 1, most)
  most = len(y) - 1
  _checks.in_range(fn, "coverage_neighbours", coverage_neighbours, 1, most)
  reach_s, reach_y = _radii(s, neighbours), _radii(y, neighbours)
  wide_y = _radii(y, coverage_neighbours)
  precise = 0
  balls = 0
  recalled = np.zeros(len(y), bool)
  covered = np.zeros(len(y), bool)
  for i in range(0, len(s), _CHUNK):
    squares = _squared_distances(s[i : i + _CHUNK], y)
    precise += int((squares <= reach_y[None, :]).any(axis=1).sum())
    recalled |= (squares <= reach_s[i : i + _CHUNK, None]).any(axis=0)
    inside = squares <= wide_y[None, :]
    balls += int(inside.sum())
    covered |= inside.any(axis=0)
  return {
      "precision": precise / len(s),
      "recall": float(recalled.mean()),
      "density": balls / (coverage_neighbours * len(s)),
      "coverage": float(covered.mean()),
  }


def _images(fn: str, name: str, data: Any) -> np.ndarray:
  if isinstance(data, Mapping):
    if "x" not in data:
      _checks.fail(fn, name, "images or a dict with x", f"{', '.join(data)}")
    data = data["x"]
  data = np.asarray(data, np.float32)
  _checks.rank(fn, name, data, 4, "[n, h, w, c]")
  return data


class ImageReference(NamedTuple):
  """Real images, seen once by the classifier: for scoring many sets.

  Attributes:
    features: of all reference images. Shape [m, 64].
    shape: (h, w, c) of the images.
  """

  features: np.ndarray
  shape: tuple[int, ...]


def image_reference(reference: Any, classifier: Any) -> ImageReference:
  """Runs the classifier over the real images, once for all.

  Args:
    reference: real images in [-1, 1], as an array [m, h, w, c] or {"x": ...}.
    classifier: from `train_classifier`.

  Returns:
    An `ImageReference`, which `score_images` takes in place of the images.
  """
  images = _images("image_reference", "reference", reference)
  features = classifier.features(np.clip(images, -1.0, 1.0))
  return ImageReference(features, images.shape[1:])


def score_images(
    images: Any, labels: Any, reference: Any, classifier: Any
) -> dict[str, float]:
  """The six image scores of a set of samples.

  Everything is computed from `classifier` on images clipped to [-1, 1], as they
  are shown. `fcd` uses all rows; the others use equal numbers of samples and
  real images, drawn with a fixed seed.

  Args:
    images: samples in [-1, 1]. Shape [n, h, w, c], n >= 6.
    labels: the class asked for, a sample; None for an unconditional model,
      which then has no `accuracy`. Shape [n].
    reference: real images, as an array [m, h, w, c], as {"x": ...}, or as
      `image_reference(...)` when several sets are scored against them.
    classifier: from `train_classifier`.

  Returns:
    {"fcd", "mmd", "precision", "recall", "coverage", "accuracy"}: floats, in
    this order; see `METRICS` for meaning and direction. Rows of samples that
    are not finite make every score NaN (and are never dropped in silence).

  Raises:
    ValueError: images that are not [n, h, w, c] of one size, or labels of
      another length.
  """
  fn = "score_images"
  images = _images(fn, "images", images)
  if not isinstance(reference, ImageReference):
    reference = image_reference(reference, classifier)
  if images.shape[1:] != reference.shape:
    _checks.fail(
        fn,
        "images",
        f"[n, h, w, c] with [h, w, c]={list(reference.shape)} like"
        " reference",
        list(images.shape),
    )
  _checks.per_row(fn, "images", images, labels=labels)
  if not np.isfinite(images).all():
    names = [n for n in METRICS if n != "accuracy" or labels is not None]
    return dict.fromkeys(names, float("nan"))
  logits, features = classifier(np.clip(images, -1.0, 1.0))
  real = reference.features
  rng = np.random.default_rng(0)
  n = min(len(features), len(real))
  few = features[rng.permutation(len(features))[:n]]
  few_real = real[rng.permutation(len(real))[:n]]
  scores = {
      "fcd": frechet_distance(features, real),
      "mmd": kernel_distance(few, few_real),
  }
  near = neighbour_scores(few, few_real)
  for name in ("precision", "recall", "coverage"):
    scores[name] = near[name]
  if labels is not None:
    answers = np.argmax(logits, axis=-1)
    scores["accuracy"] = float(np.mean(answers == np.asarray(labels)))
  return scores


def class_means(data: Mapping[str, Any]) -> np.ndarray:
  """The mean image of every class: the blur that a bad model falls back on.

  Args:
    data: {"x": images [n, h, w, c]; "label": classes from 0, [n]}.

  Returns:
    Float32 [classes, h, w, c]; a class with no image gets the overall mean.
  """
  x, label = _images("class_means", "data", data), np.asarray(data["label"])
  means = [
      x[label == k].mean(axis=0) if (label == k).any() else x.mean(axis=0)
      for k in range(int(label.max()) + 1)
  ]
  return np.stack(means).astype(np.float32)


def image_floors(
    test: Mapping[str, Any],
    train: Mapping[str, Any],
    classifier: Any,
    *,
    n: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
  """Scores of three known image sets: what to read every other score against.

  * "floor: test vs train": real held-out images, so nothing should do better;
  * "floor: class means": the mean image of the class, the best blur;
  * "floor: noise": uniform noise in [-1, 1].

  Args:
    test: held-out {"x": [m, h, w, c], "label": [m]}.
    train: training data of the same form: the reference of every score.
    classifier: from `train_classifier`.
    n: number of images in each; None means as many as `test` has. The real
      floor has at most that many.
    seed: of the noise and of the labels of both kinds of bad images.

  Returns:
    Rows {"model", "steps": None, "metric", "value", "n"}, as `summary.json` has
    them, three sets times the names of `METRICS`.
  """
  fn = "image_floors"
  x, label = _images(fn, "test", test), np.asarray(test["label"])
  n = len(x) if n is None else n
  _checks.in_range(fn, "n", n, 6)
  rng = np.random.default_rng(seed)
  means = class_means(train)
  asked = rng.integers(0, len(means), size=n)
  noise = rng.uniform(-1.0, 1.0, size=(n, *x.shape[1:])).astype(np.float32)
  sets = {
      "floor: test vs train": (x[:n], label[:n]),
      "floor: class means": (means[asked], asked),
      "floor: noise": (noise, asked),
  }
  reference = image_reference(train, classifier)
  rows = []
  for model, (images, labels) in sets.items():
    scores = score_images(images, labels, reference, classifier)
    rows += [
        {
            "model": model,
            "steps": None,
            "metric": metric,
            "value": value,
            "n": len(images),
        }
        for metric, value in scores.items()
    ]
  return rows


__all__ = [
    "METRICS",
    "ImageReference",
    "MetricInfo",
    "class_means",
    "frechet_distance",
    "image_floors",
    "image_reference",
    "kernel_distance",
    "neighbour_scores",
    "score_images",
]
