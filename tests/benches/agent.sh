#!/usr/bin/env bash
# The agent's size on disk and, idle as an ordinary process, in memory: agent.sh ENVD
set -euo pipefail
envd=$1

folder=$(mktemp -d)
"$envd" --listen "unix:$folder/envd.sock" --no-container &
agent=$!
trap 'kill "$agent"; wait "$agent" || true; rm -rf "$folder"' EXIT
until [ -S "$folder/envd.sock" ]; do kill -0 "$agent"; done

# One call of each kind, so that what a first call loads is counted.
curl -sf --unix-socket "$folder/envd.sock" http://sandbox/health
curl -sf --unix-socket "$folder/envd.sock" -H 'content-type: application/json' -d '{"path":"/"}' \
    http://sandbox/filesystem.Filesystem/Stat >/dev/null
printf '\0\0\0\0\x1f{"process":{"cmd":"/bin/true"}}' |
    curl -sf --unix-socket "$folder/envd.sock" -H 'content-type: application/connect+json' --data-binary @- \
        http://sandbox/process.Process/Start >/dev/null

awk -v size="$(stat -c %s "$envd")" 'BEGIN { printf "static binary  %6.2f MiB\n", size / 1048576 }'
for pid in "$agent" $(cat "/proc/$agent/task/$agent/children"); do
    awk -v who="$(tr '\0' ' ' <"/proc/$pid/cmdline" | awk '{ print $2 == "spawner" ? "its spawner" : "agent, idle" }')" \
        '/^VmRSS/ { printf "%-13s  %6.2f MiB resident\n", who, $2 / 1024 }' "/proc/$pid/status"
done
