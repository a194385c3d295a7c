"""Scores with floors: what a trained model is worth, and against what."""

from distilljax.evals.classifier import (
    Classifier,
    cache_folder,
    train_classifier,
)
from distilljax.evals.image import (
    METRICS,
    ImageReference,
    class_means,
    frechet_distance,
    image_floors,
    image_reference,
    kernel_distance,
    neighbour_scores,
    score_images,
)
from distilljax.evals.two_dimensional import (
    Floor,
    energy_distance,
    energy_distance_floor,
    mode_frequencies,
    mode_frequency_tv,
    mode_frequency_tv_floor,
    modes_covered,
    share_within,
    share_within_floor,
    sliced_wasserstein,
    sliced_wasserstein_floor,
    two_sample_floor,
)

__all__ = [
    "METRICS",
    "Classifier",
    "Floor",
    "ImageReference",
    "cache_folder",
    "class_means",
    "energy_distance",
    "energy_distance_floor",
    "frechet_distance",
    "image_floors",
    "image_reference",
    "kernel_distance",
    "mode_frequencies",
    "mode_frequency_tv",
    "mode_frequency_tv_floor",
    "modes_covered",
    "neighbour_scores",
    "score_images",
    "share_within",
    "share_within_floor",
    "sliced_wasserstein",
    "sliced_wasserstein_floor",
    "train_classifier",
    "two_sample_floor",
]
