#!/usr/bin/env bash
# The table of the README on the default task: about 20 minutes on two CPU cores. Runs that are
# there already are not made again.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -e results/baselines.csv ] || for seed in 0 1 2; do
  python results/baselines.py --task satellite --seed $seed --csv results/baselines.csv
done
run() { # NAME SCRIPT FLAGS...
  local out="runs/table/$1"
  shift
  [ -e "$out/result.json" ] || python "$@" --out "$out" --overwrite
}
for seed in 0 1 2; do
  run "pare-$seed" pare.py --task satellite --seed $seed
  run "orca-$seed" orca.py --task satellite --seed $seed
  run "nft-$seed" orca.py --task satellite --seed $seed --align none
done
python results/collect.py --csv results/satellite.csv runs/table/*
