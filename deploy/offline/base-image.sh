#!/usr/bin/env bash
# Makes sure that the Python base image of every Dockerfile here can be used:
# the image itself where it is present or can be pulled, else a stand-in of the same name made from Debian packages.
# A stand-in carries the certificates that this machine trusts, so that builds on it reach what this machine reaches.
# Wheels that pip finds here through PIP_FIND_LINKS are laid into deploy/offline/wheels, where the image builds look first.
# Usage: base-image.sh
# Environment: PYTHON_IMAGE (default python:3.11-slim-bookworm), PIP_CERT or SSL_CERT_FILE, PIP_FIND_LINKS
set -euo pipefail
topic="base image"
source "$(dirname "$0")/host.sh"

here=$(cd "$(dirname "$0")" && pwd)
image=${PYTHON_IMAGE:-python:3.11-slim-bookworm}
suite=bookworm # its python3 is 3.11
label=org.sage.standin
pull_timeout_s=60


lay_wheels() {
    local source wheel
    for source in ${PIP_FIND_LINKS:-}; do
        [ -d "$source" ] || continue # an address: the builder inside the image would need it, not a copy
        for wheel in "$source"/*.whl; do
            [ -f "$wheel" ] || continue
            cmp -s "$wheel" "$here/wheels/$(basename "$wheel")" && continue
            cp "$wheel" "$here/wheels/.new" && mv "$here/wheels/.new" "$here/wheels/$(basename "$wheel")"
            say "laid $(basename "$wheel") into deploy/offline/wheels"
        done
    done
}

trusted_certificates() {
    local file
    for file in "${PIP_CERT:-}" "${SSL_CERT_FILE:-}" /etc/ssl/certs/ca-certificates.crt; do
        if [ -n "$file" ] && [ -f "$file" ]; then readlink -f "$file"; return; fi
    done
    die "no certificate bundle found; set SSL_CERT_FILE"
}

make_stand_in() { # CERTIFICATES INPUTS_HASH
    command -v mmdebstrap >/dev/null || install_packages mmdebstrap
    local archive log
    archive=$(mktemp --suffix=.tar)
    log=$(mktemp)
    trap 'rm -f "$archive" "$log"' RETURN
    as_root mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --customize-hook="copy-in $1 /tmp" \
        --customize-hook="mv \"\$1/tmp/$(basename "$1")\" \"\$1/etc/ssl/certs/ca-certificates.crt\"" \
        --customize-hook='rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*.bin "$1"/var/log/*' \
        "$suite" "$archive" $(debian_mirror) >"$log" 2>&1 || { tail -20 "$log" >&2; die "mmdebstrap failed"; }
    local certificates=/etc/ssl/certs/ca-certificates.crt
    docker import --change "LABEL $label=$2" --change 'CMD ["python3"]' --change 'ENV LANG=C.UTF-8' \
        --change "ENV PIP_CERT=$certificates" --change "ENV SSL_CERT_FILE=$certificates" \
        --message 'stand-in for the public Python image' "$archive" "$image" >/dev/null
}

lay_wheels
certificates=$(trusted_certificates)
inputs_hash=$(cat "$0" "$certificates" | sha256sum | cut -c1-16)
if present=$(docker image inspect --format "{{index .Config.Labels \"$label\"}}" "$image" 2>/dev/null); then
    # No label: the public image itself.
    [ -n "$present" ] || { say "$image is present"; exit 0; }
    [ "$present" != "$inputs_hash" ] || { say "the stand-in for $image is present and current"; exit 0; }
elif timeout "$pull_timeout_s" docker pull --quiet "$image" >/dev/null 2>&1; then
    say "pulled $image"
    exit 0
fi
say "$image cannot be pulled; making a stand-in from Debian $suite"
SECONDS=0
make_stand_in "$certificates" "$inputs_hash"
say "made in $SECONDS s, $(docker image inspect --format '{{.Size}}' "$image" | awk '{printf "%.0f MB", $1 / 1e6}')"
