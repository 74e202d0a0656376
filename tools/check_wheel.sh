#!/usr/bin/env bash
# Builds the source distribution and from it the wheel, and runs that from outside the checkout under each Python: preparation,
# one epoch, recommendations. usage: tools/check_wheel.sh [PYTHON...], whose environments have the dependencies.
set -euo pipefail
[ $# -gt 0 ] || set -- python
cd "$(dirname "$0")/.."
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"$1" -m pip install -q --disable-pip-version-check --target "$place/builder" "hatchling>=1.25"
PYTHONPATH=$place/builder "$1" -m hatchling build -t sdist -d "$place/dist"
PYTHONPATH=$place/builder "$1" -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w "$place/dist" \
  "$place"/dist/*.tar.gz
printf 'include "configs/synthetic-books/sasrec.gin"\ntrain_fn.num_epochs = 1\n' > "$place/mine.gin"
export OMP_NUM_THREADS=1
for python in "$@"; do
  folder=$(mktemp -d -p "$place")
  "$python" -m pip install -q --disable-pip-version-check --no-deps --target "$folder/site" "$place"/dist/*.whl
  run() { (cd "$folder" && PYTHONPATH=$folder/site "$python" "$folder/site/bin/next-item" "$@"); }
  run prepare --dataset=synthetic-books --synthetic_users=400 --synthetic_items=100 --verbosity=-1 > "$folder/prepared.txt"
  run train --gin_config_file=../mine.gin --run_dir=run --noreport --verbosity=-1 > "$folder/trained.txt"
  run predict --run_dir=run --top_k=3 --output=recs.csv --verbosity=-1
  grep -q "^SASRec " "$folder/trained.txt"
  [ "$(wc -l < "$folder/recs.csv")" -gt 1000 ]
  echo "the installed wheel prepares, trains and recommends: $(basename "$place"/dist/*.whl), $("$python" -V)"
done
