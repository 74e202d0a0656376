#!/usr/bin/env bash
# Builds the source distribution and from it the wheel, installs it under a folder of its own, and runs it from outside the
# checkout: preparation, one epoch, recommendations. usage: tools/check_wheel.sh [PYTHON], whose environment has the dependencies.
set -euo pipefail
python=${1:-python}
cd "$(dirname "$0")/.."
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"$python" -m pip install -q --disable-pip-version-check --target "$place/builder" "hatchling>=1.25"
export PYTHONPATH="$place/builder"
"$python" -m hatchling build -t sdist -d "$place/dist"
"$python" -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w "$place/dist" "$place"/dist/*.tar.gz
"$python" -m pip install -q --disable-pip-version-check --no-deps --target "$place/site" "$place"/dist/*.whl
cd "$place"
export PYTHONPATH="$place/site" OMP_NUM_THREADS=1
run() { "$python" "$place/site/bin/next-item" "$@"; }
printf 'include "configs/synthetic-books/sasrec.gin"\ntrain_fn.num_epochs = 1\n' > mine.gin
run prepare --dataset=synthetic-books --synthetic_users=400 --synthetic_items=100 --verbosity=-1 > prepared.txt
run train --gin_config_file=mine.gin --run_dir=run --noreport --verbosity=-1 > trained.txt
run predict --run_dir=run --top_k=3 --output=recs.csv --verbosity=-1
grep -q "^SASRec " trained.txt
[ "$(wc -l < recs.csv)" -gt 1000 ]
echo "the installed wheel prepares, trains and recommends: $(ls dist/*.whl | xargs -n1 basename), $("$python" -V)"
