#!/usr/bin/env bash
# The published code interpreter clients, on the example image code-interpreter: interpreter.sh PREFIX
# PREFIX is where `make install` has put the programs. Images stay in PREFIX/data for the next time, nothing else does.
set -euo pipefail
cd "$(dirname "$0")/.."

prefix=$1
data=$prefix/data
example=image-builder/examples/code-interpreter
export PATH=$prefix/bin:$PATH
step() { printf '\033[1m== %s (%d s)\033[0m\n' "$1" "$SECONDS"; }

# Sandboxes are ended by their folders, the gateway by its pid.
gateway=
forget() { rm -rf "$data"/gateway.* "$data/sandboxes" "$data/templates"; }
clean_up() {
    local status=$?
    [ -z "$gateway" ] || { kill "$gateway" 2>/dev/null && wait "$gateway"; } || true
    for folder in "$data"/sandboxes/*/; do
        [ -S "$folder/api.sock" ] || continue
        curl -s --max-time 60 --unix-socket "$folder/api.sock" -X POST -H 'content-type: application/json' \
            -d '{"grace_ms":0}' http://sandbox/stop >/dev/null || true
    done
    forget
    exit $status
}
trap clean_up EXIT
forget

step 'images'
build=(image-builder --data-dir "$data")
"${build[@]}" bootstrap debian:bookworm
"${build[@]}" build -t code-interpreter-v1 --host-ca "$example"
"${build[@]}" build -t cowsay-interpreter --host-ca -f "$example/extended/e2b.Dockerfile" "$example/extended"
step 'templates'
machine=(--cpus 2 --memory 1024 --disk 4096)
"${build[@]}" template create code-interpreter-v1 --image code-interpreter-v1 "${machine[@]}"
# One sandbox is made of it: a snapshot would cost the start that it saves.
"${build[@]}" template create cowsay-interpreter --image cowsay-interpreter "${machine[@]}" --snapshot never

step 'gateway'
log=$prefix/gateway.log
tiffin-gateway serve --data-dir "$data" --listen 127.0.0.1:0 --no-base --allow-emulation >"$log" 2>&1 &
gateway=$!
# It says its variables once it serves.
tail --pid=$gateway -n +1 -F "$log" 2>/dev/null | sed '/E2B_API_KEY/q' >/dev/null || true
kill -0 "$gateway" || { cat "$log"; exit 1; }
eval "$(tiffin-gateway env --data-dir "$data")"

failed=0
step 'Python, blocking'
"$TIFFIN_PYTHON" tests/python/interpreter.py sync --extended cowsay-interpreter || failed=1
step 'Python, asyncio'
"$TIFFIN_PYTHON" tests/python/interpreter.py async || failed=1
step 'JavaScript'
"$TIFFIN_NODE" tests/javascript/interpreter.mjs || failed=1
left=("$data"/sandboxes/*/)
[ ! -e "${left[0]}" ] || { echo "sandboxes are left: ${left[*]}"; failed=1; }
[ "$failed" = 0 ] || { echo "the gateway's log:"; cat "$log"; }
step "$([ "$failed" = 0 ] && echo 'all passed' || echo failed)"
exit "$failed"
