#!/usr/bin/env bash
# What each choice of PaRe is worth: a series task, an image task and a field, three seeds, simulated
# data and tiny bodies, under two hours on one CPU core. Plain fine-tuning (NFT) and ORCA beside it;
# on satellite and ninapro these, and PaRe as it comes, are runs of results/study.sh as well.
# Runs that are there already are not made again. SEEDS="0 1" makes these alone.
set -euo pipefail
cd "$(dirname "$0")/.."
run() { # NAME SCRIPT FLAGS...
  local out="runs/pare-ablation/$1"
  shift
  [ -e "$out/result.json" ] || python "$@" --out "$out" --overwrite
}
for seed in ${SEEDS:-0 1 2}; do
  for task in satellite ninapro darcy; do
    case $task in # N is 23, 256 and 256; k0 is 70 % of it unless it is given
      satellite) size=1200 epochs=13 full=20 few=8 all=23 ;;
      ninapro) size=540 epochs=8 full=12 few=90 all=256 ;;
      darcy) size=400 epochs=10 full=15 few=90 all=256 ;;
    esac
    setting="--task $task --seed $seed --train-size $size"
    pare="pare.py $setting --epochs $epochs"
    if [ $task = darcy ]; then
      run "$task-default-$seed" $pare
      run "$task-nft-$seed" orca.py $setting --epochs $full --align none
      run "$task-orca-$seed" orca.py $setting --epochs $full
    fi
    for gate in random none; do run "$task-gate-$gate-$seed" $pare --gate $gate; done
    run "$task-gumbel-$seed" $pare --select gumbel
    run "$task-highest-$seed" $pare --replace highest
    run "$task-lam-$seed" $pare --lam k/N
    run "$task-k0-few-$seed" $pare --k0 $few
    run "$task-k0-all-$seed" $pare --k0 $all
    for w in 0.1 1; do run "$task-w-$w-$seed" $pare --mix-weight $w; done
    run "$task-no-labels-$seed" $pare --source-labels off
    run "$task-full-epochs-$seed" pare.py $setting --epochs $full
    # far behind: one seed says enough
    if [ $seed = 0 ]; then run "$task-mix-alone-$seed" $pare --plain-target-loss off; fi
  done
done
python results/collect.py --csv results/pare_ablation.csv --curves results/pare_curves.csv runs/pare-ablation/*/
