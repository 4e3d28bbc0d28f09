"""python -m launch.plan in a checkout: the command elbo_kto_jax/plan.py."""

from elbo_kto_jax import cli
from elbo_kto_jax.plan import main

if __name__ == "__main__":
    cli.run(main)
