#!/usr/bin/env bash
# The table of the ten NAS-Bench-360 tasks, simulated data, seed 0: about an hour on one CPU core.
# Runs that are there already are not made again.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { # NAME SCRIPT FLAGS...
  local out="runs/nas/$1"
  shift
  [ -e "$out/result.json" ] || python "$@" --out "$out" --overwrite
}
for task in ninapro cifar100 spherical darcy psicov cosmic fsd50k ecg deepsea satellite; do
  body=tiny_swin
  case $task in ecg | satellite | deepsea) body=tiny_roberta ;; esac
  run "$task-nft" orca.py --task $task --align none
  run "$task-orca" orca.py --task $task
  run "$task-pare" pare.py --task $task
  run "$task-scratch" orca.py --task $task --align none --body random:$body
  [ -e "runs/nas/$task.csv" ] || python results/baselines.py --task $task --csv "runs/nas/$task.csv"
done
python results/collect.py --csv results/nas_bench.csv runs/nas/*/
awk 'FNR > 1 || NR == 1' runs/nas/*.csv > results/nas_baselines.csv
