"""Pure loss functions: arrays and closures in, unreduced values out.

Every function stop-gradients its own frozen arguments, draws no random numbers
and returns at least float32. `masked_mean` is the only reduction over a batch.
"""

from distilljax.losses.adversarial import (
    approximate_r1,
    gan_discriminator_loss,
    gan_generator_loss,
    r1_penalty,
)
from distilljax.losses.consistency import squared_distance
from distilljax.losses.distribution_matching import (
    denoising_loss,
    denoising_weight,
    dmd_direction,
    surrogate_loss,
)
from distilljax.losses.flow_map import (
    LossAndError,
    adaptive_loss,
    eulerian_target,
    flow_map_step,
    lagrangian_residual,
    mean_flow_loss,
    mean_flow_terms,
    mean_flow_velocity,
    path_derivative,
    semigroup_target,
)
from distilljax.losses.reduction import masked_mean, masked_sum_and_count

__all__ = [
    "LossAndError",
    "adaptive_loss",
    "approximate_r1",
    "denoising_loss",
    "denoising_weight",
    "dmd_direction",
    "eulerian_target",
    "flow_map_step",
    "gan_discriminator_loss",
    "gan_generator_loss",
    "lagrangian_residual",
    "masked_mean",
    "masked_sum_and_count",
    "mean_flow_loss",
    "mean_flow_terms",
    "mean_flow_velocity",
    "path_derivative",
    "r1_penalty",
    "semigroup_target",
    "squared_distance",
    "surrogate_loss",
]
