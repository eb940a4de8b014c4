#!/usr/bin/env bash
# Lint, types and tests on a fresh machine: makes its own virtual environment and installs all it needs.
#
#   bash tests/run.sh [pytest's arguments]                   tests/constraints.txt: the versions that we develop with, and the peers
#   bash tests/run.sh newest|oldest [pytest's arguments]     tests/constraints-newest.txt, -oldest.txt: tests alone
set -euo pipefail
cd "$(dirname "$0")/.."
lane=main
case "${1:-}" in newest | oldest) lane=$1 && shift ;; esac
if [ "$lane" = main ]; then
    home=.venv-test limits=tests/constraints.txt wanted='.[dev,optimum,bench]'
else
    home=.venv-$lane limits=tests/constraints-$lane.txt wanted='.[dev]'
fi
python3 -m venv "$home"
bin=$PWD/$home/bin
# Modules are compiled when a test first imports them: most are not imported.
unset PYTHONDONTWRITEBYTECODE
install=("$bin/pip" install --quiet --disable-pip-version-check --no-compile -c "$limits")
"${install[@]}" torch
"${install[@]}" -e "$wanted"
# CLIP's vocabulary for the published models' folders; its code and its dependencies are not used.
"${install[@]}" --no-deps open_clip_torch
# A worker for each core, each file in one of them (files share what they make), one thread each.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
test=("$bin/python" -m pytest -n auto --maxprocesses 4 --dist loadfile)
if [ "$lane" = main ]; then
    "$bin/ruff" check .
    "$bin/ruff" format --check .
    "$bin/mypy"
elif [ $# -gt 0 ]; then
    exec "${test[@]}" "$@"
fi
alone=(tests/unit/test_train.py tests/unit/test_teacher_cache.py tests/unit/test_checkpoints.py)
"${test[@]}" "${alone[@]/#/--ignore=}" "$@"
# On their own: once OpenVINO is loaded, a SIGINT that the tests of loop and cached targets raise ends the whole process.
"$bin/python" -m pytest "${alone[@]}"
