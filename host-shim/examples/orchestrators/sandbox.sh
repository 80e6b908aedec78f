#!/usr/bin/env bash
# A whole life of a sandbox, as an orchestrator in shell would lead it: start, wait until it is ready, run something in it,
# pause, resume, stop.
#
#   sandbox.sh TEMPLATE DIR        TEMPLATE is a template's folder; DIR, which is made, is the sandbox's. host-shim is in PATH.
#
# Everything that host-shim promises to whoever starts it is used here, and nothing else: the line of readiness, the folder,
# the exit codes, SIGTERM.
set -euo pipefail
if [ $# -ne 2 ]; then
    echo "usage: sandbox.sh TEMPLATE DIR" >&2
    exit 2
fi
template=$1 dir=$2
shim='' ready=''

# However this script ends, the sandbox does too.
cleanup() {
    local code=$?
    if [ -n "$shim" ] && kill -TERM "$shim" 2>/dev/null; then wait "$shim" || true; fi
    exit "$code"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# run OPTIONS...: a shim in the background; returns when its sandbox is ready, with the line that says so in $ready.
run() {
    # The shim has the pipe's only other end: when it ends without a line, so does the wait for one.
    exec {line}< <(exec host-shim run --quiet --dir "$dir" "$@")
    shim=$!
    if ! IFS= read -r ready <&"$line"; then
        local code=0
        wait "$shim" || code=$?
        shim=''
        echo "the sandbox did not become ready: host-shim ended with $code" >&2
        exit 1
    fi
    exec {line}<&-
}

# ends WITH: waits for the shim's end, whose exit code must be this one.
ends() {
    local code=0
    wait "$shim" || code=$?
    shim=''
    if [ "$code" -ne "$1" ]; then
        echo "host-shim ended with $code, expected $1" >&2
        exit 1
    fi
}

# A path with a slash is a sandbox's folder for every verb; without one it would be an id.
inside() { host-shim exec "$dir/" -- "$@"; }

install -d -m 700 "$dir"
# An id, memory_mib, env, timeout_s and more: `host-shim spec --schema` has all that can be said.
printf '{"schema_version": 1, "template": "%s", "labels": {"owner": "sandbox.sh"}}\n' "$template" > "$dir/spec.json"

run --spec "$dir/spec.json"
echo "ready: $ready"
inside sh -c 'echo "inside: $(uname -s)"; echo kept > /root/note'

host-shim pause "$dir/" > /dev/null
ends 3
echo "paused, and nothing of it runs"

run --resume
echo "resumed: $ready"
inside sh -c 'echo "still there: $(cat /root/note)"'

kill -TERM "$shim"
ends 0
echo "stopped"
