"""python -m launch.quickstart in a checkout: the command elbo_kto_jax/quickstart.py."""

from elbo_kto_jax import cli
from elbo_kto_jax.quickstart import main

if __name__ == "__main__":
    cli.run(main)
