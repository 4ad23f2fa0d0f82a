#!/usr/bin/env bash
# The long form of the fault tests: 60 kills of single processes, 15 of pairs, 5000 damaged pickles, 200
# random inputs of otdd and mmd; the short form is in the default test run. Under an hour on one CPU core.
set -euo pipefail
cd "$(dirname "$0")/.."
KILLS=20 pytest --junit-xml=runs/kills.xml tests/test_run.py -k killed
pytest --junit-xml=runs/faults.xml tests/test_run.py tests/test_faults.py tests/test_otdd.py tests/test_mmd.py -k "not killed"
python results/faults.py runs/kills.xml runs/faults.xml --csv results/faults.csv
