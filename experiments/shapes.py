"""Problems that are nothing but shapes: for plans of what is not there.

`config.data.name = "shapes"` is known to `experiments.plan` alone. Batches are
zeros that take no memory.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def _zeros(shape, dtype):
  """An array of any size that takes no memory."""
  return np.broadcast_to(np.zeros((), dtype), shape)


class ImageShapes:
  """Images or latents of a size.

  Args:
    data: the config's block: shape [h, w, c] of a sample, num_classes.
  """

  def __init__(self, data: Mapping[str, Any]):
    self.sample_shape = tuple(data["shape"])
    self._classes = data["num_classes"]

  def model(self, block: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters that the data fix, for a network of the zoo."""
    del block
    channels = self.sample_shape[-1]
    return {"num_classes": self._classes, "in_channels": channels}

  @property
  def null_label(self) -> int:
    """The class that stands for no class."""
    return self._classes

  def exact(self, **_: Any) -> None:
    """No closed form."""
    return

  def batches(
    self, batch_size: int, seed: int, role: str, rows: int
  ) -> Callable[[], Any]:
    """() -> iterator over one batch of zeros."""
    del seed, role, rows
    batch = {"x": _zeros((batch_size, *self.sample_shape), np.float32)}
    if self._classes:
      batch["label"] = _zeros((batch_size,), np.int32)
    return lambda: iter([batch])


class TextShapes:
  """Prompts and completions of given lengths.

  Args:
    data: the config's block: vocab_size, prompt_length, completion_length.
  """

  known = ()

  def __init__(self, data: Mapping[str, Any]):
    self._data = data

  def model(self, block: Mapping[str, Any]) -> dict[str, Any]:
    """Hyper-parameters that the data fix, for a network of the zoo."""
    del block
    return {"vocab_size": self._data["vocab_size"]}

  def sampler(self) -> dict[str, Any]:
    """Completions of fixed length."""
    length = self._data["completion_length"]
    return {"max_new_tokens": length, "eos_id": None, "pad_id": 0}

  def functions(self, hyper: Mapping[str, Any]) -> dict[str, Any]:
    """No task, so no reward."""
    del hyper
    return {"reward": None, "evidence": None}

  def batches(
    self, batch_size: int, seed: int, options: Mapping[str, Any]
  ) -> Callable[[], Any]:
    """() -> iterator over one batch of zeros."""
    del seed, options
    length = self._data["completion_length"]
    batch = {
      "prompts": _zeros((batch_size, self._data["prompt_length"]), np.int32),
      "tokens": _zeros((batch_size, length), np.int32),
      "where": _zeros((batch_size, length), bool),
    }
    return lambda: iter([batch])
