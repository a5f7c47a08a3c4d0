#!/bin/sh
# Pool and tests, the sweep, figures and tables; what is complete already is not run again.  Arguments go to the sweep,
# for example `--set executor.processes=4` or `--only seed=0`.
set -eu
cd "$(dirname "$0")/../.."
: "${ALMLIP_DATA_DIR:?give the folder of the reference data in ALMLIP_DATA_DIR}"
python experiments/unlike_pool/split.py --data "$ALMLIP_DATA_DIR" --out runs/unlike_pool
almlip sweep configs/sweep_carbon24.yaml --set folder=runs/unlike_pool --out runs/sweep_carbon24 "$@"
almlip figure all runs/sweep_carbon24/results.csv --out runs/sweep_carbon24/figures
