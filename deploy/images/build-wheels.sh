#!/bin/sh
# Makes wheels of local distributions into /dist, without reaching out: the build backend is in the tools stage.
# Usage: build-wheels.sh DIR...
set -eu
for distribution in "$@"; do
    /mnt/tools/bin/uv build --quiet --wheel --no-build-isolation --python /mnt/tools/bin/python --out-dir /dist "$distribution"
done
