#!/usr/bin/env bash
# Repeat the GPU measurements of the documentation on the first GPU.
#
#   bench/on_gpu.sh OUT PART ...
#
# Runs the parts in the order of the arguments; OUT/PART.txt has the output of each part:
#   kernels   Triton kernels against torch, and the tests of the methods
#   core      time and memory of GPTQ, AWQ and BLIP-2 at true shapes (docs/measurements/quantization-time.md)
#   whole     the steps of a whole export at true shapes (docs/measurements/quantization-time.md)
#   peer      comparison with llm-compressor (docs/measurements/peers.md); PEER is the Python of its environment
#   answers   the cases in CASES, a folder of `python -m bench.gpu_serving prepare`; run `compare` on it afterwards
#   attention speed of the attention kernels by cache dtype
#   speed     decoding and throughput by recipe (docs/measurements/serving-speed.md); VARIANTS are names of bench/serve_variants.py
#   compiled  the same with Inductor, 90 to 120 s per variant
#   check     `mmq check` of every artifact in CASES, through `vllm serve`
#
# PYTHON: interpreter with mmq's packages. VLLM: interpreter with vllm. SECONDS_EACH: time limit of speed and compiled.
# FlashInfer compiles with nvcc and the CUTLASS headers of its package, which takes 3 minutes the first time.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:?usage: bench/on_gpu.sh OUT PART ...}" && cd "$1" && pwd)
shift
python=${PYTHON:-python3} vllm=${VLLM:-$python} each=${SECONDS_EACH:-1200}
variants=${VARIANTS:-16 bits,w4-humming,w4-humming-cache8-xqa,fp8-vit16-cache8-xqa,fp8-cache8-xqa,w4-vit8,fp8-vit16-cache8,w4a8fp8-cache8}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export VLLM_WORKER_MULTIPROC_METHOD=spawn VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 VLLM_HAS_FLASHINFER_CUBIN=1

kernels() { $python -m pytest -q -p no:cacheprovider tests/test_{kernels,ranges,gptq,awq}.py; }

core() {
  local model=$out/llava-1.5-7b
  rm -rf "$model"
  $python -m bench.random_checkpoint llava-hf--llava-1.5-7b-hf "$model" --device cuda || return
  for recipe in llava-w4-vit8-gptq llava-w4-awq; do
    for terms in --no-terms ""; do # the second process loads the kernels that the first one compiled
      echo "== $recipe, $([[ $terms ]] && echo first || echo second) process"
      $python -m bench.quantize --model "$model" --recipe "bench/recipes/$recipe.yaml" --device cuda $terms
    done
  done
  echo "== blip2-caption-w8-vit4"
  $python -m bench.quantize --header Salesforce--blip2-opt-2.7b --recipe blip2-caption-w8-vit4 --device cuda
}

whole() { $python -m bench.export --recipe llava-w4-vit8 --device cuda; }

peer() {
  $python -m bench.quantize --header llava-hf--llava-1.5-7b-hf --blocks 4 --seeds 1 --only-peer \
    --peer "${PEER:?the Python of an environment with llm-compressor}" --device cuda
}

answers() {
  local names
  names=$(cd "${CASES:?a folder of bench.gpu_serving prepare}" && ls -d -- */ | tr -d /)
  $vllm bench/gpu_replies.py "$CASES" $names
}

attention() { $vllm bench/serve_attention.py; }

speed() {
  local names
  IFS=, read -ra names <<< "$variants"
  $python -m bench.serve "$out/serve${1:+-compiled}" --only "${names[@]}" --python "$vllm" --seconds "$each" \
    --kernels "${names[@]}" "$@"
}

compiled() { speed --compiled --graphs 704 --rounds 6; }

check() {
  for artifact in "${CASES:?a folder of bench.gpu_serving prepare}"/*/artifact; do
    echo "== $artifact"
    $python -m exporter check "$artifact" --device cpu --vllm "$vllm -m vllm.entrypoints.cli.main" -- \
      --gpu-memory-utilization 0.1 --enforce-eager
  done
}

parts=" kernels core whole peer answers attention speed compiled check "
for part in "$@"; do
  [[ $parts == *" $part "* ]] || { echo "unknown part '$part'; use$parts" >&2 && exit 2; }
done
nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1
status=0
for part in "$@"; do
  echo "=== $part, $(date +%T)"
  $part 2>&1 | tee "$out/$part.txt" || status=1
done
exit $status
