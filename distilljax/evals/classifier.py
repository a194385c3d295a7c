"""A small image classifier: the feature space that the image scores live in.

It is trained once per data set, on the training images only, and kept on disk:
the file's name is the hash of everything that made it (images, labels, every
hyper-parameter, the JAX version), so that a stale one is never read. Training
is deterministic: one seed gives the initial values and the order of the rows.

The network, for images [h, w, c] (`3x3` is a convolution followed by relu):

  3x3, 32 -> 3x3, 64, stride 2 -> 3x3, 64, stride 2 -> dense 64 -> relu
  = the features -> dense = the logits.

One step is jitted and the loop is in Python: convolutions inside `lax.scan` are
8 to 19 times slower on CPU.
"""

import hashlib
import io
import json
import logging
import math
import os
import pathlib
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from distilljax import _checks
from distilljax.typing import Array, Float, Params

_LOG = logging.getLogger(__name__)

# Part of the cache key: raise it whenever network or training change.
_VERSION = 1
_CHUNK = 500

FEATURES = 64
DEFAULTS = {
    "epochs": 30.0,  # passes over the training images, at most `max_steps`
    "max_steps": 700,
    "batch_size": 128,
    "learning_rate": 2e-3,  # peak of a one-cycle cosine; Adam
    "seed": 0,
}


class Classifier(NamedTuple):
  """A trained classifier and what is known of it.

  Attributes:
    params: plain dict of arrays, see `classifier_apply`.
    accuracy: share of right answers on the held-out images; on the training
      images when none were given.
    train_accuracy: the same on (at most 2000 of) the training images.
    seconds: how long the training took; 0.0 when it came from the cache.
    from_cache: whether it was read from disk.
    path: the cache file, or None where it could not be written.
  """

  params: Params
  accuracy: float
  train_accuracy: float
  seconds: float
  from_cache: bool
  path: pathlib.Path | None

  @property
  def classes(self) -> int:
    """Number of classes."""
    return int(np.shape(self.params["logits"]["bias"])[0])

  def features(self, images: Any) -> np.ndarray:
    """Penultimate features, float32 [n, 64], of images [n, h, w, c]."""
    return self(images)[1]

  def predict(self, images: Any) -> np.ndarray:
    """The likeliest class, int32 [n], of images [n, h, w, c]."""
    return np.argmax(self(images)[0], axis=-1).astype(np.int32)

  def __call__(self, images: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits [n, classes] and features [n, 64] of images [n, h, w, c].

    The work is cut in pieces of one size (the last is padded), so that any
    number of images costs one compilation.
    """
    images = np.asarray(images, np.float32)
    _check_images("Classifier", "images", images)
    logits, features = [], []
    for start in range(0, len(images), _CHUNK):
      piece = images[start : start + _CHUNK]
      rows = len(piece)
      padding = [(0, _CHUNK - rows)] + [(0, 0)] * 3
      out = _jitted_apply(self.params, np.pad(piece, padding))
      logits.append(np.asarray(out[0])[:rows])
      features.append(np.asarray(out[1])[:rows])
    return np.concatenate(logits), np.concatenate(features)


def _convolve(layer: Params, x: Array, *, stride: int) -> Array:
  out = jax.lax.conv_general_dilated(
      x,
      layer["kernel"],
      window_strides=(stride, stride),
      padding="SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  return jax.nn.relu(out + layer["bias"])


def classifier_apply(
    params: Params,
    images: Float[Array, "b h w c"],
) -> tuple[Float[Array, "b k"], Float[Array, "b f"]]:
  """Logits and penultimate features of the small CNN.

  Args:
    params: from `train_classifier(...).params`.
    images: in [-1, 1]. Shape [b, h, w, c].

  Returns:
    (logits [b, classes], features [b, 64]); the features are at least 0.
  """
  # Strides in place of pooling, whose gradient is slow on CPU.
  x = _convolve(params["conv_0"], images, stride=1)
  x = _convolve(params["conv_1"], x, stride=2)
  x = _convolve(params["conv_2"], x, stride=2)
  x = jnp.reshape(x, (x.shape[0], -1))
  dense, last = params["features"], params["logits"]
  features = jax.nn.relu(x @ dense["kernel"] + dense["bias"])
  return features @ last["kernel"] + last["bias"], features


_jitted_apply = jax.jit(classifier_apply)


def _init(seed: int, shape: tuple[int, int, int], classes: int) -> Params:
  """He-normal kernels and zero biases, drawn by NumPy: alike everywhere."""
  rng = np.random.default_rng(seed)
  h, w, c = shape
  flat = -(-h // 4) * -(-w // 4) * 64

  def layer(*dims):
    scale = np.sqrt(2.0 / np.prod(dims[:-1]))
    kernel = scale * rng.standard_normal(dims)
    return {
        "kernel": kernel.astype(np.float32),
        "bias": np.zeros(dims[-1:], np.float32),
    }

  return {
      "conv_0": layer(3, 3, c, 32),
      "conv_1": layer(3, 3, 32, 64),
      "conv_2": layer(3, 3, 64, 64),
      "features": layer(flat, FEATURES),
      "logits": layer(FEATURES, classes),
  }


def _rate(steps: int, peak: float) -> optax.Schedule:
  """From peak / 25 to the peak in a fifth of the steps, then down to none."""
  return optax.cosine_onecycle_schedule(steps, peak, pct_start=0.2)


def _rows(seed: int, n: int, batch_size: int) -> Iterator[np.ndarray]:
  """Row numbers of one batch after another; every pass meets every row once."""
  rng = np.random.default_rng([seed, 1])
  order = np.zeros((0,), np.int64)
  while True:
    while len(order) < batch_size:
      order = np.concatenate([order, rng.permutation(n)])
    yield order[:batch_size]
    order = order[batch_size:]


def _fit(x, label, classes, hyper, progress) -> Params:
  """Trains from scratch; every number that matters comes from `hyper`."""
  batch_size = hyper["batch_size"]
  passes = math.ceil(hyper["epochs"] * len(x) / batch_size)
  steps = min(hyper["max_steps"], passes)
  optimizer = optax.adam(_rate(steps, hyper["learning_rate"]))

  def loss_fn(params, images, labels):
    logits, _ = classifier_apply(params, images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(losses)

  @jax.jit
  def step(params, opt_state, images, labels):
    loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, loss

  params = _init(hyper["seed"], x.shape[1:], classes)
  opt_state = optimizer.init(params)
  batches = _rows(hyper["seed"], len(x), batch_size)
  for i, rows in zip(range(steps), batches):
    params, opt_state, loss = step(params, opt_state, x[rows], label[rows])
    # Reading the loss waits for the device, so not at every step.
    if progress is not None and (i % 20 == 19 or i == steps - 1):
      progress(i + 1, steps, {"loss": float(loss)})
  return jax.tree.map(np.asarray, params)


def _check_images(fn: str, name: str, images: Any) -> None:
  _checks.rank(fn, name, images, 4, "[n, h, w, c]")
  _checks.nonempty(fn, **{name: images})


def _data(fn, name, data):
  for field in ("x", "label"):
    if field not in data:
      _checks.fail(
          fn, name, "a dict with x and label", f"only {', '.join(data)}"
      )
  x = np.ascontiguousarray(data["x"], np.float32)
  label = np.ascontiguousarray(data["label"], np.int32)
  _check_images(fn, f"{name}['x']", x)
  _checks.per_row(fn, f"{name}['x']", x, **{f"{name}['label']": label})
  if not np.isfinite(x).all():
    _checks.fail(
        fn, f"{name}['x']", "finite", f"{(~np.isfinite(x)).sum()} that are not"
    )
  if label.min() < 0:
    _checks.fail(fn, f"{name}['label']", ">= 0", label.min())
  return x, label


def cache_folder(cache: str | os.PathLike | None = None) -> pathlib.Path:
  """The cache: the argument, else $DISTILLJAX_CACHE, else ~/.cache/distilljax.

  Args:
    cache: a folder, or None for the default.

  Returns:
    The folder's path; it need not exist.
  """
  if cache is None:
    cache = os.environ.get("DISTILLJAX_CACHE") or "~/.cache/distilljax"
  return pathlib.Path(cache).expanduser()


def _cache_path(cache, arrays, hyper) -> pathlib.Path:
  digest = hashlib.sha256()
  recipe = {"version": _VERSION, "jax": jax.__version__, **hyper}
  digest.update(json.dumps(recipe, sort_keys=True).encode())
  for array in arrays:
    digest.update(f"{array.dtype}{array.shape}".encode())
    digest.update(array.tobytes())
  name = f"classifier-{digest.hexdigest()[:20]}.npz"
  return cache_folder(cache) / name


def _flatten(params: Params) -> dict[str, np.ndarray]:
  return {f"{a}/{b}": x for a, part in params.items() for b, x in part.items()}


def _write(path: pathlib.Path, params: Params, facts: dict[str, float]) -> None:
  """Writes beside, then renames: nobody ever sees half a file."""
  path.parent.mkdir(parents=True, exist_ok=True)
  buffer = io.BytesIO()
  np.savez(buffer, facts=json.dumps(facts), **_flatten(params))
  handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(buffer.getvalue())
    os.replace(temporary, path)
  except BaseException:
    os.unlink(temporary)
    raise


def _read(path: pathlib.Path, template: Params):
  """(params, facts), or a ValueError that says what is wrong with the file."""
  try:
    content = path.read_bytes()
    if not zipfile.is_zipfile(io.BytesIO(content)):
      raise ValueError("cut off, or not an npz file")
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
      facts = json.loads(str(file["facts"]))
      arrays = {name: file[name] for name in _flatten(template)}
  except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as e:
    raise ValueError(str(e).splitlines()[0] if str(e) else repr(e)) from e
  for name, expected in _flatten(template).items():
    array = arrays[name]
    if array.shape != expected.shape or array.dtype != expected.dtype:
      raise ValueError(f"{name} is {array.dtype}{list(array.shape)}")
    if not np.isfinite(array).all():
      raise ValueError(f"{name} is not finite")
  params = {
      a: {b: arrays[f"{a}/{b}"] for b in layer} for a, layer in template.items()
  }
  return params, facts


def train_classifier(
    train: Mapping[str, Any],
    test: Mapping[str, Any] | None = None,
    *,
    cache: str | os.PathLike | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
    **hyper: Any,
) -> Classifier:
  """The classifier of a data set: from the cache, else trained and cached.

  A cached file that cannot be read (cut off, damaged, not finite) costs one log
  line and a training, and so does a folder that cannot be written. About 25 CPU
  seconds for 10,000 images of 14x14 and 5 for 1,400 of 8x8.

  Args:
    train: {"x": images in [-1, 1], [n, h, w, c]; "label": classes from 0, [n]}.
    test: held-out images of the same form, only for the reported accuracy.
    cache: folder; None means $DISTILLJAX_CACHE, else ~/.cache/distilljax.
    progress: called as progress(step, steps, {"loss": ...}) every 20 steps and
      at the last one; not called when the classifier comes from the cache.
    **hyper: replaces single entries of `DEFAULTS`.

  Returns:
    A `Classifier`.

  Raises:
    ValueError: an unknown hyper-parameter or one out of range; images that are
      not [n, h, w, c], empty or not finite; labels of another length or below
      0; test images of another shape.
  """
  fn = "train_classifier"
  for name in hyper:
    _checks.one_of(fn, "hyper-parameter", name, DEFAULTS)
  hyper = {**DEFAULTS, **hyper}
  for name in ("max_steps", "batch_size"):
    _checks.in_range(fn, name, hyper[name], 1)
  for name in ("epochs", "learning_rate"):
    _checks.in_range(fn, name, hyper[name], 0, open_low=True)
  x, label = _data(fn, "train", train)
  arrays = [x, label]
  classes = int(label.max()) + 1
  if test is not None:
    test_x, test_label = _data(fn, "test", test)
    if test_x.shape[1:] != x.shape[1:]:
      _checks.fail(
          fn, "test['x']", f"[n, h, w, c] with [h, w, c]={list(x.shape[1:])}"
          " like train['x']", list(test_x.shape)
      )
    arrays += [test_x, test_label]
  path = _cache_path(cache, arrays, hyper)
  template = _init(hyper["seed"], x.shape[1:], classes)
  if path.exists():
    try:
      params, facts = _read(path, template)
      return Classifier(
          params,
          float(facts["accuracy"]),
          float(facts["train_accuracy"]),
          0.0,
          True,
          path,
      )
    except (ValueError, KeyError, TypeError) as e:
      _LOG.warning(
          "cached classifier %s is unreadable (%s): training it again", path, e
      )
  start = time.monotonic()
  params = _fit(x, label, classes, hyper, progress)
  made = Classifier(params, 0.0, 0.0, 0.0, False, path)
  few = np.random.default_rng(0).permutation(len(x))[:2000]
  train_accuracy = float(np.mean(made.predict(x[few]) == label[few]))
  accuracy = train_accuracy
  if test is not None:
    accuracy = float(np.mean(made.predict(test_x) == test_label))
  facts = {"accuracy": accuracy, "train_accuracy": train_accuracy}
  try:
    _write(path, params, facts)
  except OSError as e:
    _LOG.warning("the classifier is not cached: cannot write %s (%s)", path, e)
    path = None
  seconds = time.monotonic() - start
  return made._replace(**facts, seconds=seconds, path=path)


__all__ = [
    "DEFAULTS",
    "FEATURES",
    "Classifier",
    "cache_folder",
    "classifier_apply",
    "train_classifier",
]
