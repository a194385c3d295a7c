"""An ExOPD step at scale, to be planned and not run: 8B from 32B at 8k tokens.

python -m experiments.plan --config=configs/plans/gopd_qwen.py \
    --topology=v5p:8x8x8

Student and reference have the sizes of Qwen3-8B, the teacher those of
Qwen3-32B, heads not tied; prompts of 1,024 and completions of 7,168 tokens.
What is planned is the update on given rollouts, not the sampling.

Arguments: rows=<int> (a step over all chips), toy (small enough for a test).
"""

from configs import base
from distilljax.train import config as config_lib

STUDENT = {
  "width": 4096,
  "depth": 36,
  "heads": 32,
  "kv_heads": 8,
  "head_dim": 128,
  "mlp_width": 12288,
}
TEACHER = {**STUDENT, "width": 5120, "depth": 64, "heads": 64}
TEACHER["mlp_width"] = 25600
TOY = {**STUDENT, "width": 128, "depth": 2, "heads": 2, "kv_heads": 1}
TOY["mlp_width"] = 256


def get_config(arg=None):
  arg = config_lib.parse_arg(arg, rows=512, toy=False)
  config = base.language(
    "ExOPD: an 8B student of a 32B teacher",
    "shapes",
    task={},  # none: rows are shapes
    seed=0,
    seeds=1,
    batch_size=arg.rows,
  )
  config.data.vocab_size = 1024 if arg.toy else 151_936
  config.data.prompt_length = 32 if arg.toy else 1024  # tokens
  config.data.completion_length = 96 if arg.toy else 7168  # tokens
  config.model = {
    "kind": "transformer",
    **(TOY if arg.toy else STUDENT),
    "rope_base": 1e6,
    "tied": False,
    "scan_layers": True,  # one loop over the blocks
    "remat": "block",  # only the inputs of a block are kept
  }
  teacher = TOY if arg.toy else TEACHER
  config.stages = ("student",)
  config.student = base.language_stage(
    "gopd",
    1000,
    {
      "student": {"start": "scratch"},
      "teacher": {"start": "scratch", "model": teacher},
      "reference": {"start": "scratch"},
    },
    1e-6,
    {"reward_scale": 1.25},
  )
  config.run.update(
    rules="fsdp",
    unroll=False,
    compute_dtype="bfloat16",
    frozen_dtype="bfloat16",
  )
  return config
