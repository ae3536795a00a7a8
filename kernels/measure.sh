#!/bin/sh
# What a GPU says of these kernels: their tests once, then every timing, at most MINUTES of all that at a time.
#
#   kernels/measure.sh FOLDER [MINUTES]                       again with the same FOLDER while it exits with 3
#   python -m broadbeam_kernels report FOLDER/rows.jsonl      afterwards, in any checkout
#
# Needs torch, triton and pytest; takes pytest-xdist, DeepGEMM, FlashInfer and matplotlib where they are.
# PYTHON names the interpreter.
set -u
folder=${1:?usage: kernels/measure.sh FOLDER [MINUTES]}
seconds=$((${2:-8} * 60))
began=$(date +%s)
python=${PYTHON:-python3}
mkdir -p "$folder" && folder=$(cd "$folder" && pwd) && cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"

run_tests() { # the project's own options ask for plugins that a GPU machine need not have
  "$python" -m pytest -c /dev/null --rootdir . --import-mode=importlib -p no:cacheprovider -q -m gpu "$@"
}

if [ ! -e "$folder/tests.txt" ]; then
  workers=$("$python" -c 'import xdist; print("-n8")' 2>/dev/null)
  # Huge tensors one at a time: eight workers' would not fit.
  run_tests $workers tests/kernels --ignore tests/kernels/test_huge.py >"$folder/tests.part" 2>&1
  run_tests tests/kernels/test_huge.py >>"$folder/tests.part" 2>&1
  mv "$folder/tests.part" "$folder/tests.txt"
fi
grep -E '^(FAILED|ERROR)|(passed|failed|error|skipped).* in ' "$folder/tests.txt"

left=$((seconds - $(date +%s) + began))
"$python" -m broadbeam_kernels bench --minutes "$((left / 60))" --run "$folder/rows.jsonl" --page "$folder/kernels.md"
