#!/usr/bin/env bash
# Runs tests on an emulated aarch64 processor, on Debian with `apt-get install qemu-user g++-aarch64-linux-gnu ninja-build`:
#
#     tests/native/emulate_aarch64.sh FOLDER tests/ops/test_exact.py tests/ops/test_loss.py
#
# The first run makes FOLDER: Python 3.11, torch and NVIDIA's libraries, which torch for aarch64 from PyPI loads, 5 GB.
# gistops compiles its ops on first use, by the cross compiler, which runs at full speed. The rest takes 10 to 30 times as
# long as on the machine itself.
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p "$1"
folder=$(realpath "$1")
shift

apt_arm64() { # with lists of its own, and without changes to the system
  apt-get -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$folder/apt" \
    -o Dir::State::status=/dev/null -o Dir::Cache="$folder/apt" -o APT::Sandbox::User=root "$@"
}

if [ ! -e "$folder/complete" ]; then
  rm -rf "${folder:?}"/{root,site}
  mkdir -p "$folder/apt/lists/partial" "$folder/root/proc" "$folder/debs"
  apt_arm64 update
  (cd "$folder/debs" && apt_arm64 download libc6 libstdc++6 libgcc-s1 zlib1g libexpat1 libffi8 libbz2-1.0 liblzma5 \
    libssl3 libsqlite3-0 python3.11 python3.11-minimal libpython3.11-minimal libpython3.11-stdlib)
  for deb in "$folder"/debs/*.deb; do dpkg -x "$deb" "$folder/root"; done
  # qemu opens files of its root before those of the host. Torch cannot read the /proc/cpuinfo of another architecture.
  printf 'processor\t: 0\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd0c\n\n' \
    >"$folder/root/proc/cpuinfo"
  # A script in place of the interpreter, so that tests can start processes.
  python=$folder/root/usr/bin/python3.11
  mv "$python" "$python.aarch64"
  printf '#!/bin/sh\nexec qemu-aarch64 -L %q -0 %q %q "$@"\n' "$folder/root" "$python" "$python.aarch64" >"$python"
  chmod +x "$python"
  platforms=(--platform manylinux2014_aarch64)
  for minor in $(seq 17 28); do platforms+=(--platform "manylinux_2_${minor}_aarch64"); done
  pip install --quiet --target "$folder/site" --python-version 3.11 --only-binary=:all: "${platforms[@]}" \
    torch==2.13.0 'numpy>=1.26' pytest hypothesis
  touch "$folder/complete"
fi

export PYTHONPATH=$folder/site GISTOPS_CACHE=$folder/cache CXX=aarch64-linux-gnu-g++ GISTOPS_CUDA=0 OMP_NUM_THREADS=1
ulimit -d 8000000 # qemu ignores the limit that a test sets before it asks for too much memory
exec "$folder/root/usr/bin/python3.11" -m pytest -p no:cacheprovider "$@"
