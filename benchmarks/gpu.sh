#!/usr/bin/env bash
# Everything worth measuring on an accelerator, unattended: the step beside PyTorch's, its parts, CIFAR-10 runs.
#
#   bash benchmarks/gpu.sh OUT [DIRECTORY of CIFAR-10 parquet files]
#   REHEARSE=1 bash benchmarks/gpu.sh OUT       the same commands in miniature, for a machine without an accelerator
#
# Needs jax for the accelerator (README) and, to compare, benchmarks/requirements-peer.txt. What matters most comes
# first. A measurement prints to OUT/NAME.log, which becomes OUT/NAME.txt when it is done: after it was cut off, the
# same command goes on with those that are not. A rehearsal's results go to OUT/rehearsal. One failing measurement does
# not stop the others; the exit status is 1 if any failed.
set -uo pipefail
if [[ -z ${1:-} ]]; then
  echo "the folder for the results is missing: bash benchmarks/gpu.sh OUT [CIFAR-10 directory]" >&2
  exit 2
fi
out=$(realpath -m "$1")${REHEARSE:+/rehearsal}
cifar=${2:+$(realpath "$2")}
cd "$(dirname "$0")/.." && mkdir -p "$out" || exit 2
export XLA_PYTHON_CLIENT_PREALLOCATE=false # the two sides of a comparison share one device's memory

seconds=30 small="" width=1
images=(--config.data.source=synthetic:256x4096 --config.data.resident=on)
if [[ ${REHEARSE:-} ]]; then
  seconds=2 small=:smoke width=0.125
  images=(--config.data.source=synthetic:72x64 --config.data.resident=on --config.image_size=64)
  images+=(--config.batch_size=16 --config.bn_groups=2 --config.method.queue=64 --config.student.width=$width)
fi

failed=0
measure() { # NAME COMMAND...
  local name=$1
  shift
  if [[ -e $out/$name.txt ]]; then
    echo "== $name is done: $out/$name.txt"
    return
  fi
  echo "== $name: $*"
  if "$@" 2>&1 | tee "$out/$name.log"; then
    mv "$out/$name.log" "$out/$name.txt"
  else
    echo "== $name failed"
    failed=1
  fi
}

bench() { # NAME OPTION...
  measure "bench-$1" python launch/bench.py "${@:2}" --seconds=$seconds --json="$out/bench-$1.json"
}

peer() { # NAME OPTION...
  if [[ $torch ]]; then
    measure "peer-$1" python benchmarks/peer.py "${@:2}" --seconds=$seconds --json="$out/peer-$1.json"
  fi
}

torch=$(python -c "import torch; print(torch.__version__)" 2>/dev/null) ||
  echo "== torch is not installed: no comparison with it"

rekd=(--config=configs/rekd_alexnet.py:imagenet "${images[@]}" --config.teacher.width=$width)
embedded=(--config=configs/rekd_alexnet.py$small)
disco=(--config=configs/disco_resnet18.py:imagenet "${images[@]}" --config.teacher.width=$width)

peer imagenet-rekd "${rekd[@]}"
peer imagenet-disco "${disco[@]}"
bench imagenet-rekd "${rekd[@]}"
bench imagenet-disco "${disco[@]}"
peer embedded-rekd "${embedded[@]}"
bench embedded-rekd "${embedded[@]}"
peer imagenet-rekd-resnet18 "${rekd[@]}" --config.student.name=resnet18
bench imagenet-rekd-resnet18 "${rekd[@]}" --config.student.name=resnet18
bench imagenet-rekd-resnet18-remat "${rekd[@]}" --config.student.name=resnet18 --config.remat=True

if [[ $cifar ]]; then
  measure cifar10-full python benchmarks/compare.py cifar10-full --source="hf:$cifar" --out="$out/cifar10-full"
fi
exit $failed
