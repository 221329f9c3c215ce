# What the scripts beside this file ask of the machine they run on. Sourced, never run; the caller sets $topic.

say() { printf '%s: %s\n' "$topic" "$*"; }
die() { printf '%s: %s\n' "$topic" "$*" >&2; exit 1; }
as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

install_packages() { # PACKAGE...
    local log
    command -v apt-get >/dev/null || die "no apt-get here; install by hand: $*"
    log=$(mktemp)
    say "installing $*"
    if ! { as_root apt-get update -qq && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$@"; } >"$log" 2>&1; then
        tail -20 "$log" >&2
        die "apt-get could not install $* (whole log: $log)"
    fi
    rm -f "$log"
}

# The first Debian repository that this machine itself uses: mirrors and proxies are already right there.
# Empty where the machine has none.
debian_mirror() {
    apt-get indextargets --format '$(LABEL) $(REPO_URI)' 'Created-By: Packages' | awk '$1 == "Debian" {print $2; exit}'
}
