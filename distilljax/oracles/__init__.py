"""Problems with known answers, to hold a loss or a method against."""

from distilljax.oracles.gaussian_mixture import (
    GaussianMixture,
    gaussian,
    gaussian_flow_map,
    grid25,
    make_gaussian_mixture,
    ring,
    ring8,
    two_class,
    two_points,
    unit_ring,
)

__all__ = [
    "GaussianMixture",
    "gaussian",
    "gaussian_flow_map",
    "grid25",
    "make_gaussian_mixture",
    "ring",
    "ring8",
    "two_class",
    "two_points",
    "unit_ring",
]
