#!/usr/bin/env bash
# Run a study on a Ray cluster of two hosts: two connected network namespaces of this machine with a shared disk.
#
#   sudo bench/study_ray.sh VENV [kill]
#
# VENV: an environment with mmq and ray. kill: stop the second host while units are quantized; the study must still
# complete. Prints the hosts, the output of `mmq study`, and the hosts of Ray's workers. Needs root and iproute2.
set -euo pipefail
venv="${1:?usage: bench/study_ray.sh VENV [kill]}" lose="${2:-}"
work="$(mktemp -d)"
clean() {
  for host in one two; do
    ip netns pids "mmq-$host" 2>/dev/null | xargs -r kill -9 || true
    ip netns del "mmq-$host" 2>/dev/null || true
  done
  rm -rf "$work"
}
trap clean EXIT
on() { ip netns exec "mmq-$1" env RAY_AUTH_MODE=token RAY_AUTH_TOKEN="$token" RAY_USAGE_STATS_ENABLED=0 "${@:2}"; }
token="$("$venv/bin/python" -c 'import secrets; print(secrets.token_hex(32))')"

ip netns add mmq-one
ip netns add mmq-two
ip link add cable netns mmq-one type veth peer name cable netns mmq-two
ip -n mmq-one addr add 10.77.0.1/24 dev cable
ip -n mmq-two addr add 10.77.0.2/24 dev cable
for host in one two; do
  ip -n "mmq-$host" link set lo up
  ip -n "mmq-$host" link set cable up
done

on one "$venv/bin/ray" start --head --node-ip-address=10.77.0.1 --port=6400 --num-cpus=1 --include-dashboard=false \
  --temp-dir="$work/ray" > /dev/null 2>&1
on two "$venv/bin/ray" start --address=10.77.0.1:6400 --node-ip-address=10.77.0.2 --num-cpus=1 > /dev/null 2>&1
on one "$venv/bin/python" -m exporter study --model demo-llava --bits 3,4,8 --methods gptq --samples 100 \
  --ray 10.77.0.1:6400 --out "$work/study" &
study=$!
for _ in $(seq 120); do
  busy="$(for p in $(pgrep -f 'ray::' || true); do ip netns identify "$p"; done | sort | uniq -c)"
  [ "$(echo "$busy" | wc -l)" -lt 2 ] || break
  sleep 0.5
done
echo "Ray's workers by host:" $busy
if [ "$lose" = kill ]; then
  sleep 3
  ip netns pids mmq-two | xargs -r kill -9
  echo "stopped the second host"
fi
wait "$study"
