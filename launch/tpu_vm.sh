#!/usr/bin/env bash
# Trains on a slice of Google TPUs: the same main.py on all its workers, through gcloud. Written for a TPU, not yet run
# on one; tested with a stand-in of gcloud.
#
#   export NAME=rekd ZONE=us-west4-a      # and, where they differ: TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite SPOT=1
#   launch/tpu_vm.sh create               # the slice
#   launch/tpu_vm.sh setup                # this clone and its environment, on all workers
#   launch/tpu_vm.sh run --config=configs/rekd_alexnet.py:imagenet --workdir=gs://BUCKET/rekd
#   launch/tpu_vm.sh log                  # worker 0's, until the run ends; Ctrl-C leaves the run alone
#   launch/tpu_vm.sh stop                 # after a checkpoint; the same `run` goes on from it
#   launch/tpu_vm.sh delete
#   launch/tpu_vm.sh train --config=… --workdir=gs://…   # create, setup, run, log; anew when the slice is taken away
#
# `launch/tpu_vm.sh --dry_run …` prints the commands instead. Project and account are gcloud's (gcloud config list).
# Several workers need a --workdir that all of them see, `train` one that outlives the slice. `train` tries again every
# minute where there is no capacity, ends with the run's exit status, and leaves the slice as it is: delete it.
# shellcheck disable=SC2016  # what stands in single quotes is expanded on the workers
set -euo pipefail
clone=$(cd "$(dirname "$0")/.." && pwd)
uv='"$HOME/.local/bin/uv"' # on a worker

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

quote() { # words, as one line that a shell reads back as the same words
  local word line='' single="'" escaped="'\\''"
  for word; do
    case $word in '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//$single/$escaped}'" ;; esac
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

execute() { if [ -n "$dry_run" ]; then quote "$@"; else "$@"; fi; }

tpu() { execute gcloud compute tpus tpu-vm "$@" --zone="$ZONE"; }

on() { tpu ssh "$NAME" --worker="$1" --command="$2"; } # which worker, or all; what

create() {
  local type=${TYPE:-v5litepod-16} version=${VERSION:-v2-alpha-tpuv5-lite}
  tpu create "$NAME" --accelerator-type="$type" --version="$version" ${SPOT:+--spot}
}

setup() { # uv, because a TPU's image may have an older Python than 3.11; gcsfs, for gs://
  local archive="${TMPDIR:-/tmp}/$NAME.tar.gz"
  execute tar -czf "$archive" -C "$clone" --exclude=./{runs,data,.venv} --exclude='./.*_cache' . &&
    tpu scp "$archive" "$NAME:ssl_kd.tar.gz" --worker=all &&
    on all "mkdir -p ssl_kd && tar -xzf ssl_kd.tar.gz -C ssl_kd && cd ssl_kd && python3 -m pip install -q --user uv && \
$uv venv -q --allow-existing --python=3.11 .venv && $uv pip install -q -r requirements.txt 'jax[tpu]>=0.10,<0.11' gcsfs"
}

# A session of its own, so that it outlives ssh, whose shell waits for python to write down how it ended. gcloud repeats
# a command whose connection broke: a run that is there is left alone.
run() {
  local python='.venv/bin/python launch/main.py "$@" >> run.log 2>&1'
  local session="$python & echo \$! > python.pid; wait \$!; echo \$? > run.status"
  on all "cd ssl_kd && if kill -0 \"\$(cat run.pid 2> /dev/null)\" 2> /dev/null; then echo 'it is running already'; \
else rm -f run.status; setsid bash -c $(quote "$session") $(quote main.py "$@") < /dev/null > /dev/null 2>&1 & \
echo \$! > run.pid; fi"
}

log() { on 0 'cd ssl_kd && tail -n 20 -F run.log --pid="$(cat run.pid)" 2> /dev/null; exit "$(cat run.status)"'; }

stop() { on all 'cd ssl_kd && kill -TERM "$(cat python.pid)" && tail -f /dev/null --pid="$(cat run.pid)"'; }

delete() { tpu delete "$NAME" --quiet; }

state() { [ -n "$dry_run" ] || tpu describe "$NAME" --format='value(state)' 2> /dev/null || true; } # '': no slice

train() {
  local status pause=${PAUSE:-60} # seconds
  while true; do
    case $(state) in
      READY) ;;
      '')
        create || { sleep "$pause" && continue; }
        setup || { [ "$(state)" != READY ] && continue; return 1; }
        ;;
      PREEMPTED | TERMINATED) { delete || sleep "$pause"; } && continue ;;
      *) sleep "$pause" && continue ;; # it is on its way up or down
    esac
    { run "$@" && log; } || true
    [ -z "$dry_run" ] || return 0
    status=$(on 0 'cat ssl_kd/run.status') || status=''
    [ "$status" != 0 ] || return 0
    sleep "$pause" # runs end a little before the slice is known to be taken away
    [ -z "$status" ] || [ "$(state)" != READY ] || return "$status"
  done
}

dry_run=''
if [ "${1:-}" = --dry_run ]; then dry_run=1 && shift; fi
verb=${1:-} arguments=" ${*:2}"
case $verb in
  create | setup | log | stop | delete) [ -z "${2:-}" ] || die "$verb takes no arguments, but got$arguments." ;;
  run | train) [[ $arguments = *' --config='* ]] || die "$verb needs main.py's arguments: --config is missing." ;;
  *) die "say one of create, setup, run, log, stop, delete, train; the head of $0 explains them." ;;
esac
[ "$verb" != train ] || [[ $arguments = *' --workdir=gs://'* ]] ||
  die "train needs --workdir=gs://BUCKET/RUN: what a slice holds goes with it."
[ -n "${NAME:-}" ] || die "NAME is missing: export NAME=… as the slice is, or is to be, called."
[ -n "${ZONE:-}" ] || die "ZONE is missing: export ZONE=… where the slice is, as us-west4-a."
[ -n "$dry_run" ] || command -v gcloud > /dev/null || die "gcloud is missing: install Google's Cloud CLI first."
"$verb" "${@:2}"
