"""Distillation-DPO: two assistants, and the generator loss's recorded value."""

import jax
import jax.numpy as jnp

from distilljax import losses, processes

CALLS = {
    r"aux_(loss|grad_\w+)": "losses.denoising_loss(kind='epsilon'), rank_pair",
    r"gen_loss": (
        "losses.distillation_dpo_loss(winner=noised - clean, ...), as the"
        " released code calls its samples"
    ),
}
NOT_REPRODUCED = {
    r"gen_grad_max_abs": (
        "identically 0 in the released code, whose factor does not depend on"
        " the generator; ours has the intended gradient (departure 7)"
    ),
    r"(aux|gen)_t_gen_unused": "drawn by the official step and never used",
}


def epsilon(net, x, t):
  """The stand-in noise estimate; t is the integer time of each row."""
  level = net["b"] + net["u"] * t.astype(x.dtype)[:, None] / 1000
  return jnp.tanh(x @ net["W"].T + level[:, None, :])


def reproduce(golden):
  roles = ("generator", "teacher", "auxDiffBetter", "auxDiffWorse")
  nets = {role: golden.inputs(f"{role}_") for role in roles}
  part, full = golden["pcd_part"], golden["pcd_full"]
  path = processes.VariancePreserving.from_table(golden["alphas_cumprod"])
  start = jnp.tile(part, (1, full.shape[1] // part.shape[1], 1))
  names = (
      "aux_init_noise aux_t_better aux_noise_better aux_t_worse aux_noise_worse"
      " gen_init_noise gen_t gen_noise"
  )
  draws = {name: golden[name] for name in names.split()}

  def pair(noise):
    """Winner and loser of the stand-in sampler, ranked by the metric."""
    last = jnp.full(len(part), 999)
    both = [
        start
        + epsilon(nets["generator"], start + scale * noise, last)
        for scale in (1.0, 1.1)
    ]
    costs = [jnp.mean((x - full) ** 2, axis=(1, 2)) for x in both]
    return losses.rank_pair(*both, *costs)

  def noised(x, noise, t):
    # The official noising leaves the clean signal unscaled.
    sigma = path.sigma(path.t_from_index(t)).astype(x.dtype)
    return x + sigma[:, None, None] * noise

  def assistants(aux, d):
    total = 0.0
    samples = pair(d["aux_init_noise"])
    for x, role, net in zip(samples, ("better", "worse"), aux):
      noise, t = d[f"aux_noise_{role}"], d[f"aux_t_{role}"]
      prediction = epsilon(net, noised(x, noise, t), t)
      total += losses.masked_mean(
          losses.denoising_loss(prediction, x, noise, kind="epsilon")
      )
    return total

  def generator(d):
    estimates, factors = [], []
    for x, role in zip(pair(d["gen_init_noise"]), roles[2:]):
      x_t = noised(x, d["gen_noise"], d["gen_t"])
      factors.append(x_t - x)
      estimates += [
          epsilon(nets["teacher"], x_t, d["gen_t"]),
          epsilon(nets[role], x_t, d["gen_t"]),
      ]
    return losses.masked_mean(
        losses.distillation_dpo_loss(*factors, *estimates)
    )

  @jax.jit
  def run(d):
    aux = tuple(nets[role] for role in roles[2:])
    return jax.value_and_grad(assistants)(aux, d), generator(d)

  (loss, grads), gen_loss = run(draws)
  out = {"aux_loss": loss, "gen_loss": gen_loss}
  for role, tree in zip(roles[2:], grads):
    out |= {f"aux_grad_{role}_{name}": g for name, g in tree.items()}
  return out
