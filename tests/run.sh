#!/usr/bin/env bash
# Lint, types and tests on a fresh machine: makes its own virtual environment (.venv-test) and installs all it needs.
set -euo pipefail
cd "$(dirname "$0")/.."
python3 -m venv .venv-test
bin=$PWD/.venv-test/bin
"$bin/pip" install --quiet --disable-pip-version-check -c tests/constraints.txt torch
"$bin/pip" install --quiet --disable-pip-version-check -c tests/constraints.txt -e '.[dev,optimum,bench]'
# CLIP's vocabulary for the published models' folders; its code and its dependencies are not used.
"$bin/pip" install --quiet --disable-pip-version-check -c tests/constraints.txt --no-deps open_clip_torch
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/python" -m pytest --ignore tests/unit/test_train.py --ignore tests/unit/test_targets.py "$@"
# On their own: once OpenVINO is loaded, a SIGINT that the tests of loop and cached targets raise ends the whole process.
"$bin/python" -m pytest tests/unit/test_train.py tests/unit/test_targets.py
