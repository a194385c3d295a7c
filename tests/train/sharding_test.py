"""Host functions of global rows."""

import jax
import numpy as np
import pytest

from distilljax import train


@pytest.mark.parametrize("devices", [1, 4])
def test_map_rows_scores_on_the_host(devices):
  mesh = train.make_mesh(jax.devices()[:devices])
  rows = train.put_rows(
    {"a": np.arange(8.0).reshape(8, 1), "b": np.arange(8)}, mesh
  )
  seen = []

  def score(a, b):
    seen.extend([type(a), type(b)])
    return (a[:, 0] + 10 * b).astype(np.float32)

  out = train.map_rows(score, rows["a"], rows["b"])
  assert seen == [np.ndarray, np.ndarray]
  np.testing.assert_array_equal(out, 11.0 * np.arange(8))
  # Placed as the rows are, so that the step takes it as it is.
  assert out.sharding == rows["b"].sharding
  assert len(out.sharding.device_set) == devices
