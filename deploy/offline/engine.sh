#!/usr/bin/env bash
# Makes a Docker engine answer, and later stops it again if and only if this script started it.
# Usage: engine.sh start | stop | status
# Environment: SAGE_DOCKER_DATA_ROOT  where images are kept (default: the engine's own default)
#              SAGE_OFFLINE_STATE     what was started, and its log (default: ~/.local/state/sage-offline)
set -euo pipefail
topic=engine
source "$(dirname "$0")/host.sh"

state=${SAGE_OFFLINE_STATE:-${XDG_STATE_HOME:-$HOME/.local/state}/sage-offline}
started=$state/engine-started
log=$state/dockerd.log
ready_timeout_s=90

answers() { docker info >/dev/null 2>&1; }
# A pid alone may have been given to another process since; its start time makes it unique.
start_time_of() { awk '{print $22}' "/proc/$1/stat" 2>/dev/null; }

install_engine() {
    command -v dockerd >/dev/null && command -v docker >/dev/null && return
    install_packages docker.io
}

launch() {
    if [ -d /run/systemd/system ] && systemctl cat docker.service >/dev/null 2>&1; then
        as_root systemctl start docker
        echo systemd >"$started"
        return
    fi
    [ "$(id -u)" = 0 ] || die "no engine answers and only root can start dockerd by hand; start it, or run this as root"
    setsid dockerd ${SAGE_DOCKER_DATA_ROOT:+--data-root "$SAGE_DOCKER_DATA_ROOT"} >"$log" 2>&1 </dev/null &
    echo "$! $(start_time_of $!)" >"$started"
}

wait_until_it_answers() {
    local deadline=$((SECONDS + ready_timeout_s)) pid
    until answers; do
        read -r pid _ <"$started"
        if [ "$pid" != systemd ] && [ ! -d "/proc/$pid" ]; then
            tail -20 "$log" >&2
            rm -f "$started"
            die "dockerd stopped while starting (whole log: $log)"
        fi
        [ "$SECONDS" -lt "$deadline" ] || die "dockerd did not answer within $ready_timeout_s s (log: $log)"
        sleep 0.5
    done
}

start() {
    mkdir -p "$state"
    if answers; then
        say "already running, version $(docker version --format '{{.Server.Version}}')"
        return
    fi
    install_engine
    answers || { launch; wait_until_it_answers; }
    say "started, version $(docker version --format '{{.Server.Version}}')"
}

stop() {
    local pid born
    [ -f "$started" ] || { say "not started from here, left alone"; return; }
    read -r pid born <"$started"
    rm -f "$started"
    if [ "$pid" = systemd ]; then
        as_root systemctl stop docker.socket docker
    elif [ -n "$born" ] && [ "$(start_time_of "$pid")" = "$born" ]; then
        kill "$pid"
        local deadline=$((SECONDS + 60))
        while [ -d "/proc/$pid" ] && [ "$SECONDS" -lt "$deadline" ]; do sleep 0.5; done
        [ ! -d "/proc/$pid" ] || die "dockerd (pid $pid) is still stopping after 60 s"
    fi
    say "stopped"
}

case ${1:-} in
    start) start ;;
    stop) stop ;;
    status) if answers; then say "running"; else say "not running"; exit 1; fi ;;
    *) die "usage: engine.sh start | stop | status" ;;
esac
