#!/usr/bin/env bash
# Real data, files of one's own: satellite series (the UCR archive's Crop) as crop.npz and Darcy flow (16 x 16, of
# the neuraloperator project) as darcy16.npz, both in the project's root; three seeds, about 30 minutes on one CPU
# core. Runs that are there already are not made again. SEEDS="0" makes these alone.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { # NAME SCRIPT FLAGS...
  local out="runs/real/$1"
  shift
  [ -e "$out/result.json" ] || python "$@" --out "$out" --overwrite
}
for seed in ${SEEDS:-0 1 2}; do
  for task in crop darcy16; do
    case $task in
      crop) size=1200 body=tiny_roberta ;;
      darcy16) size=500 body=tiny_swin ;;
    esac
    setting="--task $task.npz --train-size $size --seed $seed"
    run "$task-nft-$seed" orca.py $setting --align none
    run "$task-orca-$seed" orca.py $setting
    run "$task-pare-$seed" pare.py $setting --epochs 13
    run "$task-proposed-$seed" proposed.py $setting --epochs 18
    run "$task-scratch-$seed" orca.py $setting --align none --body random:$body
    [ -e "runs/real/$task-$seed.csv" ] || python results/baselines.py $setting --csv "runs/real/$task-$seed.csv"
  done
done
python results/collect.py --csv results/real.csv runs/real/*/
awk 'FNR > 1 || NR == 1' runs/real/*.csv > results/real_baselines.csv
