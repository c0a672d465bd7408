#!/bin/sh
# Build the environment of a tool that bench/peers.py measures: bench/peers_environment.sh autoround|llmcompressor FOLDER
# pip installs torch with CUDA where its index has no build for the CPU; set PIP_EXTRA_INDEX_URL to choose.
set -e
case "$1" in
  autoround) packages="auto-round==0.16.1" ;;
  llmcompressor) packages="llmcompressor==0.14.0.1" ;;
  *) echo "usage: $0 autoround|llmcompressor FOLDER" >&2; exit 2 ;;
esac
"${PYTHON:-python3}" -m venv "$2"
"$2/bin/pip" install --quiet torch==2.13.0 $packages pillow safetensors
echo "$2/bin/python"
