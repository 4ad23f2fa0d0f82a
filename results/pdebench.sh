#!/usr/bin/env bash
# The table of the eight PDEBench tasks, solved on the spot, seed 0: about 50 minutes on one CPU core.
# Runs that are there already are not made again.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { # NAME SCRIPT FLAGS...
  local out="runs/pde/$1"
  shift
  [ -e "$out/result.json" ] || python "$@" --out "$out" --overwrite
}
tasks="advection burgers diffusion_reaction_1d diffusion_sorption navier_stokes_1d darcy_2d shallow_water diffusion_reaction_2d"
for task in $tasks; do
  run "$task-orca" orca.py --task $task
  run "$task-pare" pare.py --task $task
done
for task in $tasks; do
  run "$task-nft" orca.py --task $task --align none
  [ -e "runs/pde/$task.csv" ] || python results/baselines.py --task $task --csv "runs/pde/$task.csv"
done
python results/collect.py --csv results/pdebench.csv runs/pde/*/
awk 'FNR > 1 || NR == 1' runs/pde/*.csv > results/pde_baselines.csv
