#!/bin/sh
# Everything that needs a GPU: the tests marked cuda, then the benchmarks that run on one.
#   sh benchmarks/gpu.sh          from the checkout, in its environment
set -e
cd "$(dirname "$0")/.."
python -m pytest -n0 -q -m cuda tests
for name in training_step memory loading; do
    python "benchmarks/$name.py" --device cuda
done
