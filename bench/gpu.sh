#!/usr/bin/env bash
# Everything that waits for a GPU, in one go of at most ten minutes: `bench/gpu.sh FOLDER`. Results, logs and
# profiles are written as they come; the last line says which parts failed. `bench/gpu.sh FOLDER cpu` tries the
# script at tiny sizes where there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?a folder for the results}")
device=${2:-cuda}
mkdir -p "$out"
small=()
[ "$device" = cpu ] && small=(--small --repeats 1)
failed=()

part() { # seconds, name, command
  echo "== $2"
  timeout "$1" "${@:3}" >"$out/$2.txt" 2>&1 || failed+=("$2")
  tail -n 40 "$out/$2.txt"
}

bench() { # seconds, name, arguments of the benchmark
  part "$1" "$2" python -m nanotoolrl.bench "${@:3}" --device "$device" --json "$out/$2.json"
}

(nvidia-smi || true) >"$out/machine.txt" 2>&1
if [ "$device" = cpu ]; then
  part 60 tests python -m pytest -q tests/test_kernels.py -k "not vocabulary" -m "not slow"
else
  part 90 tests python -m pytest -q -m gpu
fi
bench 90 kernel kernel "${small[@]}"                          # rows 3 and 4
bench 120 sampler sampler "${small[@]}"                       # rows 5 and 6
part 60 profile python -m bench.profile "$out" --device "$device" "${small[@]:0:1}"
for dtype in bf16 fp16; do                                    # row 7
  bench 40 parity-$dtype step --parity --dtype $dtype
done
bench 60 step step "${small[@]}"                              # row 8
part 90 qwen python -m bench.profile "$out" --device "$device" "${small[@]:0:1}" --step
echo "failed: ${failed[*]:-none}"
[ ${#failed[@]} = 0 ]
