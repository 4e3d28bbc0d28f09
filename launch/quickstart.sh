#!/usr/bin/env bash
# The main job on a tiny model, from nothing, on a CPU in minutes:
#   bash launch/quickstart.sh [--workdir=DIR] [--seed=0] [--shuffle-labels] [--overwrite] [--config.KEY=VALUE ...]
# Uses the Python that is active ($PYTHON, else python3) if it has this project's dependencies, else .venv of the project,
# which is made first if need be. Writes nothing else outside the working folder; see elbo_kto_jax/quickstart.py.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

has_dependencies() {
  "$1" - "$project/pyproject.toml" 2>/dev/null <<'PYTHON'
import importlib.metadata, re, sys, tomllib
for requirement in tomllib.load(open(sys.argv[1], "rb"))["project"]["dependencies"]:
    importlib.metadata.version(re.match(r"[\w.-]+", requirement)[0])
PYTHON
}

python=${PYTHON:-python3}
if ! has_dependencies "$python"; then
  python_of_project=$project/.venv/bin/python
  if ! has_dependencies "$python_of_project"; then
    echo "installing the project and its dependencies into $project/.venv (once)" >&2
    "$python" -m venv "$project/.venv" >&2
    "$python_of_project" -m pip install --quiet --editable "$project" >&2
  fi
  python=$python_of_project
fi

export JAX_PLATFORMS=cpu HF_HUB_OFFLINE=1 PYTHONPATH="$project${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m launch.quickstart "$@"
