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

__all__ = [
    "METRICS",
    "Classifier",
    "ImageReference",
    "cache_folder",
    "class_means",
    "frechet_distance",
    "image_floors",
    "image_reference",
    "kernel_distance",
    "neighbour_scores",
    "score_images",
    "train_classifier",
]
