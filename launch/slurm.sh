#!/usr/bin/env bash
# Runs a command of this project as a SLURM job, one process per GPU:
#   bash launch/slurm.sh --nodes=2 --gpus-per-node=8 [--python=.venv/bin/python] [SBATCH OPTIONS] [--dry-run] -- COMMAND
#   COMMAND, say: python -m elbo_kto_jax.train --config=configs/kto_mix.py --workdir=/shared/runs/kto_mix
#   or one with --workdir=gs://BUCKET/runs/kto_mix; what gives access to the bucket (GOOGLE_APPLICATION_CREDENTIALS,
#   AWS_PROFILE) must be in the environment, which goes with the job.
# The folder of this project must be on a file system that all nodes share, and so must those in COMMAND that are not in
# a bucket. Other options (--time=..., --partition=..., --account=...) go to sbatch as they are.
# --python   what `python` means in COMMAND (default: the one that is active).
# --dry-run  prints the batch script.
# Five minutes before its time is over the job saves, and queues itself again to go on.
set -euo pipefail

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
nodes='' gpus_per_node='' python=$(command -v python || true) sbatch_options=() dry_run=''

fail() {
  echo "error: $1" >&2
  exit 2
}

while (($#)); do
  case $1 in
    --nodes=?*) nodes=${1#*=} ;;
    --gpus-per-node=?*) gpus_per_node=${1#*=} ;;
    --python=?*)
      python=${1#*=} # the shell does not expand ~ behind =
      python=$(realpath --no-symlinks "${python/#\~\//$HOME/}")
      ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    --*=*) sbatch_options+=("$1") ;;
    *) fail "$1: unknown; see the head of ${BASH_SOURCE[0]}" ;;
  esac
  shift
done
for number in "$nodes" "$gpus_per_node"; do
  [[ $number =~ ^[1-9][0-9]*$ ]] || fail "expected --nodes=N and --gpus-per-node=N"
done
(($#)) || fail "expected -- and a command"
[[ $python ]] || fail "no python is active; name one with --python=FILE"

script() {
  cat <<SCRIPT
#!/usr/bin/env bash
#SBATCH --job-name=elbo_kto_jax
#SBATCH --nodes=$nodes
#SBATCH --gpus-per-node=$gpus_per_node
#SBATCH --ntasks-per-node=$gpus_per_node
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
cd $(printf '%q' "$project")
export PATH=$(printf '%q' "$(dirname "$python")"):\$PATH
# Processes end by themselves when one is lost, and the first one writes the report after the others have left.
srun --kill-on-bad-exit=0 $(printf '%q ' "$@")
status=\$?
if [ "\$status" -eq 75 ]; then # interrupted after saving
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$status"
SCRIPT
}

if [[ $dry_run ]]; then
  script "$@"
else
  script "$@" | sbatch "${sbatch_options[@]}"
fi
