#!/usr/bin/env bash
# Train on all workers of a Cloud TPU slice (TPU VMs), from your own machine.
#
#     export TPU_NAME=neo ZONE=us-east5-a          # and PROJECT, unless gcloud has a default
#     launch/tpu_vm.sh install                     # this tree and a virtual environment, on all workers
#     launch/tpu_vm.sh start --config=configs/neo_7b.py --workdir=gs://bucket/neo_7b --config.log.every_steps=50
#     launch/tpu_vm.sh status
#     launch/tpu_vm.sh logs [WORKER]               # follow one worker's log (0)
#     launch/tpu_vm.sh stop                        # save and end, on all workers
#     launch/tpu_vm.sh clean                       # remove what install and start have put there
#
# Everything after `start` goes to neo.train as it is. The command runs under launch/restart.sh: it is started again unless it
# is done, wrong, or needs a person. Several slices of one run: TPU_NAME="neo-0 neo-1". Variables of this shell that the
# workers are to have: NEO_PASS="LIBTPU_INIT_ARGS WANDB_API_KEY".
# Nothing is created or deleted but files on the workers; creating and deleting TPUs is in docs/tpu_pod.md.
set -eu

verb=${1:-}
[ $# -gt 0 ] && shift

fail() {
    echo "tpu_vm.sh: $*" >&2
    exit 2
}

case $verb in
    install | start | status | logs | stop | clean) ;;
    *) fail "usage: launch/tpu_vm.sh install | start ARGUMENTS OF neo.train | status | logs [WORKER] | stop | clean" ;;
esac
[ -n "${TPU_NAME:-}" ] || fail "TPU_NAME is not set: the name of the TPU, as in gcloud compute tpus tpu-vm list"
[ -n "${ZONE:-}" ] || fail "ZONE is not set: the zone of the TPU, for example us-east5-a"
command -v gcloud >/dev/null || fail "gcloud is not installed: cloud.google.com/sdk/docs/install"
where=("--zone=$ZONE")
[ -n "${PROJECT:-}" ] && where+=("--project=$PROJECT")

# on NAME WORKER COMMAND
on() {
    gcloud compute tpus tpu-vm ssh "$1" "${where[@]}" "--worker=$2" "--command=$3"
}

everywhere() {
    for name in $TPU_NAME; do
        on "$name" all "$1"
    done
}

install() {
    root=$(cd "$(dirname "$0")/.." && pwd)
    archive=$(mktemp --suffix=.tar.gz)
    trap 'rm -f "$archive"' EXIT
    # What git tracks, as it stands on this machine; without git, everything but runs and data.
    if git -C "$root" rev-parse --is-inside-work-tree >/dev/null 2>&1; then
        (cd "$root" && git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' path; do
            [ -e "$path" ] && printf '%s\0' "$path"
        done | tar --null --files-from=- -czf "$archive")
    else
        tar -C "$root" --exclude=./runs --exclude=./data --exclude=./plans --exclude='./.*' -czf "$archive" .
    fi
    for name in $TPU_NAME; do
        gcloud compute tpus tpu-vm scp "$archive" "$name:neo.tar.gz" "${where[@]}" --worker=all
    done
    # Images of TPU VMs may have an older Python than neo needs; uv brings one.
    everywhere '
set -eu
cd "$HOME"
mkdir -p neo
tar -xzf neo.tar.gz -C neo
if [ ! -x neo-venv/bin/python ]; then
    python=
    for candidate in ${NEO_PYTHON:-python3.13 python3.12 python3.11}; do
        if command -v "$candidate" >/dev/null && "$candidate" -c "import ensurepip" 2>/dev/null; then
            python=$candidate
            break
        fi
    done
    if [ -n "$python" ]; then
        "$python" -m venv neo-venv
    else
        python3 -m pip install --user --quiet uv
        python3 -m uv venv --seed --python 3.12 neo-venv
    fi
fi
neo-venv/bin/python -m pip install --quiet -e "./neo[tpu,cloud]" -c neo/constraints.txt
echo "$(hostname): installed, $(neo-venv/bin/python --version)"
'
}

start() {
    [ $# -gt 0 ] || fail "start needs the arguments of neo.train: --config=... --workdir=gs://..."
    arguments=$(printf ' %q' "$@")
    exports=
    for variable in ${NEO_PASS:-}; do
        [ -n "${!variable+set}" ] || fail "NEO_PASS names $variable, which is not set"
        exports+="export $variable=$(printf '%q' "${!variable}"); "
    done
    everywhere "
set -eu
cd \"\$HOME/neo\" 2>/dev/null || { echo \"\$(hostname): nothing is installed here: launch/tpu_vm.sh install\" >&2; exit 2; }
if [ -f ../neo-train.pid ] && kill -0 \"\$(cat ../neo-train.pid)\" 2>/dev/null; then
    echo \"\$(hostname): runs already, process \$(cat ../neo-train.pid): launch/tpu_vm.sh stop first\" >&2
    exit 2
fi
${exports}setsid nohup bash launch/restart.sh ../neo-venv/bin/python -m neo.train$arguments >>../neo-train.log 2>&1 </dev/null &
echo \$! >../neo-train.pid
echo \"\$(hostname): started, process \$(cat ../neo-train.pid)\"
"
}

status() {
    everywhere '
cd "$HOME"
if [ ! -f neo-train.pid ]; then
    state="was never started"
elif kill -0 "$(cat neo-train.pid)" 2>/dev/null; then
    state="runs, process $(cat neo-train.pid)"
else
    state="has ended"
fi
echo "$(hostname): $state; $(tail -n 1 neo-train.log 2>/dev/null)"
'
}

# setsid made the process the leader of its own group; only restart.sh is told, and tells the others.
stop() {
    everywhere '
cd "$HOME"
if [ ! -f neo-train.pid ] || ! kill -TERM "$(cat neo-train.pid)" 2>/dev/null; then
    echo "$(hostname): does not run"
fi
'
    everywhere '
cd "$HOME"
for second in $(seq 900); do
    if [ ! -f neo-train.pid ] || ! kill -0 "$(cat neo-train.pid)" 2>/dev/null; then
        echo "$(hostname): has ended; $(tail -n 1 neo-train.log 2>/dev/null)"
        exit 0
    fi
    sleep 1
done
echo "$(hostname): still runs after 900 s, process $(cat neo-train.pid)" >&2
exit 1
'
}

clean() {
    everywhere '
cd "$HOME"
if [ -f neo-train.pid ] && kill -0 "$(cat neo-train.pid)" 2>/dev/null; then
    echo "$(hostname): runs: launch/tpu_vm.sh stop first" >&2
    exit 2
fi
rm -rf neo neo-venv neo.tar.gz neo-train.log neo-train.pid
echo "$(hostname): clean"
'
}

case $verb in
    logs) on "${TPU_NAME%% *}" "${1:-0}" 'tail -n 100 -F neo-train.log' ;;
    *) "$verb" "$@" ;;
esac
