#!/usr/bin/env bash
# Slide 23: the loss around the solutions of naive fine-tuning, ORCA and PaRe, which start from the same
# weights and take the same number of steps. Five seeds, about half an hour on one CPU core.
# Runs that are there already are not made again. SEEDS="0 1" makes these alone.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { # NAME SCRIPT FLAGS...
  local out="runs/landscape/$1"
  shift
  [ -e "$out/result.json" ] || python "$@" --out "$out" --overwrite
}
for seed in ${SEEDS:-0 1 2 3 4}; do
  setting="--task satellite --train-size 600 --epochs 15 --seed $seed"
  run "nft-$seed" orca.py $setting --align none
  run "orca-$seed" orca.py $setting
  run "pare-$seed" pare.py $setting
done
python results/landscape.py runs/landscape/*/ --csv results/landscape.csv
