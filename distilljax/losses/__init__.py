"""Pure loss functions: arrays and closures in, unreduced values out.

Every function stop-gradients its own frozen arguments, draws no random numbers
and returns at least float32. `masked_mean` is the only reduction over a batch.
"""

from distilljax.losses.reduction import masked_mean, masked_sum_and_count

__all__ = ["masked_mean", "masked_sum_and_count"]
