#!/bin/sh
# Makes /venv and installs torch and its closure into it: the layer that the trainer, merger and inference images share.
# A wheel laid into deploy/offline/wheels wins; else TORCH_BACKEND names the build (cpu, cu130, …) and uv knows its index.
set -eu
build=$(dirname "$0")
uv() { /mnt/tools/bin/uv "$@"; }

uv venv --quiet --python python3 /venv
if ls "$build"/wheels/torch-*.whl >/dev/null 2>&1; then backend=; else backend="--torch-backend=$TORCH_BACKEND"; fi
uv pip install --python /venv --find-links "$build/wheels" $backend -r "$build/torch.txt"
