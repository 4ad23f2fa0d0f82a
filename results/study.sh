#!/usr/bin/env bash
# The study that took ORCA apart (slides 12 to 21), replayed on simulated data with the tiny bodies:
# a series and an image task, three seeds, about an hour and a half on one CPU core.
# Runs that are there already are not made again. SEEDS="0 1" makes these alone.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { # NAME SCRIPT FLAGS...
  local out="runs/study/$1"
  shift
  [ -e "$out/result.json" ] || python "$@" --out "$out" --overwrite
}
for seed in ${SEEDS:-0 1 2}; do
  for task in ninapro satellite; do
    case $task in
      satellite) setting="--train-size 1200 --epochs 20" pare=13 sources="code noise" bodies="tiny_roberta_10pct tiny_roberta_1pct random:tiny_roberta" ;;
      ninapro) setting="--train-size 540 --epochs 12" pare=8 sources="textures noise" bodies="random:tiny_swin" ;;
    esac
    orca="orca.py --task $task --seed $seed $setting"
    run "$task-none-$seed" $orca --align none
    run "$task-otdd-$seed" $orca
    for source in $sources; do run "$task-source-$source-$seed" $orca --source $source; done  # figure 5
    for part in embedder body both; do run "$task-freeze-$part-$seed" $orca --freeze $part; done  # figure 7
    for body in $bodies; do run "$task-body-${body//:/-}-$seed" $orca --body $body; done  # figure 8
    for epochs in 5 60; do run "$task-align-$epochs-$seed" $orca --align-epochs $epochs; done  # figure 6
    run "$task-pare-$seed" pare.py --task $task --seed $seed ${setting%--epochs*} --epochs $pare  # figure 9
    run "$task-classwise-$seed" $orca --align otdd-classwise
  done
done
python results/collect.py --csv results/study.csv --curves results/study_curves.csv runs/study/*/
python results/collect.py --csv results/study.csv --steps results/study_steps.csv runs/study/ninapro-{none,otdd,pare}-*/
