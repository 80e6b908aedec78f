#!/usr/bin/env bash
# Tests `check` and the form of the fragments; with CONFIG (the config of a kernel that build.sh made) also that every option stuck.
# Usage: test.sh [CONFIG]      Exit code: 0 all passed, 1 a test failed.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failures=0

pass() { printf 'ok      %s\n' "$1"; }
fail() {
    printf 'FAILED  %s\n' "$1"
    [ ! -s "$work/output" ] || sed 's/^/        /' "$work/output"
    failures=$((failures + 1))
}

# expect NAME CODE PATTERN... -- ARGUMENT...: `check ARGUMENT...` ends with CODE, and its output has each PATTERN (fixed strings).
expect() {
    local name=$1 code=$2 patterns=() got=0 pattern
    shift 2
    while [ "$1" != -- ]; do
        patterns+=("$1")
        shift
    done
    shift
    "$here/check" "$@" >"$work/output" 2>&1 || got=$?
    if [ "$got" != "$code" ]; then
        fail "$name: exit code $got, expected $code"
        return
    fi
    for pattern in "${patterns[@]}"; do
        if ! grep -qF -- "$pattern" "$work/output"; then
            fail "$name: no '$pattern' in the output"
            return
        fi
    done
    pass "$name"
}

# The form of the fragments, on which `check` rests: each option below a heading, once for each architecture, and =y wherever
# another kernel is measured by it.
for arch in x86_64 aarch64; do
    awk '
        /^## (required|recommended|choice): ./ { level = $2; next }
        /^## ./ { if (level == "") print FILENAME ": " $0 ": goes on with no reason"; next }
        /^CONFIG_[A-Za-z0-9_]+=./ {
            i = index($0, "="); name = substr($0, 1, i - 1)
            if (level == "") print FILENAME ": " $0 ": no heading"
            if (seen[name]++) print FILENAME ": " $0 ": twice"
            if (level != "choice:" && substr($0, i + 1) != "y") print FILENAME ": " $0 ": only a choice may be something else than y"
            next
        }
        /^#[^#]/ || /^#$/ { next }
        /^$/ { level = ""; next }
        { print FILENAME ": " $0 ": neither an option nor a comment" }
    ' "$here/base.config" "$here/$arch.config" >"$work/output"
    if [ -s "$work/output" ]; then fail "form of the fragments for $arch"; else pass "form of the fragments for $arch"; fi
done

: >"$work/output"
good=$work/good
grep -h '^CONFIG_' "$here/base.config" "$here/x86_64.config" >"$good"
echo CONFIG_X86_64=y >>"$good"
expect 'a kernel with every option passes' 0 'every required option is there' -- "$good"
expect 'the same as JSON' 0 '"ok":true' '"missing":[]' -- --json "$good"

# Every required option in turn, so that no block of the fragments is out of reach of `check`.
required=$(awk '/^## [a-z]+: / { level = $2 } /^CONFIG_/ && level == "required:" { sub(/=.*/, ""); print }' \
    "$here/base.config" "$here/x86_64.config")
missed=''
for option in $required; do
    sed "s/^$option=.*/# $option is not set/" "$good" >"$work/without"
    if "$here/check" "$work/without" >"$work/output" 2>&1 || ! grep -q "^    $option is not set" "$work/output"; then
        missed="$missed $option"
    fi
done
if [ -n "$missed" ]; then fail "each required option is missed when it is gone:$missed"; else pass 'each required option is missed when it is gone'; fi

grep -v '^CONFIG_OVERLAY_FS=' "$good" >"$work/without"
expect 'a missing option is named with its reason' 1 CONFIG_OVERLAY_FS "the container's root is an overlay" -- "$work/without"
expect 'the same as JSON' 1 '"ok":false' '"option":"CONFIG_OVERLAY_FS","level":"required","want":"y","got":"n"' -- --json "$work/without"
sed 's/^CONFIG_VIRTIO_BLK=y/CONFIG_VIRTIO_BLK=m/' "$good" >"$work/module"
expect 'a required option as a module is not enough' 1 'CONFIG_VIRTIO_BLK is a module, and must be built in' -- "$work/module"
grep -v '^CONFIG_WIREGUARD=' "$good" >"$work/without"
expect 'a missing recommended option is named, and no failure' 0 'recommended, missing' CONFIG_WIREGUARD -- "$work/without"
sed 's/^CONFIG_NR_CPUS=.*/CONFIG_NR_CPUS=8192/' "$good" >"$work/other"
expect "another kernel's choices are its own" 0 'every required option is there' -- "$work/other"
expect 'but --exact names them' 1 'CONFIG_NR_CPUS is 8192, expected 64' -- --exact "$work/other"
sed 's/^CONFIG_MODULES=n/CONFIG_MODULES=y/' "$good" >"$work/other"
expect '--exact names an option that must be off' 1 'CONFIG_MODULES is y, but must be off' -- --exact "$work/other"

gzip -c "$good" >"$work/good.gz"
expect 'a compressed configuration' 0 'every required option is there' -- "$work/good.gz"
head -c 100 "$work/good.gz" >"$work/cut.gz"
expect 'a damaged compressed one' 2 'cannot be decompressed' -- "$work/cut.gz"
echo 'hello' >"$work/text"
expect 'a file that is no configuration' 2 'is not a kernel configuration' -- "$work/text"
head -c 4096 /dev/urandom >"$work/binary"
expect 'a binary file' 2 'check: ' -- "$work/binary"
expect 'no file' 2 'cannot read' -- "$work/absent"
expect 'a folder' 2 'is a folder' -- "$work"
expect 'no argument' 2 'no CONFIG given' --
expect 'an unknown option' 2 'unknown option' -- --frobnicate "$good"
grep -v '^CONFIG_X86_64=' "$good" >"$work/noarch"
expect 'a configuration of no known architecture' 2 'neither x86_64 nor aarch64' -- "$work/noarch"
expect 'help' 0 'Exit code' -- --help

# build.sh, as far as it goes without building.
: >"$work/output"
digest=$("$here/build.sh" --print-config-digest)
if [[ $digest =~ ^[0-9a-f]{64}$ ]]; then pass 'build.sh prints the digest of the options'; else fail "digest of the options: '$digest'"; fi
if [ -r "$here/kernel.lock" ]; then
    recorded=$(sed -n 's/^config_digest=//p' "$here/kernel.lock")
    if [ "$digest" = "$recorded" ]; then pass 'kernel.lock records these options'; else fail "kernel.lock records other options: $recorded"; fi
else
    fail 'kernel.lock is missing'
fi
code=0
"$here/build.sh" --jobs many >"$work/output" 2>&1 || code=$?
if [ "$code" = 2 ]; then pass 'build.sh refuses a wrong number of jobs'; else fail "build.sh --jobs many: exit code $code, expected 2"; fi

# With an entry in the cache that looks built: --out puts it there, also a second time (mv refuses to rename one link of a file onto
# another), and a damaged entry is not used. Nothing here may compile: where it would, the time limit or the missing source ends it.
version=$(dpkg-query -W -f '${Version}' linux-source-6.1 2>/dev/null || true)
version=${version:-$(sed -n 's/^debian_version=//p' "$here/kernel.lock")}
recipe=$(sed -n 's/^recipe=//p' "$here/build.sh")
key=$(printf '%s\n' "recipe=$recipe" arch=x86_64 "debian_version=$version" "config_digest=$digest" | sha256sum | cut -d' ' -f1)
entry=$work/cache/$key
mkdir -p "$entry"
echo kernel >"$entry/vmlinux"
cp "$good" "$entry/config"
printf 'arch=x86_64\nvmlinux_sha256=%s\n' "$(sha256sum <"$entry/vmlinux" | cut -d' ' -f1)" >"$entry/info"
for round in first second; do
    if timeout 20 "$here/build.sh" --cache "$work/cache" --out "$work/out" >"$work/output" 2>&1 &&
        cmp -s "$entry/vmlinux" "$work/out/vmlinux" && [ "$(find "$work/out" -type f | wc -l)" = 2 ]; then
        pass "build.sh takes a cached kernel, $round time"
    else
        fail "build.sh takes a cached kernel, $round time"
    fi
done
echo damaged >>"$entry/vmlinux"
timeout 5 "$here/build.sh" --cache "$work/cache" >"$work/output" 2>&1 || true
if grep -q 'guest-kernel: cached' "$work/output"; then
    fail 'build.sh does not use a damaged entry'
else
    pass 'build.sh does not use a damaged entry'
fi

if [ $# -gt 0 ]; then
    expect 'every option stuck in the built configuration' 0 'every option is as asked' -- --exact "$1"
else
    echo 'SKIPPED every option stuck in the built configuration: no CONFIG given'
fi
[ "$failures" = 0 ] || {
    echo "$failures failed"
    exit 1
}
