#!/usr/bin/env bash
# Builds and runs the project in this folder against an installed torch_divergence, as a C++ user would.
#
#   tests/install/run.sh PREFIX BUILD_DIR [CMAKE_ARGUMENT...]
#
# PREFIX is what the user puts into CMAKE_PREFIX_PATH: for a pip-installed package what
#   python -c "import torch_divergence as td; print(td.cmake_prefix_path)"
# prints, else the --prefix of `cmake --install`. With the latter, torch is the one of the Python on PATH, or
# -DLibTorch_ROOT=... names it. BUILD_DIR is created.
set -euo pipefail

if [ $# -lt 2 ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
source_dir=$(cd "$(dirname "$0")" && pwd)
prefix=$1
build_dir=$2
shift 2

fail() {
  echo "FAILED: $*" >&2
  exit 1
}

# build_and_run DIR CMAKE_ARGUMENT...
build_and_run() {
  local dir=$1
  shift
  cmake -S "$source_dir" -B "$dir" -DCMAKE_BUILD_TYPE=Release -DCMAKE_PREFIX_PATH="$prefix" "$@"
  cmake --build "$dir"
  "$dir/train"

  local libraries
  libraries=$(ldd "$dir/train")
  grep -q "libtorch_divergence" <<<"$libraries" || fail "train does not load libtorch_divergence:"$'\n'"$libraries"
  ! grep "not found" <<<"$libraries" || fail "train has libraries that are not found"
  ! grep -E "libpython|libtorch_python" <<<"$libraries" || fail "train needs Python"
}

build_and_run "$build_dir/plain" "$@"
! grep "^CMAKE_CUDA_COMPILER:" "$build_dir/plain/CMakeCache.txt" || fail "CMake looked for nvcc"

# A project that calls find_package(Torch) before. Torch's own package refuses to configure a CUDA build of torch where
# there is no CUDA toolkit, with or without this library.
include_dir=$(sed -n 's/^LibTorch_INCLUDE_DIR:PATH=//p' "$build_dir/plain/CMakeCache.txt")
if [ -e "$include_dir/../lib/libtorch_cuda.so" ] && ! command -v nvcc >/dev/null; then
  echo "find_package(Torch) before find_package(TorchDivergence): not tried, this torch needs a CUDA toolkit for it"
else
  # Without the list, torch asks CMake to detect the GPUs of this machine, which it cannot do in C++20.
  TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-8.0} build_and_run "$build_dir/after_torch" -DFIND_TORCH_FIRST=ON \
    -DTorch_DIR="$include_dir/../share/cmake/Torch" "$@"
fi
echo "OK: $prefix"
