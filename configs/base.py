"""What every config shares; a config fills the rest in."""

import ml_collections


def run(*, log_every: int, checkpoint_every: int, keep: int) -> dict:
  """The block `run` of every job."""
  return {
    "log_every": log_every,  # steps between metric lines
    "checkpoint_every": checkpoint_every,  # steps between checkpoints
    "keep": keep,  # newest checkpoints kept a stage
    "keep_best": None,  # metric of the watches: the best one is kept too
    "max_skips_in_a_row": 20,  # non-finite updates before a run stops
    "rules": "dp",  # or "fsdp", "fsdp+tensor", "fsdp+context", or by network
    "fsdp": 0,  # parts of a cut network; 0 is the devices that others leave
    "tensor": 1,  # parts of the inside of a block, for "fsdp+tensor"
    "context": 1,  # parts of the tokens of a row, for "fsdp+context"
    "unroll": True,  # micro-batches as a Python loop; False saves memory
    "compute_dtype": "float32",  # or "bfloat16": of losses; masters stay
    "frozen_dtype": "float32",  # or "bfloat16": in which teachers lie
  }


def base(title: str, data: str, batch_size: int) -> ml_collections.ConfigDict:
  """Blocks common to all jobs, with their defaults."""
  config = ml_collections.ConfigDict()
  config.title = title  # heading of the report
  config.seed = 0  # of parameters, batches and noise
  config.stages = ()  # names of the blocks trained, in order

  config.data = {
    "name": data,  # digits, fashion14, fashion28; ring8, unit_ring, grid25
    "batch_size": batch_size,  # rows a step over all devices
    "augment": None,  # {"flip": True, "shift": 1} in pixels, or None
    "folder": None,  # of the fashion28 originals; None looks where they are
    "rows": 0,  # training rows used; 0 is all (plane: 65,536 drawn)
  }
  config.model = {}  # kind and hyper-parameters of the zoo's network

  config.run = run(log_every=50, checkpoint_every=500, keep=2)
  config.evaluation = {
    "n": 2000,  # samples a score
    "batch": 500,  # samples at a time
    "noise_seed": 1234,  # of the latents: the same for every model
    "teacher_steps": (20, 1),  # sampling steps scored
    "student_steps": (1, 2),
    "watches": 4,  # scores and sample strips a stage during training
    "watch_n": 500,  # samples of each of these scores
  }
  return config


def stage(
  method: str,
  steps: int,
  networks: dict,
  optimizers: dict,
  hyper: dict,
  **more,
) -> dict:
  """One stage block.

  Args:
    method: slug of `distilljax.methods`.
    steps: steps of the stage (every one updates what the schedule says).
    networks: by name {"start": "scratch", "exact" or an earlier stage,
      "second_time": takes r, "head_width": of a discriminator head,
      "correction": start is a closed form plus this network,
      "model": entries that replace those of config.model}.
    optimizers: by trained network, arguments of `train.make_optimizer`.
    hyper: entries that replace those of the method's DEFAULTS.
    **more: "ema_warmup", "data", "data_rows", "batch_size", "accumulation".
  """
  return {
    "method": method,
    "steps": steps,
    "networks": networks,
    "optimizers": optimizers,
    "hyper": hyper,
    "ema_warmup": True,  # EMA decay min(decay, (1 + step) / (10 + step))
    "data": None,  # "pairs": latents with their exact endpoints (plane)
    "data_rows": 0,  # rows of the stage's data; 0 is config.data.rows
    "batch_size": None,  # None is config.data.batch_size
    "accumulation": 1,  # micro-batches a step
    **more,
  }


def image_teacher(steps: int, learning_rate: float) -> dict:
  """A class-conditional flow-matching teacher, trained from scratch."""
  return stage(
    "flow_matching",
    steps,
    networks={"student": {"start": "scratch"}},
    optimizers={
      "student": {
        "learning_rate": learning_rate,
        "schedule": "cosine",
        "warmup": min(100, steps // 4),  # steps
        "clip_norm": 1.0,  # global gradient norm
      }
    },
    hyper={
      "ema_decay": 0.995,
      "label_drop": 0.0,  # no guidance in this job, so no null label
    },
  )


def regression(steps: int, rows: int) -> dict:
  """Regression on `rows` exact ODE pairs of a problem in the plane."""
  return stage(
    "ode_regression",
    steps,
    networks={"student": {"start": "scratch"}},
    optimizers={"student": {"learning_rate": 1e-3, "schedule": "cosine"}},
    hyper={"prediction": "x0", "ema_decay": 0.99},
    data="pairs",
    data_rows=rows,
  )


def dmd2_images(steps: int) -> dict:
  """DMD2 without its GAN from the stage "teacher", for small images."""
  return stage(
    "dmd2",
    steps,
    networks={
      "student": {"start": "teacher"},
      "critic": {"start": "teacher", "head_width": 0},
      "teacher": {"start": "teacher"},
    },
    optimizers={
      "student": {
        "learning_rate": 2e-4,
        "b1": 0.0,
        "b2": 0.99,
        "schedule": "cosine",
        "clip_norm": 10.0,
      },
      "critic": {
        "learning_rate": 5e-4,
        "b1": 0.0,
        "b2": 0.99,
        "clip_norm": 10.0,
      },
    },
    hyper={
      "ratio": 2,  # critic updates per student update
      "gan_weight": 0.0,
      "gan_critic_weight": 0.0,
      "ema_decay": 0.995,
    },
  )


def dmd2_gan_images(steps: int, weight: float) -> dict:
  """DMD2 with its GAN on the critic's bottleneck, for small images.

  Args:
    steps: steps of the stage.
    weight: lambda_G; the critic's weight is three times that.
  """
  block = dmd2_images(steps)
  block["networks"]["critic"]["head_width"] = 64
  block["hyper"].update(
    gan_weight=weight,
    gan_critic_weight=3 * weight,
    gan_shares_noise=True,
    gan_t_max=0.98,
  )
  return block


def mean_flow_images(steps: int) -> dict:
  """MeanFlow distilled from the stage "teacher", for small images."""
  return stage(
    "mean_flow",
    steps,
    networks={
      "student": {"start": "teacher", "second_time": True},
      "teacher": {"start": "teacher"},
    },
    optimizers={
      "student": {
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup": min(50, steps // 4),
        "clip_norm": 1.0,
      }
    },
    hyper={
      "source": "teacher",
      "time_mean": 0.0,
      "equal": 0.5,
      "t_one": 0.25,
      "r_zero": 0.25,
      "norm_p": 0.5,
      "norm_eps": 0.01,
      "elements": "mean",
      "ema_decay": 0.995,
    },
  )


def fashion14(
  title: str, *, small: bool, seed: int
) -> ml_collections.ConfigDict:
  """14x14 fashion images, a UNet and its teacher; `small` for CI."""
  config = base(title, data="fashion14", batch_size=64)
  config.seed = seed
  config.model = {"kind": "unet", "channels": 8 if small else 32}
  config.teacher = image_teacher(20 if small else 1200, 2e-3)
  return _small_images(config) if small else config


def digits(title: str, *, small: bool, seed: int) -> ml_collections.ConfigDict:
  """8x8 digits, a small transformer and its teacher; `small` for CI."""
  config = base(title, data="digits", batch_size=64)
  config.seed = seed
  config.model = {
    "kind": "dit",
    "width": 32 if small else 64,
    "depth": 1 if small else 3,
    "patch": 2,
  }
  config.teacher = image_teacher(20 if small else 2000, 2e-3)
  return _small_images(config) if small else config


def _small_images(config):
  config.data.rows = 1024
  config.evaluation.n = 200
  config.evaluation.watches = 0
  return config


def ring8(title: str, *, small: bool, seed: int) -> ml_collections.ConfigDict:
  """Eight modes on a ring; `small` for CI."""
  config = base(title, data="ring8", batch_size=256)
  config.seed = seed
  config.evaluation.n = 512 if small else 4096
  config.evaluation.batch = 4096
  config.evaluation.watches = 0 if small else 4
  config.run.log_every = 250
  config.run.checkpoint_every = 5000
  return config


# --- language models ----------------------------------------------------------


def language(
  title: str,
  data: str,
  *,
  task: dict,
  seed: int,
  seeds: int,
  batch_size: int = 64,
) -> ml_collections.ConfigDict:
  """Blocks common to the jobs of `experiments.train_lm`.

  Args:
    title: heading of the report.
    data: "addition", "chain", "json_list" (a task of `distilljax.data`) or
      "markov" (the exact model).
    task: arguments of the task.
    seed: of parameters, prompts and rollouts.
    seeds: repetitions of the stages with `repeat`.
    batch_size: prompts a step.
  """
  config = ml_collections.ConfigDict()
  config.title = title
  config.seed = seed
  config.seeds = seeds
  config.stages = ()  # names of the blocks trained, in order
  config.data = {
    "name": data,
    "batch_size": batch_size,
    "rows": 20000,  # problems drawn for training, with replacement
  }
  config.task = task
  config.model = {}  # of networks that start from scratch, unless they say more
  config.run = run(log_every=25, checkpoint_every=1000, keep=1)
  config.evaluation = {
    "n": 1000,  # held-out prompts, one completion each
    "noise_seed": 1234,  # of prompts and completions: the same for all models
    "headline": "answer",  # the metric that is named first
    "models": (),  # blocks that are scored
    "labels": {},  # what the report calls them
    "teacher": None,  # block that KLs are to
    "rollouts": (),  # blocks whose completions are shown
    "shown": 8,  # rollouts shown
    "watches": 0,  # scores a stage during training
  }
  return config


def language_stage(
  method: str,
  steps: int,
  networks: dict,
  learning_rate: float,
  hyper: dict,
  *,
  schedule: str = "constant",
  warmup: int = 0,
  clip_norm: float = 1.0,
  **more,
) -> dict:
  """One stage block of a language job.

  Args:
    method: slug of `distilljax.methods`.
    steps: updates.
    networks: by name {"start": "scratch", an earlier stage or a model that the
      problem knows, "model": values of a network of its own}.
    learning_rate: of the student (Adam).
    hyper: entries that replace those of the method's DEFAULTS; the sampler's
      lengths and ids are the task's.
    schedule: of the learning rate.
    warmup: steps of it.
    clip_norm: global gradient norm.
    **more: "repeat", "data" (options of the problem's batches), "batch_size",
      "accumulation".
  """
  return {
    "method": method,
    "steps": steps,
    "networks": networks,
    "optimizers": {
      "student": {
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup": warmup,  # steps
        "clip_norm": clip_norm,  # global gradient norm
      }
    },
    "hyper": hyper,
    "repeat": False,  # trained config.seeds times
    "data": {},  # options of the batches
    "batch_size": None,  # None is config.data.batch_size
    "accumulation": 1,  # micro-batches a step
    **more,
  }


def fine_tuned(steps: int, learning_rate: float, **more) -> dict:
  """A model from scratch by cross entropy on the task's solutions."""
  return language_stage(
    "supervised_kd",
    steps,
    {"student": {"start": "scratch", **more.pop("network", {})}},
    learning_rate,
    {"objective": "cross_entropy"},
    schedule="cosine",
    warmup=min(20, steps // 4),
    **more,
  )


def on_policy(scale: float, networks: dict, steps: int, lr: float, **more):
  """G-OPD at a reward scale, repeated; the reference only where it counts."""
  if scale == 1.0:
    networks = {k: v for k, v in networks.items() if k != "reference"}
  hyper = {"reward_scale": scale, **more.pop("hyper", {})}
  return language_stage(
    "gopd", steps, networks, lr, hyper, repeat=True, **more
  )


def narrow(small: bool) -> dict:
  """A student's network: half as wide as the teachers'; `small` for CI."""
  width = 16 if small else 32
  depth = 1 if small else 2
  return {"kind": "transformer", "width": width, "depth": depth, "heads": 4}


def shallow(small: bool) -> dict:
  """A student of one block, narrower than its teacher; `small` for CI."""
  width = 16 if small else 48
  return {"kind": "transformer", "width": width, "depth": 1, "heads": 4}


def addition_teacher(
  title: str, *, small: bool, seed: int, seeds: int
) -> ml_collections.ConfigDict:
  """Two-digit sums and a teacher fine-tuned on them; `small` for CI."""
  config = language(
    title,
    "addition",
    task={"digits": 2},  # of each number
    seed=seed,
    seeds=1 if small else seeds,  # students
    batch_size=16 if small else 64,
  )
  config.model = {"kind": "transformer", "width": 64, "depth": 2, "heads": 4}
  if small:
    config.data.rows = 512
    config.model.update(width=16, depth=1)
  config.teacher = fine_tuned(4 if small else 700, 3e-3)
  config.evaluation.update(
    n=64 if small else 1000,
    models=("teacher", "student"),
    teacher="teacher",
    rollouts=("teacher", "student"),
    watches=0 if small else 4,
  )
  return config


def chain_teacher(
  title: str, *, small: bool, seed: int, seeds: int
) -> ml_collections.ConfigDict:
  """Chains of four operations, a base and its RL teacher; `small` for CI.

  The blocks are `base`, fine-tuned on solutions, and `teacher`, trained from it
  by GRPO with a reward for a right trace.
  """
  config = language(
    title,
    "chain",
    task={
      "ops": 4,  # operations of a chain
      "operators": "+-*",
    },
    seed=seed,
    seeds=1 if small else seeds,  # students of each kind
    batch_size=16 if small else 64,
  )
  config.model = {"kind": "transformer", "width": 64, "depth": 2, "heads": 4}
  if small:
    config.data.rows = 512
    config.model.update(width=16, depth=1)
  config.base = fine_tuned(4 if small else 450, 3e-3)
  config.teacher = language_stage(
    "cepo",
    2 if small else 200,
    {"student": {"start": "base"}},
    3e-4,
    {
      "credit": "grpo",
      "reward": "trace",  # 1 for a right trace, 0 else
      "num_samples": 8,  # rollouts of a prompt
    },
    batch_size=8 if small else 32,
  )
  config.evaluation.update(n=64 if small else 1000, teacher="teacher")
  return config
