#!/usr/bin/env bash
# Writes one pinned requirements file per image and one for the embedded stack from the pyprojects and pins.txt.
# Usage: deploy/requirements/lock.sh [--upgrade]   (needs uv; run through `make lock`)
set -euo pipefail
cd "$(dirname "$0")/../.."
out=deploy/requirements

compile() { # NAME DIR...: the third-party closure of the given local distributions
    local name=$1 in
    shift
    in=$(mktemp ./lock-XXXXXX.in)
    printf './%s\n' "$@" >"$in"
    uv pip compile "$in" -o "$out/$name.tmp" -c "$out/pins.txt" --universal --python-version 3.11 --quiet \
        --no-header --no-annotate --no-emit-index-url --no-emit-find-links ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} \
        || { rm -f "$in"; exit 1; }
    rm -f "$in"
    {
        echo "# Written by 'make lock' from pins.txt and the pyprojects of: $*"
        grep -v '^\./' "$out/$name.tmp" | sed 's/^torch==\([0-9.]*\)+[a-z0-9]*/torch==\1/'
    } >"$out/$name.txt"
    rm "$out/$name.tmp"
}

base=(libs/contracts libs/servicekit)
compile orchestrator "${base[@]}" libs/finetune services/orchestrator
compile gateway "${base[@]}" libs/chat libs/retrieval services/gateway
compile trainer "${base[@]}" 'libs/finetune[train,wandb]' services/trainer
compile merger "${base[@]}" 'libs/finetune[train,wandb]' services/merger # as the trainer's: one image layer for both
compile inference "${base[@]}" services/inference
compile cli libs/contracts libs/finetune cli
compile embedded "${base[@]}" 'libs/finetune[train,wandb]' libs/chat libs/retrieval services/orchestrator services/trainer \
    services/merger 'services/inference[transformers]' services/gateway cli

for group in dev:dev tensorboard:tensorboard build:build; do
    name=${group%%:*}
    uv pip compile --group "pyproject.toml:${group##*:}" -o "$out/$name.tmp" -c "$out/pins.txt" -c "$out/embedded.txt" \
        --universal --python-version 3.11 --quiet --no-header --no-annotate --no-emit-index-url --no-emit-find-links
    { echo "# Written by 'make lock' from the ${group##*:} group of pyproject.toml"; cat "$out/$name.tmp"; } >"$out/$name.txt"
    rm "$out/$name.tmp"
done
