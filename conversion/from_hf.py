"""python -m conversion.from_hf in a checkout: the command elbo_kto_jax/from_hf.py."""

from elbo_kto_jax import cli
from elbo_kto_jax.from_hf import main

if __name__ == "__main__":
    cli.run(main)
