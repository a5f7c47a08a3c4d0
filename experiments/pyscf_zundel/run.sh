#!/usr/bin/env bash
# The main job's config with PBE/def2-SVP (PySCF, density fitting) as the label source, on a small budget.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
almlip run "$here/../../configs/zundel.yaml" --run-dir "${1:-runs/pyscf}" \
  --set "oracle={kind: pyscf}" \
  --set "initial={rattle: {count: 8, stdev: 0.08}}" \
  --set "test={md: [{temperature: 300, steps: 20, every: 2, equilibration: 0, timestep: 1.0}]}" \
  --set selection.batch=8 --set stopping.max_labels=32 --set training.max_steps=2000 --set exploration.steps=1000
