"""Train state, step, sharding, checkpoints, loop: written once, paper-free."""

from distilljax.train.checkpoint import Checkpoints, RestoreError, SaveError
from distilljax.train.hooks import Every, Hook, Moment, Progress
from distilljax.train.loop import (
    Diverged,
    Interrupted,
    Result,
    Stage,
    params_sha256,
    run,
)
from distilljax.train.method import (
    Batch,
    Context,
    Ema,
    Frozen,
    LossFn,
    Method,
    Role,
    Schedule,
    Trained,
    draw,
    named_key,
    row_keys,
)
from distilljax.train.metrics import (
    JsonLines,
    Mean,
    Totals,
    mean,
    once,
    weighted,
)
from distilljax.train.optimizers import (
    ema_decay,
    make_optimizer,
    make_schedule,
)
from distilljax.train.pmap import PmapStep, make_pmap_step
from distilljax.train.sharding import make_mesh, map_rows, put_rows, row_shard
from distilljax.train.step import State, Step, make_step, map_slices

__all__ = [
    "Batch",
    "Checkpoints",
    "Context",
    "Diverged",
    "Ema",
    "Every",
    "Frozen",
    "Hook",
    "Interrupted",
    "JsonLines",
    "LossFn",
    "Mean",
    "Method",
    "Moment",
    "PmapStep",
    "Progress",
    "RestoreError",
    "Result",
    "Role",
    "SaveError",
    "Schedule",
    "Stage",
    "State",
    "Step",
    "Totals",
    "Trained",
    "draw",
    "ema_decay",
    "make_mesh",
    "make_optimizer",
    "make_pmap_step",
    "make_schedule",
    "make_step",
    "map_rows",
    "map_slices",
    "mean",
    "named_key",
    "once",
    "params_sha256",
    "put_rows",
    "row_keys",
    "row_shard",
    "run",
    "weighted",
]
