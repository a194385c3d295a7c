"""Where a program that is being traced will run."""

import jax


def platform() -> str:
  """Platform of the mesh in use, else of the default device."""
  mesh = jax.sharding.get_abstract_mesh()
  described = getattr(mesh, "abstract_device", None)
  if described is not None:
    return described.platform
  device = jax.config.jax_default_device
  if device is not None:
    return getattr(device, "platform", device)
  return jax.default_backend()
