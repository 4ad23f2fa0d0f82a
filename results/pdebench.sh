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
# The longer runs, half an hour in all:
# python orca.py --task darcy_2d --train-size 3000 --epochs 30 --out runs/pde-long/darcy_2d-orca
# python orca.py --task diffusion_reaction_1d --train-size 4000 --epochs 40 --out runs/pde-long/diffusion_reaction_1d-orca
# python orca.py --task advection --train-size 4000 --epochs 40 --out runs/pde-long/advection-orca
# python results/collect.py --csv results/pde_long.csv runs/pde-long/*/
