#!/usr/bin/env bash
# Gives the docker command its compose and buildx plugins, from the distribution's own packages.
# Debian 12 has neither; those of Debian 13 are static enough to run on it, so they are unpacked beside the command
# instead of being installed, and the machine's package sources stay as they are.
# Usage: plugins.sh
set -euo pipefail
topic=plugins
source "$(dirname "$0")/host.sh"

donor_suite=trixie
plugins=${DOCKER_CONFIG:-$HOME/.docker}/cli-plugins

have_both() { docker compose version >/dev/null 2>&1 && docker buildx version >/dev/null 2>&1; }

unpack_from_donor_suite() {
    local mirror
    mirror=$(debian_mirror)
    [ -n "$mirror" ] || { apt-get update -qq; mirror=$(debian_mirror); }
    [ -n "$mirror" ] || die "this machine has no Debian package source; install Docker's compose (v2) and buildx plugins by hand"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    chmod 755 "$work" # apt drops to an unprivileged user to download
    mkdir -p "$work/lists/partial" "$work/parts" "$work/debs" "$work/root" "$work/archives/partial"
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n' \
        "$mirror" "$donor_suite" /usr/share/keyrings/debian-archive-keyring.gpg >"$work/parts/donor.sources"
    local apt_options=(-qq -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$work/parts"
        -o Dir::State::Lists="$work/lists" -o Dir::Cache::Archives="$work/archives"
        -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root)
    apt-get "${apt_options[@]}" update
    (cd "$work/debs" && apt-get "${apt_options[@]}" download docker-compose docker-buildx)
    local deb
    for deb in "$work"/debs/*.deb; do dpkg -x "$deb" "$work/root"; done
    mkdir -p "$plugins"
    # Whole or not at all: a half-copied plugin would look installed to the next run.
    local plugin
    for plugin in "$work"/root/usr/libexec/docker/cli-plugins/*; do
        install -m 755 "$plugin" "$plugins/.$(basename "$plugin").new"
        mv "$plugins/.$(basename "$plugin").new" "$plugins/$(basename "$plugin")"
    done
}

if ! have_both; then
    command -v apt-get >/dev/null || die "no apt-get here; install Docker's compose (v2) and buildx plugins by hand"
    say "unpacking compose and buildx from Debian $donor_suite"
    unpack_from_donor_suite
    have_both || die "the unpacked plugins in $plugins do not run with this docker command"
fi
say "compose $(docker compose version --short), $(docker buildx version | cut -d' ' -f2)"
