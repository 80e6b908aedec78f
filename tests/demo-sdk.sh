#!/usr/bin/env bash
# `make demo-sdk`: a gateway with a fresh data folder, and the published E2B clients run against it unmodified.
set -euo pipefail
cd "$(dirname "$0")/.."

demo=$PWD/target/demo-sdk
port=${DEMO_PORT:-3000}
step() { printf '\033[1m== %s\033[0m\n' "$1"; }

step 'packages and published clients'
make --no-print-directory packages python javascript
step 'build and install'
make --no-print-directory install "PREFIX=$demo"
export PATH=$demo/bin:$PATH

# Sandboxes are ended by their folders, the gateway by its pid; the image of `base` is kept, the database is not.
data=$demo/data
gateway=
clean_up() {
    local status=$?
    [ -z "$gateway" ] || { kill "$gateway" 2>/dev/null && wait "$gateway"; } || true
    for folder in "$data"/sandboxes/*/; do
        [ -S "$folder/api.sock" ] || continue
        curl -s --max-time 60 --unix-socket "$folder/api.sock" -X POST -H 'content-type: application/json' \
            -d '{"grace_ms":0}' http://sandbox/stop >/dev/null || true
    done
    rm -rf "$data"/gateway.* "$data/sandboxes"
    exit $status
}
trap clean_up EXIT
rm -rf "$data"/gateway.*

step 'gateway'
log=$demo/gateway.log
tiffin-gateway serve --data-dir "$data" --listen "127.0.0.1:$port" --domain tiffin.test --allow-emulation >"$log" 2>&1 &
gateway=$!
# It says its variables once it serves. `base` is made before that, which takes minutes the first time.
tail --pid=$gateway -n +1 -F "$log" 2>/dev/null | sed '/E2B_API_KEY/q' | grep -v E2B_API_KEY || true
kill -0 "$gateway" || { cat "$log"; exit 1; }
eval "$(tiffin-gateway env --data-dir "$data" --listen "127.0.0.1:$port")"
E2B_API_KEY=$(tiffin-gateway keys create --data-dir "$data" --name demo)
export E2B_API_KEY

step 'Python: e2b'
"$TIFFIN_PYTHON" tests/python/demo.py
step 'JavaScript: e2b'
"$TIFFIN_NODE" tests/javascript/demo.mjs
step 'JavaScript: @e2b/sdk 0.12, over its WebSocket'
# It builds host names of its own: they are resolved to this machine, as wildcard DNS would.
domain=tiffin.test:$port
TIFFIN_DOMAIN=$domain E2B_DOMAIN=$domain E2B_SECURE=false NODE_OPTIONS=--require=$PWD/tests/javascript/loopback.cjs \
    "$TIFFIN_NODE" tests/javascript/demo-legacy.mjs
