#!/bin/bash
# One health probe that starts no Python: probes run every few seconds in every container, for as long as it lives.
# Usage: sage-healthy http PORT PATH     is answered with 200
#        sage-healthy alive FILE         was touched within the last 30 seconds
case $1 in
    http)
        exec 3<>"/dev/tcp/127.0.0.1/$2" || exit 1
        printf 'GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n' "$3" >&3
        read -r -t 4 _ status _ <&3
        [ "$status" = 200 ]
        ;;
    alive)
        touched=$(stat -c %Y "$2") && [ $((EPOCHSECONDS - touched)) -lt 30 ]
        ;;
    *) exit 2 ;;
esac
