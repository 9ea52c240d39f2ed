#!/usr/bin/env bash
# Everything worth measuring on an accelerator, unattended: the step in parts, PyTorch's step beside it, CIFAR-10 runs.
#
#   bash benchmarks/gpu.sh OUT [DIRECTORY of CIFAR-10 parquet files]
#   REHEARSE=1 bash benchmarks/gpu.sh OUT       the same commands in miniature, for a machine without an accelerator
#
# Needs jax for the accelerator (README) and, for the second part, benchmarks/requirements-peer.txt. One failing
# measurement does not stop the others; the exit status is 1 if any failed.
set -uo pipefail
if [[ -z ${1:-} ]]; then
  echo "the folder for the results is missing: bash benchmarks/gpu.sh OUT [CIFAR-10 directory]" >&2
  exit 2
fi
out=$(realpath -m "$1")
cifar=${2:+$(realpath "$2")}
cd "$(dirname "$0")/.." && mkdir -p "$out" || exit 2
export XLA_PYTHON_CLIENT_PREALLOCATE=false # the two sides of a comparison share one device's memory

seconds=40
imagenet="--config.data.source=synthetic:256x4096 --config.data.resident=on"
small="" shrink=""
if [[ ${REHEARSE:-} ]]; then
  seconds=2
  small=":smoke"
  imagenet="--config.data.source=synthetic:72x64 --config.data.resident=on --config.image_size=64"
  shrink="--config.batch_size=16 --config.bn_groups=2 --config.method.queue=64"
fi

failed=0
measure() { # NAME COMMAND...: keeps what the command prints in OUT/NAME.txt
  local name=$1
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$out/$name.txt"
  [[ ${PIPESTATUS[0]} == 0 ]] || { echo "== $name failed"; failed=1; }
}

recipes=(
  "embedded|configs/rekd_alexnet.py$small"
  "imagenet|configs/rekd_alexnet.py:imagenet $imagenet $shrink"
  "imagenet-resnet18|configs/rekd_alexnet.py:imagenet --config.student.name=resnet18 $imagenet $shrink"
)
python -c "import torch" 2>/dev/null || echo "== torch is not installed: no comparison with it"
for recipe in "${recipes[@]}"; do
  name=${recipe%%|*}
  read -ra arguments <<<"--config=${recipe#*|}"
  measure "bench-$name" python launch/bench.py "${arguments[@]}" --seconds=$seconds --json="$out/bench-$name.json"
  if python -c "import torch" 2>/dev/null; then
    measure "peer-$name" python benchmarks/peer.py "${arguments[@]}" --seconds=$seconds --json="$out/peer-$name.json"
  fi
done
name=bench-$name-remat # of the last recipe
measure "$name" python launch/bench.py "${arguments[@]}" --config.remat=True --seconds=$seconds --json="$out/$name.json"

if [[ $cifar ]]; then
  measure cifar10-full python benchmarks/compare.py cifar10-full --source="hf:$cifar" --out="$out/cifar10-full"
  cp benchmarks/cifar10-full.{json,md} "$out/"
fi
exit $failed
