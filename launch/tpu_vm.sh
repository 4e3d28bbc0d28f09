#!/usr/bin/env bash
# Runs a command of this project on every worker of a TPU VM slice:
#   bash launch/tpu_vm.sh --name=SLICE --zone=ZONE [--project=PROJECT] [--share=HOST:/EXPORT] [--install] [--dry-run] -- COMMAND
#   COMMAND, say: python -m elbo_kto_jax.train --config=configs/kto_mix.py --workdir=/mnt/shared/runs/kto_mix
# --install  copies this folder to the workers and makes a virtual environment there; once, and after every change.
# --share    mounts an NFS export (Filestore) at /mnt/shared, for data, checkpoints and the working folder.
# --dry-run  prints what it would run.
# The workers find each other through the slice's metadata. Ctrl-C stops the job after it has saved; the same again goes on.
set -euo pipefail

project_folder=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
on_slice=() name='' share='' install='' dry_run=''

fail() {
  echo "error: $1" >&2
  exit 2
}

while (($#)); do
  case $1 in
    --name=?*) name=${1#*=} ;;
    --zone=?* | --project=?*) on_slice+=("$1") ;;
    --share=?*:/?*) share=${1#*=} ;;
    --install) install=1 ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    *) fail "$1: unknown; see the head of ${BASH_SOURCE[0]}" ;;
  esac
  shift
done
[[ $name && ${on_slice[*]} == *--zone=* ]] || fail "expected --name=SLICE and --zone=ZONE"
(($#)) || [[ $install$share ]] || fail "expected -- and a command, or --install or --share"

run() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_all_workers() {
  run gcloud compute tpus tpu-vm ssh "$name" "${on_slice[@]}" --worker=all --command="$1"
}

if [[ $install ]]; then
  archive=$(mktemp --suffix=.tar.gz)
  trap 'rm -f "$archive"' EXIT
  run tar -czf "$archive" --exclude=.git --exclude=.venv --exclude=runs -C "$project_folder" .
  run gcloud compute tpus tpu-vm scp "$archive" "$name":elbo_kto_jax.tar.gz "${on_slice[@]}" --worker=all
  # shellcheck disable=SC2016 # expanded there, not here; uv, because the machines' own Python is too old
  on_all_workers 'rm -rf elbo_kto_jax && mkdir elbo_kto_jax && tar -xzf elbo_kto_jax.tar.gz -C elbo_kto_jax &&
    python3 -m pip install --quiet --user uv && cd elbo_kto_jax && python3 -m uv venv --quiet --python=3.12 &&
    python3 -m uv pip install --quiet --editable ".[tpu,gcs]"'
fi
if [[ $share ]]; then
  on_all_workers "mountpoint -q /mnt/shared || { sudo apt-get install -y -q nfs-common &&
    sudo mkdir -p /mnt/shared && sudo mount -t nfs $(printf '%q' "$share") /mnt/shared && sudo chmod a+rwx /mnt/shared; }"
fi
if (($#)); then
  on_all_workers "cd elbo_kto_jax && export PATH=\"\$PWD/.venv/bin:\$PATH\" && exec $(printf '%q ' "$@")"
fi
