#!/usr/bin/env bash
# Builds the package on a machine with a GPU, runs the `gpu` tests, compute-sanitizer over the kernels' tests where it is
# installed, and the benchmarks: those of the GPU's kernels, and the suite of `geoengine bench`. Needs no network: what is
# missing is named.
#   bench/gpu_check.sh [--build-only] [folder for results]
# Needs nvcc and a Python (PYTHON=...) with NumPy, PyTorch, pytest, hypothesis, pybind11, scikit-build-core, CMake and
# Ninja, and for the suite also open_clip, onnx and onnxruntime. Results land in <folder>/<gpu>/; <folder> is bench/results
# unless named. The suite goes on where it was interrupted.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

build_only=
if [[ ${1-} == --build-only ]]; then
  build_only=1
  shift
fi
results=${1:-bench/results}
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=()

step() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }
attempt() { # name, command: goes on where one part fails, and says so at the end
  step "$1"
  "${@:2}" || failed+=("$1")
}
has() { "$python" -c "import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))" "$@"; }
# -P: the source folder, where this runs, must not hide the installed package.
tests() { "$python" -P -m pytest -p no:cacheprovider -q "$@"; }

needed=(numpy pytest hypothesis pybind11 scikit_build_core)
[[ -n $build_only ]] || needed+=(torch)
for module in "${needed[@]}"; do
  has "$module" || { echo "gpu_check: $python has no $module: install it, or name another PYTHON" >&2; exit 1; }
done

step 'build'
architectures=native
[[ -z $build_only ]] || architectures=${CUDAARCHS:-90}
export CMAKE_ARGS="-DGEOENGINE_CUDA=ON -DCMAKE_CUDA_ARCHITECTURES=$architectures -DCMAKE_CUDA_FLAGS=-Xptxas=-v"
if ! "$python" -m pip install --verbose --no-index --no-deps --no-build-isolation --target "$scratch/site" . \
  >"$scratch/build.log" 2>&1; then
  tail -n 60 "$scratch/build.log" >&2
  exit 1
fi
echo 'registers and spills of the CUDA kernels, and how many have them:'
grep -oE 'Used [0-9]+ registers' "$scratch/build.log" | sort | uniq -c
grep -oE '[0-9]+ bytes spill stores, [0-9]+ bytes spill loads' "$scratch/build.log" | sort | uniq -c
export PYTHONPATH=$scratch/site
GEOENGINE_COMMIT=$(git rev-parse --short=10 HEAD 2>/dev/null || true)
export GEOENGINE_COMMIT
"$python" -P -c 'from geoengine.kernels import _topk_cuda; print(_topk_cuda.driver_problem() or "CUDA can be used")'
[[ -z $build_only ]] || exit 0

for file in $(grep -lE 'mark\.gpu' tests/test_*.py); do
  attempt "gpu tests of $file" tests -m gpu "$file"
done
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck synccheck; do
    # The small tests: the sanitizers make kernels slower by tens.
    attempt "compute-sanitizer $tool" timeout 900 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -P -m pytest -p no:cacheprovider -q tests/test_kernels_cuda_gpu.py \
      -k 'answers or direction or width or (own_list and 256)'
  done
else
  echo 'compute-sanitizer is not installed: memory and races were not checked'
fi
machine=$("$python" -P -c 'from geoengine.bench.suite.machine import describe; print(describe()["name"])')
attempt 'kernels' "$python" -P -m geoengine.bench.kernels_gpu --out "$results"
attempt 'decoders' "$python" -P -m geoengine.bench.decoding --out "$results/$machine/decoding.jsonl"
if has open_clip onnx onnxruntime; then
  for benchmark in table1 stages peers scale; do
    attempt "bench $benchmark" "$python" -P -c 'from geoengine.cli import main; main()' bench "$benchmark" --out "$results"
  done
  "$python" -P -c 'from geoengine.cli import main; main()' bench report "$results/$machine" || failed+=('report')
else
  echo 'open_clip, onnx or onnxruntime is missing: the suite was not run'
fi

step 'done'
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}" >&2
  exit 1
fi
