#!/usr/bin/env bash
# Everything that needs a GPU, in two parts of at most eight minutes each:
#     bash results/gpu.sh --part 1      tests, steps at the papers' sizes, peers, runs
#     bash results/gpu.sh --part 2      rows of the table of all tasks
#     bash results/gpu.sh --tiny --device cpu      does the script itself run? both parts, tiny
# It needs what requirements.txt lists, pytest-xdist, and for its peers geomloss and flash-sinkhorn,
# installed or on PYTHONPATH. Each command ends within its limit of time, and a failed one does not
# keep the others from running; the exit code is 1 if one failed. All rows and logs go to $OUT,
# by default this folder. A command that is done, as gpu_done.txt there (or here) says, is left out
# when the script is started again.
set -u
cd "$(dirname "$0")/.." || exit 2
export OUT=${OUT:-$PWD/results} PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
device=cuda part="" tiny=""
while [ $# -gt 0 ]; do
    case $1 in
        --part) part=$2; shift 2 ;;
        --device) device=$2; shift 2 ;;
        --tiny) tiny=1; shift ;;
        *) echo "gpu.sh: error: unknown argument $1" >&2; exit 2 ;;
    esac
done
end=$((SECONDS + ${BUDGET:-470})) failed=0 runs=runs/gpu jobs=8
mkdir -p "$OUT"
for file in results/gpu_*.{csv,txt}; do
    if [ -e "$file" ] && [ ! -e "$OUT/${file##*/}" ]; then cp "$file" "$OUT"; fi
done

step() {  # NAME LIMIT COMMAND...: within LIMIT seconds and what is left; once
    local name=$1 limit=$2 left=$((end - SECONDS)) code start=$SECONDS
    shift 2
    if grep -qx "$name" "$OUT/gpu_done.txt" 2>/dev/null; then echo "== $name: done before"; return; fi
    [ "$limit" -gt "$left" ] && limit=$left
    if [ "$limit" -lt 5 ]; then echo "== $name: no time left"; failed=1; return; fi
    echo "== $name: at most $limit s"
    timeout -k 5 "$limit" "$@" 2>&1 | tee -a "$OUT/gpu.log" | tail -n 60
    code=${PIPESTATUS[0]}
    echo "== $name: exit code $code after $((SECONDS - start)) s"
    if [ $code = 0 ]; then echo "$name" >> "$OUT/gpu_done.txt"; else failed=1; fi
}

runs_of() {  # SIZE...: every script on two tasks in two precisions, several at a time
    for task in satellite darcy; do
        for precision in fp32 bf16; do
            for script in orca pare proposed; do
                [ -n "$tiny" ] && [ $script-$task-$precision != pare-satellite-fp32 ] && continue
                echo "$script.py --task $task --precision $precision" \
                    "--out $runs/$script-$task-$precision"
            done
        done
    done | OMP_NUM_THREADS=1 xargs -P "$jobs" -I{} sh -c \
        "timeout --foreground -k 5 100 python {} --device $device --overwrite $* > /dev/null || echo failed: {}"
    PYTHONPATH=results:${PYTHONPATH:-} python - "$OUT/gpu_runs.csv" "$device" <<'END'
import json
import sys
from pathlib import Path

from bench_gpu import add, hardware

path, name, shown = Path(sys.argv[1]), hardware(sys.argv[2]), ("method", "task", "precision")
path.unlink(missing_ok=True)
for file in sorted(Path("runs/gpu").glob("*/result.json")):
    result = json.loads(file.read_text(encoding="utf-8"))
    row = {key: result[key] for key in (*shown, "test_error", "val_error", "epochs", "time_s")}
    add(row | {"hardware": name}, path)
    print(*row.values())
END
}

hardware() {
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv 2>/dev/null
    python -c 'import os, sys, torch; print(sys.version, torch.__version__, os.cpu_count(), "cores")'
}

[ -n "$tiny" ] && jobs=1
export -f runs_of hardware
export device jobs runs tiny
step hardware 60 bash -c hardware
if [ "$part" != 2 ] && [ -n "$tiny" ]; then
    step tests 60 python -m pytest -m gpu -p no:nbval -o addopts= -q tests/test_mmd.py
    step steps 60 python results/bench_gpu.py --tiny --device "$device" --steps 1 --batch 2 \
        --tasks satellite --methods orca --variants fp32 --csv "$OUT/gpu_steps.csv"
    step peers 30 python results/bench_peers.py --device "$device" --sizes 100 \
        --csv "$OUT/gpu_peers.csv"
    step runs 60 bash -c "runs_of --train-size 32 --epochs 1 --source-size 64"
elif [ "$part" != 2 ]; then
    # shellcheck disable=SC2046 (one word for each file)
    step tests 190 python -m pytest -m gpu -p no:nbval -o addopts= -n 6 --tb=short -v -rf \
        --continue-on-collection-errors $(grep -l mark.gpu tests/*.py)
    step steps 130 python results/bench_gpu.py --device "$device" --steps 10 --seconds 100 \
        --tasks satellite cifar100 darcy --csv "$OUT/gpu_steps.csv"
    step peers 60 python results/bench_peers.py --device "$device" --seconds 45 \
        --csv "$OUT/gpu_peers.csv"
    step runs 120 bash -c "runs_of --steps 400"
fi
if [ "$part" != 1 ]; then
    seconds=400
    [ -n "$tiny" ] && seconds=5
    step all_tasks $((seconds + 60)) python results/all_tasks.py --jobs "$jobs" \
        --device "$device" --seconds $seconds --csv "$OUT/gpu_all_tasks.csv"
fi
exit $failed
