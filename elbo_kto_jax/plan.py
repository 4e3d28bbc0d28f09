"""python -m launch.plan --config=configs/kto_mix.py --topology=v5e:8x8: does it fit, and how fast can it be?

Compiles every program of the run for a slice of TPUs that need not be there (libtpu, extra `tpu`), on the CPU: minutes
for the 8B model. What it prints of memory is what that version of libtpu needs. What it prints of time and cost are
bounds, not measurements; the formulas and what they assume stand in elbo_kto_jax/planning/.
"""

import importlib.util
import os
from pathlib import Path

import jax

from elbo_kto_jax import cli
from elbo_kto_jax.planning.chips import parse_topology
from elbo_kto_jax.planning.request import EXAMPLES, FILES, TOKENS, Request, plan
from elbo_kto_jax.runtime import paths
from elbo_kto_jax.runtime.errors import UserError
from elbo_kto_jax.runtime.flags import refuse_existing


def main(argv: list[str]) -> dict:
    flags = cli.Flags("launch.plan", "Compile a run for a TPU slice without one: does it fit, how fast can it be?")
    flags.add_config()
    flags.add_argument("--topology", type=str, required=True, help="GENERATION:SHAPE of the slice, such as v5e:8x8")
    flags.add_argument("--search", action="store_true", help="find mesh, micro-batch, remat and dtype that are fastest")
    flags.add_argument("--candidates", type=int, default=3, help="that --search compiles (default: %(default)s)")
    flags.add_argument("--examples", type=int, help=f"in the data, where it is not on disk (default: {EXAMPLES})")
    flags.add_argument("--tokens", type=float, help=f"of an example, on average (default: {TOKENS})")
    flags.add_argument("--price", type=float, default=0.0, help="of a chip for an hour, to turn chip-hours into a cost")
    flags.add_argument("--out", default="", help="folder for plan.json and report.html (default: runs/plan/TOPOLOGY)")
    flags.add_argument("--overwrite", action="store_true", help="replace what --out holds")
    options, config = flags.parse(argv)
    topology = parse_topology(options.topology)
    for flag in ("candidates", "examples", "tokens"):
        if getattr(options, flag) is not None and getattr(options, flag) < 1:
            raise UserError(f"--{flag}: expected at least 1, got {getattr(options, flag)}")
    out = paths.at(options.out or Path("runs", "plan", topology.name.replace(":", "-")))
    for name in FILES:
        refuse_existing(out / name, options.overwrite)
    _use_libtpu()
    candidates = options.candidates if options.search else 0
    request = Request(topology, options.examples, options.tokens, candidates, options.price)
    return plan(request, config, out)


def _use_libtpu() -> None:
    """Lets libtpu compile on a machine without TPUs, beside another process that does."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("launch.plan compiles with libtpu, which is not installed: pip install 'elbo_kto_jax[tpu]'")
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
        ("TPU_WORKER_HOSTNAMES", "localhost"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
        ("TPU_MIN_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # what it holds cannot be asked for its memory


if __name__ == "__main__":
    cli.run(main)
