#!/usr/bin/env bash
# Makes the templates that the end-to-end tests boot, with the project's own tools:
# prepare.sh BIN_DIR DATA_DIR SYSTEMD_ROOT_TAR
set -euo pipefail
bin=$1 data=$2 systemd_root=$3
here=$(cd "$(dirname "$0")" && pwd)

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
cp "$here"/images/busybox/* /bin/busybox "$context"
cc -static -O1 -o "$context/hog" "$here/images/busybox/hog.c"
"$bin/image-builder" --data-dir "$data" build -t e2e "$context"
"$bin/image-builder" --data-dir "$data" template create e2e --image e2e --memory 256 --disk 256

# Debian with systemd as its init. The tree is large: made again only when it or its maker changed.
made="$data/systemd.made-of"
of=$(cat "$systemd_root" "$bin/image-builder" "$0" | sha256sum)
if [ ! -d "$data/templates/systemd" ] || [ "$(cat "$made" 2>/dev/null)" != "$of" ]; then
    layout=$context/layout
    umoci init --layout "$layout"
    umoci new --image "$layout:systemd"
    umoci raw add-layer --image "$layout:systemd" "$systemd_root"
    umoci config --image "$layout:systemd" --config.volume /srv/data
    "$bin/image-builder" --data-dir "$data" load "oci:$layout:systemd" -t e2e-systemd
    "$bin/image-builder" --data-dir "$data" template create systemd --image e2e-systemd --memory 512 --disk 512
    echo "$of" > "$made"
fi
