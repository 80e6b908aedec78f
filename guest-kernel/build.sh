#!/usr/bin/env bash
# Builds the guest kernel from Debian's linux-source-6.1 and the fragments beside this script, or finds it in the cache.
set -euo pipefail

usage() {
    cat <<'USAGE'
Usage: build.sh [options]

Builds the guest kernel (a vmlinux without modules) and prints the path of it.
A kernel that was built before from the same Debian version and the same options
is taken from the cache; a changed comment in a fragment does not rebuild it.

  --arch ARCH             x86_64 (default), or aarch64 (never built yet)
  --cache DIR             default: $XDG_CACHE_HOME/tiffin/kernel, or
                          ~/.cache/tiffin/kernel
  --out DIR               also put vmlinux and its config into DIR (as hard links
                          where possible)
  --jobs N                default: the number of CPUs
  --update-lock           write what was built to kernel.lock
  --print-config-digest   print the digest of the options and exit
  --help                  this text

Needs the Debian packages linux-source-6.1, gcc, make, flex, bison, bc, libelf-dev and xz-utils.
Exit code: 0 built or found, 1 the build failed, 2 wrong usage or something is missing.
USAGE
}

package=linux-source-6.1
tarball=/usr/src/$package.tar.xz
# Raised when this script changes in a way that changes the kernel: part of the cache's key, as the version and the options are.
recipe=1

say() { printf 'guest-kernel: %s\n' "$*" >&2; }
die() {
    local code=$1
    shift
    say "error: $*"
    exit "$code"
}
# Notices about kernel.lock stand out: nobody reads the middle of a build's output.
notice() { printf '\n*** guest-kernel: %s\n\n' "$*" >&2; }

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
lock=$here/kernel.lock
arch=x86_64 cache=${XDG_CACHE_HOME:-$HOME/.cache}/tiffin/kernel out='' jobs=$(nproc) update_lock=0 print_digest=0
while [ $# -gt 0 ]; do
    case $1 in
        --arch | --cache | --out | --jobs)
            [ $# -ge 2 ] || die 2 "$1 needs a value"
            case $1 in
                --arch) arch=$2 ;;
                --cache) cache=$2 ;;
                --out) out=$2 ;;
                --jobs) jobs=$2 ;;
            esac
            shift
            ;;
        --update-lock) update_lock=1 ;;
        --print-config-digest) print_digest=1 ;;
        --help | -h)
            usage
            exit 0
            ;;
        *) die 2 "unknown option $1 (see --help)" ;;
    esac
    shift
done
case $arch in
    x86_64) make_arch=x86_64 target=vmlinux image=vmlinux cross='' ;;
    aarch64) make_arch=arm64 target=Image image=arch/arm64/boot/Image cross=aarch64-linux-gnu- ;;
    *) die 2 "unknown architecture '$arch'; expected x86_64 or aarch64" ;;
esac
[[ $jobs =~ ^[1-9][0-9]*$ ]] || die 2 "--jobs needs a number, got '$jobs'"

sha256() { sha256sum | cut -d' ' -f1; }
# Only the options count, not the comments.
options() { grep -h '^CONFIG_' "$here/base.config" "$here/$arch.config"; }
# The value of KEY in a file of key=value lines; empty when it is absent.
value() { sed -n "s/^$1=//p" "$2"; }

config_digest=$(options | sha256)
if [ "$print_digest" = 1 ]; then
    echo "$config_digest"
    exit 0
fi

debian_version=$(dpkg-query -W -f '${Version}' "$package" 2>/dev/null || true)
if [ -z "$debian_version" ] && [ -r "$lock" ]; then
    # Without the package nothing can be built, but a cached kernel of the recorded version can still be used.
    debian_version=$(value debian_version "$lock")
fi
[ -n "$debian_version" ] || die 2 "no kernel source: apt-get install $package"

mkdir -p "$cache"
# make runs in another folder, so a relative path would not do.
cache=$(cd "$cache" && pwd)
key=$(printf '%s\n' "recipe=$recipe" "arch=$arch" "debian_version=$debian_version" "config_digest=$config_digest" | sha256)
entry=$cache/$key
work='' make_pid=''

cleanup() {
    local code=$?
    trap - EXIT
    if [ -n "$make_pid" ] && kill "$make_pid" 2>/dev/null; then
        wait "$make_pid" 2>/dev/null || true
    fi
    if [ -n "$work" ]; then
        rm -rf "$work"
    fi
    exit "$code"
}
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# An entry is whole or absent, because it is renamed into place; the digest is compared all the same, since a damaged kernel fails in
# ways that nobody traces back to it.
entry_is_good() {
    [ -r "$entry/info" ] && [ -r "$entry/vmlinux" ] && [ -r "$entry/config" ] &&
        [ "$(sha256 <"$entry/vmlinux")" = "$(value vmlinux_sha256 "$entry/info")" ]
}

need() {
    command -v "$1" >/dev/null || missing="$missing $2"
}

check_tools() {
    local missing=''
    need "${cross}gcc" "gcc${cross:+-aarch64-linux-gnu}"
    need "${cross}ld" "binutils${cross:+-aarch64-linux-gnu}"
    need make make
    need flex flex
    need bison bison
    need bc bc
    need xz xz-utils
    need tar tar
    # objtool, which the build runs over every object, reads ELF files with it.
    if command -v gcc >/dev/null && ! echo '#include <gelf.h>' | gcc -E - >/dev/null 2>&1; then
        missing="$missing libelf-dev"
    fi
    [ -r "$tarball" ] || missing="$missing $package"
    [ -z "$missing" ] || die 2 "packages are missing: apt-get install$missing"
}

# Runs make in the background with its output in the log, and counts what it has compiled. The total is that of the last locked build, so
# it is an estimate.
compile() {
    local total start done_now last=-1
    total=''
    if [ -r "$lock" ]; then total=$(value objects "$lock"); fi
    start=$SECONDS
    "${make[@]}" -j"$jobs" "$target" >>"$log" 2>&1 &
    make_pid=$!
    while kill -0 "$make_pid" 2>/dev/null; do
        sleep 1
        if ((SECONDS - start >= last + 15)); then
            last=$((SECONDS - start))
            done_now=$(count_objects)
            say "  $done_now of about ${total:-?} objects, ${last} s"
        fi
    done
    local code=0
    wait "$make_pid" || code=$?
    make_pid=''
    return "$code"
}

count_objects() { grep -c -E '^  (CC|AS) ' "$log" || true; }

failed() {
    say "error: $1"
    say "the last lines of $log:"
    tail -n 30 "$log" >&2
    exit 1
}

build() {
    check_tools
    local log started=$SECONDS tree result make upstream compiler
    # Fixed names, so that two builds by the same compiler are the same bytes.
    export KBUILD_BUILD_TIMESTAMP='1970-01-01 00:00:00 UTC' KBUILD_BUILD_USER=tiffin KBUILD_BUILD_HOST=tiffin KBUILD_BUILD_VERSION=1
    export LC_ALL=C TZ=UTC
    # The lock is held, so whatever has such a name was left by a build that was killed.
    rm -rf "$cache"/tmp.*
    work=$(mktemp -d "$cache/tmp.XXXXXX")
    log=$cache/$key.log
    : >"$log"

    say "building Linux from $package $debian_version for $arch, $jobs jobs (log: $log)"
    say "unpacking the source"
    tar -xJf "$tarball" -C "$work" 2>>"$log" || failed "cannot unpack $tarball"
    tree=$work/$package
    make=(make -C "$tree" "ARCH=$make_arch")
    [ -z "$cross" ] || make+=("CROSS_COMPILE=$cross")

    say "configuring"
    options >"$work/options"
    "${make[@]}" "KCONFIG_ALLCONFIG=$work/options" allnoconfig >>"$log" 2>&1 || failed "cannot configure"
    # Kconfig drops an option silently when something that it depends on is off.
    "$here/check" --exact --arch "$arch" "$tree/.config" >>"$log" || failed "the kernel's Kconfig did not take every option"

    say "compiling"
    compile || failed "the compiler failed"

    upstream=$("${make[@]}" -s kernelversion)
    compiler="$("${cross}gcc" --version | head -n 1), $("${cross}ld" --version | head -n 1)"
    result=$work/entry
    mkdir "$result"
    cp "$tree/$image" "$result/vmlinux"
    cp "$tree/.config" "$result/config"
    cat >"$result/info" <<INFO
arch=$arch
debian_version=$debian_version
upstream_version=$upstream
config_digest=$config_digest
compiler=$compiler
objects=$(count_objects)
vmlinux_sha256=$(sha256 <"$result/vmlinux")
INFO
    # Read-only, because --out may give out hard links.
    chmod 444 "$result"/*
    sync -f "$result/vmlinux"
    rm -rf "$entry"
    mv "$result" "$entry"
    rm -f "$log"
    say "done in $((SECONDS - started)) s"
}

# Says what differs from kernel.lock. Debian's mirror keeps only the newest revision and compilers are updated, so a difference is a notice.
compare_with_lock() {
    local field changed='' was is
    if [ ! -r "$lock" ] || [ "$(value arch "$lock")" != "$arch" ]; then
        notice "kernel.lock does not record a kernel for $arch; --update-lock writes it"
        return
    fi
    for field in debian_version upstream_version config_digest compiler; do
        was=$(value "$field" "$lock")
        is=$(value "$field" "$entry/info")
        if [ "$was" != "$is" ]; then
            changed=1
            notice "$field differs from kernel.lock: recorded '$was', here '$is'"
        fi
    done
    was=$(value vmlinux_sha256 "$lock")
    is=$(value vmlinux_sha256 "$entry/info")
    if [ "$was" != "$is" ] && [ -z "$changed" ]; then
        notice "warning: the same source, options and compiler gave a different kernel: recorded $was, here $is"
    fi
}

# Puts one file of the entry into --out under its final name at once: a reader sees the old or the new one.
put() {
    local temporary=$out/.$1.$$
    # mv refuses to rename one link of a file onto another.
    if [ "$entry/$1" -ef "$out/$1" ]; then return; fi
    rm -f "$temporary"
    ln "$entry/$1" "$temporary" 2>/dev/null || cp "$entry/$1" "$temporary"
    mv -f "$temporary" "$out/$1"
}

if ! entry_is_good; then
    exec 9>"$cache/lock"
    if ! flock -n 9; then
        say "another build is under way in $cache; waiting for it"
        flock 9
    fi
    entry_is_good || build
    exec 9>&-
else
    say "cached: Linux from $package $debian_version, options ${config_digest:0:12}"
fi

if [ "$update_lock" = 1 ]; then
    {
        echo "# What build.sh --update-lock built last. A different build is reported, not refused."
        cat "$entry/info"
    } >"$lock.new"
    mv -f "$lock.new" "$lock"
    say "wrote $lock"
else
    compare_with_lock
fi
if [ -n "$out" ]; then
    mkdir -p "$out"
    put config
    put vmlinux
    echo "$out/vmlinux"
else
    echo "$entry/vmlinux"
fi
