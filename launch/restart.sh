#!/usr/bin/env bash
# Run a command, and run it again whenever it ends, until it says that it is done or that a person must look.
#
#     launch/restart.sh python -m neo.train --config=configs/neo_7b.py --workdir=gs://bucket/neo_7b
#
# Exit codes of neo (docs/troubleshooting.md): 0 done, 2 wrong input, 3 somebody must look: these end it. Every other code
# (75 saved and stopped from outside, 1 a bug, 130, a signal) starts the same command again, which goes on from the newest
# checkpoint. SIGTERM and Ctrl-C are passed on, and end it once the command has ended: that is how to stop a run.
#
# A command that fails soon after its start is started again later and later:
#   NEO_RESTART_SECONDS       first pause (10)
#   NEO_RESTART_MOST_SECONDS  longest pause (300)
#   NEO_RESTART_SOON_SECONDS  a run that lasted longer than this begins with the first pause again (600)
# All three are ours; the first is short because a cluster of processes waits only train.join_seconds (300) for each other.
set -u

if [ $# -eq 0 ]; then
    echo "usage: launch/restart.sh COMMAND [ARGUMENT...]" >&2
    exit 2
fi

first=${NEO_RESTART_SECONDS:-10}
most=${NEO_RESTART_MOST_SECONDS:-300}
soon=${NEO_RESTART_SOON_SECONDS:-600}
pause=$first
child=
stopping=
signalled=

pass_on() {
    stopping=$1
    signalled=1
    [ -n "$child" ] && kill -s "$1" "$child" 2>/dev/null
}
trap 'pass_on TERM' TERM
trap 'pass_on INT' INT

# `wait` returns early when a signal comes; the second one gives the exit code of the child.
await() {
    while :; do
        signalled=
        wait "$child"
        code=$?
        [ -n "$signalled" ] || break
    done
    child=
}

while :; do
    began=$SECONDS
    # Not in the background as a shell would have it: there Ctrl-C is ignored by the command and all it starts.
    (trap - INT TERM; exec "$@") &
    child=$!
    [ -n "$stopping" ] && kill -s "$stopping" "$child" 2>/dev/null
    await
    case $code in
        0 | 2 | 3) exit "$code" ;;
    esac
    if [ -n "$stopping" ]; then
        echo "restart.sh: stopped by SIG$stopping, exit code $code" >&2
        exit "$code"
    fi
    if [ $((SECONDS - began)) -gt "$soon" ]; then
        pause=$first
    fi
    echo "restart.sh: exit code $code after $((SECONDS - began)) s, the same command again in $pause s" >&2
    ended=$code
    sleep "$pause" &
    child=$!
    [ -n "$stopping" ] && kill "$child"   # told since the command ended
    await
    [ -n "$stopping" ] && exit "$ended"
    pause=$((pause * 2 > most ? most : pause * 2))
done
