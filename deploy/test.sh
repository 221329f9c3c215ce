#!/usr/bin/env bash
# Runs the named levels, each with its time, and says at the end what was skipped and why.
# Usage: deploy/test.sh [lint] [unit] [contract] [integration] [e2e] [gpu]
# Every level runs even when an earlier one failed; the exit code is 1 if any did.
set -uo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
report=$(mktemp -d)
trap 'rm -rf "$report"' EXIT
failed=()
times=()

lint() {
    ruff check . && ruff format --check . && lint-imports && mypy libs/*/src && mypy services/*/src cli/src
}

run_level() {
    local level=$1 started=$SECONDS
    printf '\n== %s ==\n' "$level"
    if [ "$level" = lint ]; then
        lint
    elif [ -n "$(find "tests/$level" -name 'test_*.py' -print -quit)" ]; then
        local workers=() # unit tests share nothing; the others start servers and use every core themselves
        [ "$level" != unit ] || workers=(-n "$(nproc)" --dist loadfile)
        python -m pytest "tests/$level" -q --durations=5 --junitxml="$report/$level.xml" "${workers[@]}"
    else
        echo "no tests at this level"
    fi || failed+=("$level")
    times+=("$(printf '%-12s %5d s' "$level" $((SECONDS - started)))")
}

for level in "$@"; do run_level "$level"; done

printf '\n== times ==\n'
printf '%s\n' "${times[@]}"
python deploy/skips.py "$report"
if [ ${#failed[@]} -gt 0 ]; then
    printf 'FAILED: %s\n' "${failed[*]}"
    exit 1
fi
