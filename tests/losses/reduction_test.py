"""The only reduction over a batch, against NumPy over the selected entries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distilljax import losses
from tests import helpers

pytestmark = pytest.mark.usefixtures("strict")

VALUES = np.array([[1.0, -2.0, 4.0], [8.0, 0.5, -16.0]], np.float32)
WHERE = np.array([[True, False, True], [False, True, True]])


def test_all_entries():
  total, count = losses.masked_sum_and_count(jnp.asarray(VALUES))
  assert (float(total), float(count)) == (VALUES.sum(), 6)
  assert total.shape == count.shape == ()
  mean = losses.masked_mean(jnp.asarray(VALUES))
  np.testing.assert_allclose(mean, VALUES.mean(), rtol=1e-6)


def test_selected_entries():
  args = jnp.asarray(VALUES), jnp.asarray(WHERE)
  total, count = losses.masked_sum_and_count(*args)
  assert (float(total), float(count)) == (VALUES[WHERE].sum(), 4)
  np.testing.assert_allclose(
      losses.masked_mean(*args), VALUES[WHERE].mean(), rtol=1e-6
  )
  one = jnp.zeros(3, bool).at[1].set(True)
  assert float(losses.masked_mean(jnp.asarray(VALUES[0]), one)) == -2


def test_gradient_is_one_over_the_count_and_zero_behind_the_mask():
  values = jnp.where(WHERE, VALUES, jnp.nan)
  value, grad = jax.value_and_grad(losses.masked_mean)(
      values, jnp.asarray(WHERE)
  )
  np.testing.assert_allclose(value, VALUES[WHERE].mean(), rtol=1e-6)
  np.testing.assert_array_equal(grad, np.where(WHERE, 0.25, 0))


def test_nothing_selected():
  values = jnp.full(3, jnp.nan)
  value, grad = jax.value_and_grad(losses.masked_mean)(
      values, jnp.zeros(3, bool)
  )
  assert float(value) == 0
  assert grad.tolist() == [0.0] * 3


def test_over_an_axis_it_is_the_global_mean():
  # Three and one of the entries count: the mean of means would differ.
  where = np.array([[True, True, True], [False, True, False]])
  mean = jax.vmap(
      lambda v, w: losses.masked_mean(v, w, axis_name="rows"), axis_name="rows"
  )(jnp.asarray(VALUES), jnp.asarray(where))
  np.testing.assert_allclose(mean, [VALUES[where].mean()] * 2, rtol=1e-6)
  mean = jax.vmap(
      lambda v: losses.masked_mean(v, axis_name="rows"), axis_name="rows"
  )(jnp.asarray(VALUES))
  np.testing.assert_allclose(mean, [VALUES.mean()] * 2, rtol=1e-6)


def test_count_has_no_gradient():
  # A count made of values (rows picked softly) must not pull on them.
  def count(v):
    return losses.masked_sum_and_count(v, v > 0)[1]

  assert not np.any(jax.grad(count)(jnp.asarray(VALUES)))


@pytest.mark.parametrize("half", [jnp.bfloat16, jnp.float16])
def test_half_in_float32_out(half):
  # 4097 ones: neither type counts that far.
  total, count = losses.masked_sum_and_count(jnp.ones(4097, half))
  assert total.dtype == count.dtype == jnp.float32
  assert (float(total), float(count)) == (4097, 4097)
  ones = jnp.ones(4097, bool)
  total, count = losses.masked_sum_and_count(jnp.ones(4097, half), ones)
  assert total.dtype == count.dtype == jnp.float32
  assert (float(total), float(count)) == (4097, 4097)


def test_float64_stays(x64):
  values = jnp.asarray(VALUES, jnp.float64)
  assert losses.masked_mean(values, jnp.asarray(WHERE)).dtype == jnp.float64


def test_bad_input():
  values = jnp.asarray(VALUES)
  with helpers.one_line_error(
      r"masked_sum_and_count: where must be \[2, 3\] like values, got \[3\]"
  ):
    losses.masked_mean(values, jnp.ones(3, bool))
  with helpers.one_line_error("where must be a bool array, got float32"):
    losses.masked_mean(values, jnp.ones((2, 3)))
