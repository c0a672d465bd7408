#!/usr/bin/env bash
# Repeat the measurements of docs/measurements/two-gpus.md on two GPUs of one host; true shapes, random weights.
#
#   bench/on_two_gpus.sh OUT PART ...
#
# Runs the parts in the order of the arguments:
#   checkpoints  LLaVA-1.5-7B, Qwen2.5-VL-3B and BLIP-2 OPT-2.7b with random weights, in OUT/models
#   shared       calibration on one GPU beside calibration shared by both
#   exports      the artifacts that the next two parts serve, in OUT/artifacts
#   check        `mmq check --tensor-parallel 2` of four artifacts
#   refused      two artifacts that serve-lint refuses for two GPUs: its reasons, and what vLLM does with them
#   speed        vLLM with one and 64 clients: 16 bits on one GPU; two recipes by tensor and data parallelism
#
# PYTHON: interpreter with mmq's packages. VLLM: executable of vLLM. VLLM_PYTHON: command of an interpreter with vllm.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?usage: bench/on_two_gpus.sh OUT PART ...}" && cd "$1" && pwd)
shift
python=${PYTHON:-python3} vllm=${VLLM:-vllm} vllm_python=${VLLM_PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export VLLM_WORKER_MULTIPROC_METHOD=spawn VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
engine=(--enforce-eager --gpu-memory-utilization 0.1 --kv-cache-memory-bytes 4000000000 --max-model-len 2048)
mkdir -p "$out/models" "$out/artifacts" "$out/logs"

checkpoints() {
  random llava-hf--llava-1.5-7b-hf llava cuda:0 &
  (random Qwen--Qwen2.5-VL-3B-Instruct qwen cuda:1 && random Salesforce--blip2-opt-2.7b blip2 cuda:1) &
  wait
}
random() { [[ -d $out/models/$2 ]] || $python -m bench.random_checkpoint "$1" "$out/models/$2" --device "$3"; }

shared() { $python -m bench.shared_calibration "$out/models/llava" --json "$out/shared.json"; }

exports() {
  (export_one llava llava-w4-vit8 cuda:0 && export_one llava llava-fp8-vit16-cache8 cuda:0) &
  (export_one qwen llava-w4 cuda:1 && export_one qwen llava-w4-vit8 cuda:1) &
  (export_one blip2 blip2-caption-w4 cuda:1 && export_one blip2 blip2-caption-w4 cuda:1 -g64 --group-size 64) &
  wait
}
export_one() {
  local to=$out/artifacts/$1-$2${4:-}
  [[ -d $to ]] || $python -m exporter export --recipe "$2" --model "$out/models/$1" --device "$3" --out "$to" \
    --skip-evaluation --json "${@:5}" > "$out/logs/export-${to##*/}" 2>&1 || echo "export of ${to##*/} failed"
}

check() {
  check_one llava-llava-w4-vit8 cuda:0 &
  check_one llava-llava-fp8-vit16-cache8 cuda:1 &
  check_one qwen-llava-w4 cuda:1 &
  check_one blip2-blip2-caption-w4-g64 cuda:0 &
  wait
}
check_one() {
  local log=$out/logs/check-$1
  $python -m exporter check "$out/artifacts/$1" --vllm "$vllm" --tensor-parallel 2 --device "$2" --logs "$log" -- \
    "${engine[@]}" > "$log.txt" 2>&1
  echo "== $1: exit $?"
  grep -vE '^(starting|preparing)' "$log.txt" | tail -n 12
}

refused() {
  refused_one qwen-llava-w4-vit8 8801 &
  refused_one blip2-blip2-caption-w4 8802 &
  wait
}
refused_one() {
  local log=$out/logs/refused-$1
  $python -m exporter check "$out/artifacts/$1" --vllm "$vllm" --tensor-parallel 2 > "$log.lint" 2>&1
  local lint=$?
  timeout 240 "$vllm" serve "$out/artifacts/$1" --tensor-parallel-size 2 --port "$2" "${engine[@]}" > "$log.vllm" 2>&1
  echo "== $1: mmq check exit $lint, vllm serve exit $?"
  grep -m 2 'rule tensor-parallel' "$log.lint"
  grep -aoE '(RuntimeError|ValueError|AssertionError): .*' "$log.vllm" | head -n 2 | cut -c1-240
}

speed() {
  rm -rf "$out/serve"
  $python -m bench.serve "$out/serve" --clients 1 64 --python "$vllm_python" --seconds 540 \
    --only "16 bits" {w4-humming,fp8-vit16-cache8}@{tp2,dp2} "16 bits@tp2"
}

parts=" checkpoints shared exports check refused speed "
for part in "$@"; do
  [[ $parts == *" $part "* ]] || { echo "unknown part '$part'; use$parts" >&2 && exit 2; }
done
nvidia-smi --query-gpu=name --format=csv,noheader
for part in "$@"; do
  echo "== $part"
  "$part"
done
