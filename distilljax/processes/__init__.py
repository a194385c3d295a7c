"""Noise paths, prediction conversions, times, samplers and guidance."""

from distilljax.processes.path import (
    EDM,
    PREDICTIONS,
    Coefficients,
    NoisePath,
    RectifiedFlow,
    TrigFlow,
    VariancePreserving,
    conversion_weights,
    convert_prediction,
)
from distilljax.processes.samplers import (
    euler,
    flow_map,
    multistep_consistency,
    predict_and_renoise,
)
from distilljax.processes.time import (
    first_rows,
    sample_mean_flow_times,
    shift_time,
    time_grid,
)

__all__ = [
    "EDM",
    "PREDICTIONS",
    "Coefficients",
    "NoisePath",
    "RectifiedFlow",
    "TrigFlow",
    "VariancePreserving",
    "conversion_weights",
    "convert_prediction",
    "euler",
    "first_rows",
    "flow_map",
    "multistep_consistency",
    "predict_and_renoise",
    "sample_mean_flow_times",
    "shift_time",
    "time_grid",
]
