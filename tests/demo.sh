#!/usr/bin/env bash
# `make demo`: a Dockerfile becomes an image, a template with a snapshot, and a sandbox in which cowsay runs; then the same
# template again. Both sandboxes are restored from the snapshot, which was booted once.
#
# demo.sh [PREFIX]: with what is installed in PREFIX, which is not built then. Neither way needs root, once the Debian packages
# are there.
set -euo pipefail
cd "$(dirname "$0")/.."

demo=$PWD/target/demo
prefix=${1:-$demo}
data=$demo/data
example=image-builder/examples/cowsay
export PATH=$prefix/bin:$PATH

names=() times=()
step() { # step NAME COMMAND...: runs it, says what it is doing, and remembers how long it took
    local name=$1 start end
    shift
    printf '\033[1m== %s\033[0m\n' "$name"
    start=$(date +%s.%N)
    "$@"
    end=$(date +%s.%N)
    names+=("$name")
    times+=("$(awk -v a="$start" -v b="$end" 'BEGIN { printf "%.1f", b - a }')")
}

base_image() {
    if image-builder --data-dir "$data" images --json | grep -q '"docker.io/library/debian:bookworm"'; then
        echo "debian:bookworm is in the local store"
    elif image-builder --data-dir "$data" load debian:bookworm -t debian:bookworm; then
        echo "debian:bookworm came from its registry"
    else
        echo "no registry answers: making debian:bookworm from a Debian mirror"
        image-builder --data-dir "$data" bootstrap debian:bookworm
    fi
}

sandbox() { host-shim run --timings --data-dir "$data" cowsay -- "$@"; }

first() {
    sandbox sh -c 'cowsay "hello from $(uname -sr), pid $$" && echo "left by the first sandbox" > note && ls -l note'
}

second() {
    sandbox sh -c 'test ! -e note && cowsay "no note here: this sandbox is a new one"'
}

if [ $# -eq 0 ]; then
    step 'packages' make --no-print-directory packages
    step 'build the workspace (release) and envd (static)' make --no-print-directory release agent
    step 'guest kernel' make --no-print-directory kernel
    step 'install' make --no-print-directory install "PREFIX=$prefix"
fi
step 'base image' base_image
step "image: $example/Dockerfile" image-builder --data-dir "$data" build --host-ca -t cowsay "$example"
step 'template and snapshot' image-builder --data-dir "$data" template create cowsay --image cowsay
step 'first sandbox' first
step 'second sandbox' second

printf '\n%-60s %9s\n' phase seconds
for i in "${!names[@]}"; do printf '%-60s %9s\n' "${names[$i]}" "${times[$i]}"; done
