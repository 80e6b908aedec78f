#!/usr/bin/env bash
# Makes the template that the end-to-end tests boot, with the project's own tools: prepare.sh BIN_DIR DATA_DIR
set -euo pipefail
bin=$1 data=$2
here=$(cd "$(dirname "$0")" && pwd)

context=$(mktemp -d)
trap 'rm -rf "$context"' EXIT
cp "$here"/images/busybox/* /bin/busybox "$context"
cc -static -O1 -o "$context/hog" "$here/images/busybox/hog.c"
"$bin/image-builder" --data-dir "$data" build -t e2e "$context"
"$bin/image-builder" --data-dir "$data" template create e2e --image e2e --memory 256 --disk 256
