"""FastGen's noise schedules: four paths, their conversions and time lists.

Their EDM has sigma for time and their trigonometric path the angle, so those
two are read through `at_sigma` and `at_angle`; their straight path and table
have our time. "eps" is our epsilon and "flow" our velocity.
"""

import jax
import jax.numpy as jnp

from distilljax import processes

NAMES = {"x0": "x0", "eps": "epsilon", "flow": "velocity", "v": "v"}

CALLS = {
    r"\w+_(alpha|sigma|max_sigma)": "path.alpha, path.sigma",
    r"\w+_(alpha|sigma)_prime": "path.coefficients, EDM.at_sigma,"
    " TrigFlow.at_angle",
    r"\w+_sqrt_snr": "path.log_snr",
    r"\w+_sqrt_snr_to_t": "path.t_from_log_snr",
    r"\w+_(xt|latents)": "path.add_noise",
    r"\w+_cond_velocity": "convert_prediction",
    r"\w+_(x0|eps|flow|v)_to_(x0|eps|flow|v)": "convert_prediction",
    r"\w+_t_list_\d+": "time_grid, karras_sigmas",
}
NOT_REPRODUCED = {
    r"\w+_rescale_t": "what that code's networks want for a time input (t or"
    " 1000 t): the closure's affair, no path's",
    r"\w+_min_t": "a number of that code's clamp (0, or sigma_min, which we"
    " read)",
}
TOLERANCE = {}


def _paths(golden):
  """{prefix: (path, our time of theirs, coefficients at theirs)}."""
  for name in golden.cases(r"([a-z]+)_t"):
    if name == "edm":
      path = processes.EDM(
          sigma_min=golden.number("edm_min_t"),
          sigma_max=golden.number("edm_max_t"),
      )
      yield name, path, path.t_from_sigma, path.at_sigma
    elif name == "trig":
      path = processes.TrigFlow()
      yield name, path, path.t_from_angle, path.at_angle
    elif name == "sd":
      path = processes.VariancePreserving.from_table(
          golden["sd_alphas_cumprod"]
      )
      n = golden["sd_alphas_cumprod"].shape[0]

      # They look the table up at the entry below; ours is continuous.
      def our_time(t, path=path, n=n):
        index = jnp.floor(jnp.round(t * n, 6)).astype(jnp.int32)
        return path.t_from_index(index)

      yield (
          name, path, our_time,
          lambda t, path=path, f=our_time: path.coefficients(f(t)),
      )
    else:
      path = processes.RectifiedFlow()
      yield name, path, lambda t: t, path.coefficients


def reproduce(golden):
  x0, eps, net_out = golden["x0"], golden["eps"], golden["net_out"]
  out = {}
  for name, path, our_time, at in _paths(golden):
    theirs = golden[f"{name}_t"]
    end = golden[f"{name}_max_t"]
    pairs = [
        (f"{name}_{m.group(1)}_to_{m.group(2)}", m.group(1), m.group(2))
        for m in golden.match(f"{name}_(x0|eps|flow|v)_to_(x0|eps|flow|v)")
    ]

    @jax.jit
    def case(x0, eps, net_out, theirs, end, *, path=path, our_time=our_time,
             at=at, pairs=pairs):
      t = our_time(theirs)
      coefficients = at(theirs)
      x_t = path.add_noise(x0, eps, t)
      values = {
          "alpha": path.alpha(t),
          "sigma": path.sigma(t),
          "alpha_prime": coefficients.alpha_prime,
          "sigma_prime": coefficients.sigma_prime,
          "sqrt_snr": jnp.exp(path.log_snr(t) / 2),
          "max_sigma": path.sigma(our_time(end)),
          "xt": x_t,
          "latents": path.add_noise(
              jnp.zeros_like(eps), eps, our_time(end)
          ),
          "cond_velocity": processes.convert_prediction(
              eps, x_t, coefficients, source="epsilon", target="velocity"
          ),
      }
      back = path.t_from_log_snr(path.log_snr(t))
      values["sqrt_snr_to_t"] = (
          path.sigma(back) if isinstance(path, processes.EDM)
          else path.angle(back) if isinstance(path, processes.TrigFlow)
          else back
      )
      converted = {
          key: processes.convert_prediction(
              net_out, x_t, coefficients, source=NAMES[a], target=NAMES[b]
          )
          for key, a, b in pairs
      }
      return values, converted

    values, converted = case(x0, eps, net_out, theirs, end)
    out |= converted
    for m in golden.match(f"{name}_t_list_" + r"(\d+)"):
      out[m.group(0)] = _t_list(path, int(m.group(1)), end)
    out |= {
        f"{name}_{k}": v for k, v in values.items() if f"{name}_{k}" in golden
    }
  return out


def _t_list(path, n, end):
  """Few-step times, in that code's variable."""
  if isinstance(path, processes.EDM):
    # Levels 998 down to 2 of their table of 1000; the sample itself (sigma 0)
    # closes the list in place of the last.
    levels = processes.karras_sigmas(
        1000, sigma_min=path.sigma_min, sigma_max=path.sigma_max, rho=path.rho
    )
    place = 2 + (998 - 2) * processes.time_grid(n)[:-1]
    index = jnp.floor(jnp.round(place, 3)).astype(jnp.int32)
    return jnp.append(levels[index], 0.0)
  if isinstance(path, processes.TrigFlow):
    return path.angle(processes.time_grid(n))
  return processes.time_grid(n, start=float(end))
