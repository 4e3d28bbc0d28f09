#!/usr/bin/env bash
# Runs a command of this project as a job on TPU slices of a GKE cluster, as a JobSet or through XPK (which makes one):
#   bash launch/gke.sh --name=JOB --image=IMAGE --accelerator=tpu-v5-lite-podslice --topology=4x4 [--chips-per-host=4]
#       [--slices=1] [--claim=VOLUME_CLAIM] [--service-account=NAME] [--restarts=10] [--dry-run] -- COMMAND
#   bash launch/gke.sh --xpk-cluster=CLUSTER --name=JOB --image=IMAGE --accelerator=v5litepod-16 [--slices=1] ... -- COMMAND
#   COMMAND, say: elbo-kto train --config=kto_mix --workdir=gs://BUCKET/runs/kto_mix
# IMAGE      made from launch/Dockerfile.tpu.
# --claim    a persistent volume claim that many nodes may write (Filestore), mounted at /mnt/shared; not with XPK, which
#            attaches what `xpk storage attach` has named. A working folder in a bucket needs none.
# --service-account  of Kubernetes, which may write to the bucket (Workload Identity); not with XPK, which has its own.
# --dry-run  prints the manifest, or what it would run.
# A job that was preempted, or lost a machine, starts again --restarts times and goes on from its latest checkpoint.
set -euo pipefail

name='' image='' accelerator='' topology='' chips_per_host=4 slices=1 claim='' account='' restarts=10 xpk_cluster='' dry_run=''

fail() {
  echo "error: $1" >&2
  exit 2
}

while (($#)); do
  case $1 in
    --name=?*) name=${1#*=} ;;
    --image=?*) image=${1#*=} ;;
    --accelerator=?*) accelerator=${1#*=} ;;
    --topology=?*) topology=${1#*=} ;;
    --chips-per-host=?*) chips_per_host=${1#*=} ;;
    --slices=?*) slices=${1#*=} ;;
    --claim=?*) claim=${1#*=} ;;
    --service-account=?*) account=${1#*=} ;;
    --restarts=?*) restarts=${1#*=} ;;
    --xpk-cluster=?*) xpk_cluster=${1#*=} ;;
    --dry-run) dry_run=1 ;;
    --) shift && break ;;
    *) fail "$1: unknown; see the head of ${BASH_SOURCE[0]}" ;;
  esac
  shift
done
[[ $name && $image && $accelerator ]] || fail "expected --name=JOB, --image=IMAGE and --accelerator=TYPE"
(($#)) || fail "expected -- and a command"
for number in "$chips_per_host" "$slices" "$restarts"; do
  [[ $number =~ ^[0-9]+$ ]] || fail "$number: expected a whole number"
done

if [[ $xpk_cluster ]]; then
  command=(xpk workload create --cluster="$xpk_cluster" --workload="$name" --tpu-type="$accelerator"
    --num-slices="$slices" --max-restarts="$restarts" --restart-on-exit-codes=1-126
    --termination-grace-period-seconds=300 --docker-image="$image" --command="$(printf '%q ' "$@")")
  if [[ $dry_run ]]; then
    printf '%q ' "${command[@]}"
    echo
    exit
  fi
  exec "${command[@]}"
fi

[[ $topology =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || fail "--topology=$topology: expected one such as 4x4 or 2x2x4"
chips=$((${topology//x/*}))
((chips_per_host > 0 && chips % chips_per_host == 0)) || fail "--chips-per-host=$chips_per_host does not divide $chips chips"
hosts=$((chips / chips_per_host))

quoted() { # as a JSON string, which is YAML too
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}

manifest() {
  cat <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $(quoted "$name")
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
  replicatedJobs:
    - name: slice
      replicas: $slices
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          template:
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300 # to save, when preempted
              hostNetwork: true
              dnsPolicy: ClusterFirstWithHostNet
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(quoted "$accelerator")
                cloud.google.com/gke-tpu-topology: $(quoted "$topology")
              containers:
                - name: run
                  image: $(quoted "$image")
                  command:
$(for word in "$@"; do echo "                    - $(quoted "$word")"; done)
                  securityContext:
                    runAsUser: 0 # opens the chips' devices
                  resources:
                    limits:
                      google.com/tpu: $chips_per_host
YAML
  if [[ $claim ]]; then
    cat <<YAML
                  volumeMounts:
                    - name: shared
                      mountPath: /mnt/shared
              volumes:
                - name: shared
                  persistentVolumeClaim:
                    claimName: $(quoted "$claim")
YAML
  fi
  if [[ $account ]]; then
    echo "              serviceAccountName: $(quoted "$account")"
  fi
}

if [[ $dry_run ]]; then
  manifest "$@"
else
  manifest "$@" | kubectl apply -f -
  echo "follow it: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" >&2
fi
