"""python -m conversion.verify in a checkout: the command elbo_kto_jax/verify.py."""

from elbo_kto_jax import cli
from elbo_kto_jax.verify import main

if __name__ == "__main__":
    cli.run(main)
