#!/usr/bin/env bash
# Does alignment harm 1D fields? On three tasks of results/all_tasks.py: five more seeds of NFT and ORCA (otdd), eight of
# ORCA with alignment in smaller steps (1e-4 instead of 1e-3), and once one whose steps do nothing (1e-9): what differs
# from NFT then is chance. And larger steps on images, once. About 25 minutes on one CPU core. Runs that are there
# already are not made again. TASKS="burgers" makes these alone.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { # NAME FLAGS...
  local out="runs/align-lr/$1"
  shift
  [ -e "$out/result.json" ] || python orca.py "$@" --out "$out" --overwrite
}
for task in ${TASKS:-diffusion_reaction_1d burgers advection}; do
  for seed in 0 1 2 3 4 5 6 7; do
    setting="--task $task --train-size 200 --seed $seed --align-samples 192"
    run "$task-1e-4-$seed" $setting --align-lr 1e-4
    [ $seed -lt 3 ] && run "$task-1e-9-$seed" $setting --align-lr 1e-9
    [ $seed -lt 3 ] || run "$task-nft-$seed" $setting --align none
    [ $seed -lt 3 ] || run "$task-1e-3-$seed" $setting
  done
done
[ -n "${TASKS:-}" ] || run spherical-1e-3-0 --task spherical --align-lr 1e-3
python results/collect.py --csv results/align_lr.csv runs/align-lr/*/
