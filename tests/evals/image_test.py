"""Image scores against closed forms, SciPy and brute force."""

from typing import NamedTuple

import numpy as np
import pytest
import scipy.linalg

from distilljax import evals
from distilljax.evals import image
from tests import helpers


def _exactly(rng, n, mean, cov):
  """n rows whose sample mean and unbiased covariance are exactly these."""
  d = len(mean)
  x = rng.standard_normal((n, d))
  x -= x.mean(axis=0)
  root = np.linalg.cholesky(np.cov(x, rowvar=False).reshape(d, d))
  x = np.linalg.solve(root, x.T).T
  return x @ np.linalg.cholesky(np.asarray(cov)).T + mean


class TestFrechetDistance:
  def test_two_gaussians_on_a_line(self):
    # (m1 - m2)^2 + (s1 - s2)^2.
    rng = np.random.default_rng(0)
    a = _exactly(rng, 50, [1.0], [[4.0]])
    b = _exactly(rng, 80, [-2.0], [[0.25]])
    expected = 3.0**2 + (2.0 - 0.5) ** 2
    np.testing.assert_allclose(evals.frechet_distance(a, b), expected)
    np.testing.assert_allclose(evals.frechet_distance(b, a), expected)

  def test_commuting_covariances_have_a_closed_form(self):
    # Diagonal covariances: the sum over axes of the form on a line.
    rng = np.random.default_rng(1)
    s1, s2 = np.array([1.0, 2.0, 0.5]), np.array([3.0, 0.1, 0.5])
    m1, m2 = np.array([0.0, 1.0, -1.0]), np.array([2.0, 1.0, 0.0])
    a = _exactly(rng, 40, m1, np.diag(s1**2))
    b = _exactly(rng, 60, m2, np.diag(s2**2))
    expected = np.sum((m1 - m2) ** 2) + np.sum((s1 - s2) ** 2)
    np.testing.assert_allclose(evals.frechet_distance(a, b), expected)

  @pytest.mark.parametrize("d", [2, 7, 24])
  def test_scipys_matrix_root(self, d):
    rng = np.random.default_rng(d)
    a = rng.standard_normal((90, d)) @ rng.standard_normal((d, d))
    b = rng.standard_normal((70, d)) @ rng.standard_normal((d, d)) + 1.0
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    gap = a.mean(axis=0) - b.mean(axis=0)
    root = scipy.linalg.sqrtm(ca @ cb).real
    expected = gap @ gap + np.trace(ca + cb - 2.0 * root)
    np.testing.assert_allclose(
        evals.frechet_distance(a, b), expected, rtol=1e-8
    )

  def test_equal_sets_and_singular_covariances(self):
    # 5 rows in 12 dimensions and dead columns: rank 4 at most.
    rng = np.random.default_rng(2)
    x = rng.standard_normal((5, 12)) * (np.arange(12) % 3 > 0)
    assert abs(evals.frechet_distance(x, x)) < 1e-6
    # A shift adds its square and nothing else.
    shift = np.arange(12.0)
    np.testing.assert_allclose(
        evals.frechet_distance(x, x + shift), shift @ shift, rtol=1e-6
    )

  def test_float32_features_are_reduced_in_float64(self):
    rng = np.random.default_rng(3)
    x = (1e4 + rng.standard_normal((64, 4))).astype(np.float32)
    y = (1e4 + rng.standard_normal((64, 4))).astype(np.float32)
    np.testing.assert_allclose(
        evals.frechet_distance(x, y),
        evals.frechet_distance(x.astype(np.float64) - 1e4, y - 1e4),
        rtol=1e-3,
    )

  def test_bad_input(self):
    x = np.zeros((4, 3))
    with helpers.one_line_error(r"features_a must be \[n, d\]"):
      evals.frechet_distance(x[0], x)
    with helpers.one_line_error(r"features_b must be \[n, d\] with d=3"):
      evals.frechet_distance(x, x[:, :2])
    with helpers.one_line_error("features_b must be at least 2 rows, got 1"):
      evals.frechet_distance(x, x[:1])
    bad = x.copy()
    bad[2, 1] = np.nan
    with helpers.one_line_error("features_a must be finite, got 1 of 4 rows"):
      evals.frechet_distance(bad, x)


def _brute_mmd(a, b, k):
  n, m = len(a), len(b)
  aa = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j)
  bb = sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j)
  ab = sum(k(x, y) for x in a for y in b)
  return aa / (n * (n - 1)) + bb / (m * (m - 1)) - 2.0 * ab / (n * m)


class TestKernelDistance:
  @pytest.fixture(autouse=True)
  def _pieces(self, monkeypatch):
    monkeypatch.setattr(image, "_CHUNK", 4)

  def test_rbf_by_brute_force(self):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((9, 3)), rng.standard_normal((11, 3)) + 0.5
    k = lambda x, y: np.exp(-np.sum((x - y) ** 2) / (2.0 * 1.7**2))
    np.testing.assert_allclose(
        evals.kernel_distance(a, b, bandwidth=1.7), _brute_mmd(a, b, k)
    )

  def test_polynomial_by_brute_force(self):
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((9, 3)), rng.standard_normal((11, 3)) + 0.5
    k = lambda x, y: (x @ y / 3 + 1.0) ** 3
    np.testing.assert_allclose(
        evals.kernel_distance(a, b, kernel="polynomial"), _brute_mmd(a, b, k)
    )

  def test_width_is_the_median_distance_in_the_reference(self):
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((9, 3)) * 5.0, rng.standard_normal((11, 3))
    distances = [
        np.linalg.norm(b[i] - b[j]) for i in range(11) for j in range(i)
    ]
    # 55 distances: the median is one of them, squared or not.
    width = float(np.median(distances))
    np.testing.assert_allclose(
        evals.kernel_distance(a, b),
        evals.kernel_distance(a, b, bandwidth=width),
    )

  def test_no_bias_and_the_sign(self):
    # The mean over draws of two samples of one law is 0 within its error.
    rng = np.random.default_rng(3)
    draws = [
        evals.kernel_distance(
            rng.standard_normal((8, 2)),
            rng.standard_normal((8, 2)),
            bandwidth=1.0,
        )
        for _ in range(300)
    ]
    assert abs(np.mean(draws)) < 3.0 * np.std(draws) / np.sqrt(300)
    assert min(draws) < 0.0
    # Far apart and each set a point: k = 1 within, 0 across.
    a = np.zeros((5, 2))
    np.testing.assert_allclose(evals.kernel_distance(a, a + 100.0), 2.0)

  def test_bad_input(self):
    x = np.zeros((4, 3))
    with helpers.one_line_error("kernel must be one of .* did you mean 'rbf'"):
      evals.kernel_distance(x, x, kernel="rbff")
    with helpers.one_line_error("bandwidth must be in"):
      evals.kernel_distance(x, x, bandwidth=0.0)
    with helpers.one_line_error("features_a must be at least 2 rows"):
      evals.kernel_distance(x[:1], x)


def _brute_neighbours(s, y, k, c):
  def radius(x, i, k):
    others = [np.linalg.norm(x[i] - x[j]) for j in range(len(x)) if j != i]
    return sorted(others)[k - 1]

  gap = lambda i, j: np.linalg.norm(s[i] - y[j])
  n, m = range(len(s)), range(len(y))
  precise = [any(gap(i, j) <= radius(y, j, k) for j in m) for i in n]
  recalled = [any(gap(i, j) <= radius(s, i, k) for i in n) for j in m]
  inside = [[gap(i, j) <= radius(y, j, c) for i in n] for j in m]
  return {
      "precision": np.mean(precise),
      "recall": np.mean(recalled),
      "density": np.sum(inside) / (c * len(s)),
      "coverage": np.mean([any(row) for row in inside]),
  }


class TestNeighbourScores:
  @pytest.mark.parametrize("k, c", [(1, 4), (3, 5), (4, 1)])
  def test_brute_force(self, monkeypatch, k, c):
    monkeypatch.setattr(image, "_CHUNK", 6)
    rng = np.random.default_rng(k)
    s = rng.standard_normal((15, 2)) * 0.8 + 0.9
    y = rng.standard_normal((20, 2))
    got = evals.neighbour_scores(s, y, neighbours=k, coverage_neighbours=c)
    expected = _brute_neighbours(s, y, k, c)
    assert list(got) == list(expected)
    for name, value in expected.items():
      np.testing.assert_allclose(got[name], value, err_msg=name)
      # The case says something: no score is at an end of its range.
      assert 0.0 < value < 1.0 or name == "density"

  def test_defaults_are_those_of_the_papers(self):
    rng = np.random.default_rng(7)
    s, y = rng.standard_normal((40, 2)) + 1.0, rng.standard_normal((40, 2))
    got = evals.neighbour_scores(s, y)
    assert got == pytest.approx(_brute_neighbours(s, y, 3, 5))
    # The data tell the defaults from their neighbours.
    for k, c in ((2, 5), (4, 5), (3, 4), (3, 6)):
      assert got != pytest.approx(_brute_neighbours(s, y, k, c))

  def test_one_mode_of_two_is_precise_and_not_recalled(self):
    rng = np.random.default_rng(8)
    y = np.concatenate([rng.normal(0, 1, (30, 2)), rng.normal(50, 1, (30, 2))])
    s = y[:30] + 1e-3
    scores = evals.neighbour_scores(s, y)
    assert scores["precision"] == 1.0
    assert scores["recall"] == 0.5
    assert scores["coverage"] == 0.5

  def test_bad_input(self):
    x = np.zeros((4, 3))
    with helpers.one_line_error(r"neighbours must be in \[1, 3\], got 4"):
      evals.neighbour_scores(x, x, neighbours=4)
    with helpers.one_line_error("coverage_neighbours must be in"):
      evals.neighbour_scores(x, x, neighbours=1, coverage_neighbours=0)
    with helpers.one_line_error("reference must be finite"):
      evals.neighbour_scores(x, x + np.inf)


class _Linear(NamedTuple):
  """A classifier whose features are the pixels; class 1 is a bright image."""

  def features(self, images):
    return self(images)[1]

  def __call__(self, images):
    flat = np.reshape(images, (len(images), -1))
    mean = flat.mean(axis=1)
    return np.stack([-mean, mean], axis=1), flat


def _images(seed, n, shift=0.0):
  rng = np.random.default_rng(seed)
  return (rng.uniform(-1, 1, (n, 2, 2, 1)) + shift).astype(np.float32)


class TestScoreImages:
  def test_names_and_their_parts(self):
    images, reference = _images(0, 30, 0.2), _images(1, 30)
    clipped = np.clip(images, -1, 1)
    labels = np.arange(30) % 2
    scores = evals.score_images(images, labels, reference, _Linear())
    assert list(scores) == list(evals.METRICS)
    a, b = clipped.reshape(30, 4), reference.reshape(30, 4)
    # 30 of each, so every row is used and the order does not matter.
    near = evals.neighbour_scores(a, b)
    right = (clipped.mean(axis=(1, 2, 3)) > 0) == (labels == 1)
    expected = {
        "fcd": evals.frechet_distance(a, b),
        "mmd": evals.kernel_distance(a, b),
        "precision": near["precision"],
        "recall": near["recall"],
        "coverage": near["coverage"],
        "accuracy": right.mean(),
    }
    assert scores == pytest.approx(expected)

  def test_forms_of_the_reference_agree(self):
    images, reference = _images(0, 20), _images(1, 50)
    kept = evals.image_reference(reference, _Linear())
    assert kept.features.shape == (50, 4)
    first = evals.score_images(images, None, reference, _Linear())
    assert "accuracy" not in first
    assert first == evals.score_images(images, None, kept, _Linear())
    assert first == evals.score_images(
        images, None, {"x": reference}, _Linear()
    )
    assert first["fcd"] == pytest.approx(
        evals.frechet_distance(images.reshape(20, 4), reference.reshape(50, 4))
    )

  def test_reference_is_clipped_too(self):
    reference = _images(1, 50, 0.3)
    kept = evals.image_reference({"x": reference}, _Linear())
    np.testing.assert_array_equal(
        kept.features, np.clip(reference, -1, 1).reshape(50, 4)
    )
    assert kept.shape == (2, 2, 1)

  def test_neighbours_and_kernel_see_equal_numbers(self, monkeypatch):
    seen = {}

    def spy(name, original):
      def wrapped(a, b):
        seen[name] = len(a), len(b)
        return original(a, b)
      return wrapped

    for name in ("frechet_distance", "kernel_distance", "neighbour_scores"):
      monkeypatch.setattr(image, name, spy(name, getattr(image, name)))
    evals.score_images(_images(0, 20), None, _images(1, 50), _Linear())
    assert seen == {
        "frechet_distance": (20, 50),
        "kernel_distance": (20, 20),
        "neighbour_scores": (20, 20),
    }
    evals.score_images(_images(0, 50), None, _images(1, 20), _Linear())
    assert seen["neighbour_scores"] == (20, 20)

  def test_not_finite_is_nan_throughout(self):
    images = _images(0, 20)
    images[3, 0, 0, 0] = np.nan
    labels = np.zeros(20, int)
    scores = evals.score_images(images, labels, _images(1, 20), _Linear())
    assert list(scores) == list(evals.METRICS)
    assert all(np.isnan(v) for v in scores.values())
    scores = evals.score_images(images, None, _images(1, 20), _Linear())
    assert "accuracy" not in scores

  def test_bad_input(self):
    x = _images(0, 8)
    with helpers.one_line_error(r"images must be \[n, h, w, c\] \(rank 4\)"):
      evals.score_images(x[..., 0], None, x, _Linear())
    with helpers.one_line_error(r"\[h, w, c\]=\[2, 2, 1\] like reference"):
      evals.score_images(x[:, :1], None, x, _Linear())
    with helpers.one_line_error(r"labels must be \[b\]=\[8\] like images"):
      evals.score_images(x, np.zeros(7, int), x, _Linear())
    with helpers.one_line_error("reference must be images or a dict with x"):
      evals.score_images(x, None, {"y": x}, _Linear())


class TestImageFloors:
  def test_rows(self, monkeypatch):
    given = {}

    def scored(images, labels, reference, classifier):
      given[len(given)] = images, labels, reference
      return {"fcd": float(len(given)), "accuracy": 0.5}

    monkeypatch.setattr(image, "score_images", scored)
    train = {"x": _images(0, 40), "label": np.arange(40) % 4}
    test = {"x": _images(1, 12), "label": np.arange(12) % 4}
    rows = evals.image_floors(test, train, _Linear(), n=30, seed=3)
    models = ["floor: test vs train", "floor: class means", "floor: noise"]
    assert [r["model"] for r in rows] == [m for m in models for _ in range(2)]
    assert [r["n"] for r in rows] == [12, 12, 30, 30, 30, 30]
    assert [r["metric"] for r in rows] == ["fcd", "accuracy"] * 3
    assert [r["value"] for r in rows] == [1.0, 0.5, 2.0, 0.5, 3.0, 0.5]
    assert all(r["steps"] is None for r in rows)
    np.testing.assert_array_equal(given[0][0], test["x"])
    np.testing.assert_array_equal(given[0][1], test["label"])
    means = np.stack(
        [train["x"][train["label"] == k].mean(axis=0) for k in range(4)]
    )
    images, asked, reference = given[1]
    np.testing.assert_allclose(images, means[asked], rtol=1e-6)
    assert set(asked) == {0, 1, 2, 3}
    np.testing.assert_array_equal(
        reference.features, train["x"].reshape(40, 4)
    )
    noise = given[2][0]
    assert noise.shape == (30, 2, 2, 1) and noise.dtype == np.float32
    assert -1.0 <= noise.min() < -0.8 and 0.8 < noise.max() <= 1.0
    # The same seed, the same floors; n follows the test images.
    again = evals.image_floors(test, train, _Linear())
    assert [r["n"] for r in again] == [12] * 6

  def test_class_without_images_gets_the_overall_mean(self):
    x = _images(0, 6)
    means = evals.class_means({"x": x, "label": np.array([0, 0, 2, 2, 2, 0])})
    np.testing.assert_allclose(means[1], x.mean(axis=0), rtol=1e-6)
    np.testing.assert_allclose(means[2], x[2:5].mean(axis=0), rtol=1e-6)


def test_every_metric_says_what_it_is():
  assert list(evals.METRICS) == [
      "fcd", "mmd", "precision", "recall", "coverage", "accuracy",
  ]
  better = [m for m, i in evals.METRICS.items() if i.higher_is_better]
  shares = [m for m, i in evals.METRICS.items() if i.share]
  assert better == shares == ["precision", "recall", "coverage", "accuracy"]
