#!/usr/bin/env bash
# Resolves the packages of the two images anew and writes them down with their hashes. Needs uv.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

pin() {  # OUT EXTRA-INPUT OPTION…
  local out=deploy/$1 extra=$2
  shift 2
  { printf '# Written by deploy/pin.sh; not to be edited.\n'
    printf '%s\n' "$extra" | tr ';' '\n' | uv pip compile --quiet --no-config --no-header --no-annotate \
      --generate-hashes --python-version 3.11 --python-platform x86_64-unknown-linux-gnu "$@" - ; } > "$out.new"
  mv "$out.new" "$out"
}

# The GPU wheel of ONNX Runtime would run on a CPU too, and is 262 MB larger.
none=$(mktemp)
trap 'rm -f "$none"' EXIT
printf "onnxruntime-gpu; sys_platform == 'none'\n" > "$none"

pin requirements-build.txt 'cmake;ninja;pip;pybind11>=2.13;scikit-build-core>=1.1;wheel'
pin requirements-build-gpu.txt 'cmake;ninja;pip;pybind11>=2.13;scikit-build-core>=1.1;wheel;nvidia-cuda-nvcc==13.0.*;nvidia-cuda-crt==13.0.*;nvidia-nvvm==13.0.*;nvidia-cuda-runtime==13.0.*;nvidia-cuda-cccl==13.0.*'
pin requirements-cpu.txt 'onnxruntime>=1.31' pyproject.toml --extra serve --extra openvino --override "$none"
pin requirements-gpu.txt '' pyproject.toml --extra serve --extra gpu
