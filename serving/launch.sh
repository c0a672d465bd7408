#!/usr/bin/env bash
# Serve an artifact with vLLM on this machine:  serving/launch.sh ARTIFACT [more flags of `vllm serve`]
#
# For machines without mmq. `mmq serve` also enables the plugin for a packed Q-Former.
#
# HOST (127.0.0.1) and PORT (8000) set the address. vLLM has no authentication: keep the loopback address unless a proxy
# authenticates clients. The model is named after the artifact's folder.
set -euo pipefail

if [ $# -lt 1 ]; then
  echo "usage: $0 ARTIFACT [flags of vllm serve]" >&2
  exit 2
fi
artifact="$(cd "$1" 2>/dev/null && pwd)" || { echo "$0: no folder '$1'" >&2; exit 2; }
shift
[ -f "$artifact/config.json" ] || { echo "$0: '$artifact' is not an artifact: it has no config.json" >&2; exit 2; }
command -v vllm >/dev/null || { echo "$0: vllm is not installed (pip install 'vllm>=0.26,<0.34')" >&2; exit 2; }

# The folder contains everything the engine needs; a missing file must fail instead of being downloaded from the hub.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" VLLM_NO_USAGE_STATS="${VLLM_NO_USAGE_STATS:-1}"

# The number type of keys and values that config.json cannot name; empty for most artifacts.
cache="$(sed -n 's/^ "kv_cache": "\([a-z0-9_]*\)",\{0,1\}$/\1/p' "$artifact/mmq_manifest.json" 2>/dev/null || true)"

# The families that mmq quantizes accept one image per request; the limit keeps vLLM from reserving memory for more.
exec vllm serve "$artifact" \
  --host "${HOST:-127.0.0.1}" --port "${PORT:-8000}" \
  --served-model-name "$(basename "$artifact")" \
  --limit-mm-per-prompt '{"image": 1}' \
  ${cache:+--kv-cache-dtype "$cache"} \
  "$@"
