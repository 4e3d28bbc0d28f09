"""The type of what is a numpy array on the host and a jax.Array on the devices, or where it is traced."""

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
