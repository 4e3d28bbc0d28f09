"""Commands that start runs: the quickstart, and random models to try things on."""

import elbo_kto_jax  # noqa: F401  # first, for it quietens transformers
