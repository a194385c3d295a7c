"""What every config shares; a config fills the rest in."""

import ml_collections


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

  config.run = {
      "log_every": 50,  # steps between metric lines
      "checkpoint_every": 500,  # steps between checkpoints
      "keep": 2,  # checkpoints kept a stage
      "max_skips_in_a_row": 20,  # non-finite updates before a run stops
  }
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
    **more: "ema_warmup", "data", "batch_size", "accumulation".
  """
  return {
      "method": method,
      "steps": steps,
      "networks": networks,
      "optimizers": optimizers,
      "hyper": hyper,
      "ema_warmup": True,  # EMA decay min(decay, (1 + step) / (10 + step))
      "data": None,  # "pairs": latents with their exact endpoints (plane)
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
