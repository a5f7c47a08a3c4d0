#!/bin/sh
# All three sweeps, one after the other; what is complete already is not run again.  Arguments go to each command,
# for example `--set executor.processes=4`.
set -eu
cd "$(dirname "$0")/../.."
: "${ALMLIP_DATA_DIR:?give the folder of the reference data in ALMLIP_DATA_DIR}"
almlip sweep configs/sweep_acac.yaml --out runs/sweep_acac "$@"
almlip sweep configs/sweep_mlearn_si.yaml --out runs/sweep_mlearn_si "$@"
almlip sweep configs/sweep_mlearn_li.yaml --out runs/sweep_mlearn_li "$@"
