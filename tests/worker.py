"""One process of a job of several on the CPU, for tests: `python -m tests.worker EVENT STEP ARGUMENTS OF TRAIN`.

Before step STEP (from 1) of the training that this process sees, EVENT happens to it: the name of a signal, or "none".
Lost processes are noticed soon, so that tests need not wait.
"""

import os
import signal
import sys

from elbo_kto_jax import cli, train
from elbo_kto_jax.runtime import processes
from elbo_kto_jax.training import loop

LOST_AFTER = 20

if __name__ == "__main__":
    _, event, step, *sys.argv[1:] = sys.argv
    processes.LOST_AFTER = LOST_AFTER
    take, steps = loop.train_step, []

    def train_step(*arguments, **options):
        steps.append(1)
        if len(steps) == int(step) and event != "none":
            print(f"{event} now", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.Signals[event])
        return take(*arguments, **options)

    loop.train_step = train_step
    cli.run(train.main)
