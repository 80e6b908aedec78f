#!/usr/bin/env bash
# Makes the templates that the end-to-end tests boot, with the project's own tools:
# prepare.sh BIN_DIR DATA_DIR SYSTEMD_ROOT_TAR BASE_ROOT_TAR CLONES_ROOT_TAR
set -euo pipefail
bin=$1 data=$2 systemd_root=$3 base_root=$4 clones_root=$5
here=$(cd "$(dirname "$0")" && pwd)

# Without snapshots: the tests boot, and those that restore make a snapshot of their own.
template() { "$bin/image-builder" --data-dir "$data" template create "$@" --snapshot never; }

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
cp "$here"/images/busybox/* /bin/busybox "$context"
cc -static -O1 -o "$context/hog" "$here/images/busybox/hog.c"
"$bin/image-builder" --data-dir "$data" build -t e2e "$context"
template e2e --image e2e --memory 256 --disk 256

# Whole Debian roots: each is an image of one layer, and made again only when it or its maker changed.
of() { cat "$@" "$bin/image-builder" "$here/prepare.sh" | sha256sum; }
is_made() { [ -d "$data/templates/$1" ] && [ "$(cat "$data/$1.made-of" 2>/dev/null)" = "$2" ]; }
load() { # load NAME TAR [UMOCI_CONFIG...]: the image e2e-NAME
    local name=$1 tar=$2 layout=$context/layout-$1
    shift 2
    umoci init --layout "$layout"
    umoci new --image "$layout:$name"
    umoci raw add-layer --image "$layout:$name" "$tar"
    [ $# -eq 0 ] || umoci config --image "$layout:$name" "$@"
    "$bin/image-builder" --data-dir "$data" load "oci:$layout:$name" -t "e2e-$name"
}

# Debian with systemd as its init.
made=$(of "$systemd_root")
if ! is_made systemd "$made"; then
    load systemd "$systemd_root" --config.volume /srv/data
    template systemd --image e2e-systemd --memory 512 --disk 512
    echo "$made" > "$data/systemd.made-of"
fi

# The gateway's `base`: its own Dockerfile, on a root where the packages are there already.
dockerfile=$here/../host-shim/gateway/base/Dockerfile
made=$(of "$base_root" "$dockerfile")
if ! is_made base "$made"; then
    load debian "$base_root"
    mkdir "$context/base"
    sed -e 's/^FROM .*/FROM e2e-debian/' -e '/^RUN apt-get/,/[^\\]$/d' "$dockerfile" > "$context/base/Dockerfile"
    "$bin/image-builder" --data-dir "$data" build -t e2e-base "$context/base"
    template base --image e2e-base
    echo "$made" > "$data/base.made-of"
fi

# What is to be different in every clone: a Python server, OpenSSL, an SSH server.
images=("$here"/images/clones/* "$here"/../envd/examples/reseed/*)
made=$(of "$clones_root" "${images[@]}")
if ! is_made clones "$made"; then
    load clones-root "$clones_root"
    mkdir "$context/clones"
    cp "${images[@]}" "$context/clones"
    "$bin/image-builder" --data-dir "$data" build -t e2e-clones "$context/clones"
    "$bin/image-builder" --data-dir "$data" template create clones --image e2e-clones --memory 256 --disk 256
    echo "$made" > "$data/clones.made-of"
fi
