#!/usr/bin/env bash
# Fuzzes each target for a fixed time: run.sh [TARGET...], with FUZZ_SECONDS (default 60) for each.
#
# libFuzzer on the stable compiler: the instrumentation is an LLVM pass that any rustc can be told to run; only the
# sanitizers need a nightly one, and safe code has little use for them. The flags are those of cargo-fuzz.
set -euo pipefail
cd "$(dirname "$0")"
seconds=${FUZZ_SECONDS:-60}
host=$(rustc -vV | sed -n 's/^host: //p')
target=$(pwd)/../../target/fuzz
export RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares --cfg fuzzing"

# The flags are for the fuzzed code, not for build scripts, hence the target; the seeds need no instrumentation.
RUSTFLAGS="" cargo run --locked --quiet -p seeds --target-dir "$target/seeds" -- "$target/seed"
[ $# -gt 0 ] || set -- client connect dockerfile_expand dockerfile_ignore dockerfile_lexer dockerfile_parser ext4 json manifest merge path \
    multipart records route rpc spawner tar tunnel
build=()
for name in "$@"; do build+=(--bin "$name"); done
cargo build --locked --release -p fuzz --target "$host" --target-dir "$target" "${build[@]}"

failed=()
for name in "$@"; do
    mkdir -p "$target/corpus/$name" "$target/crashes/$name"
    log="$target/$name.log"
    if "$target/$host/release/$name" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=2048 -max_len=16384 \
        -print_final_stats=1 -artifact_prefix="$target/crashes/$name/" \
        "$target/corpus/$name" "$target/seed/$name" >"$log" 2>&1; then
        verdict=ok
    else
        verdict="FAILED, see $log"
        failed+=("$name")
    fi
    awk -v name="$name" -v verdict="$verdict" '
        /^stat::number_of_executed_units/ { runs = $2 }
        / cov: / { for (i = 1; i < NF; i++) if ($i == "cov:") cov = $(i + 1) }
        END { printf "%-18s %10d runs %7d edges  %s\n", name, runs, cov, verdict }' "$log"
done
[ ${#failed[@]} -eq 0 ] || exit 1
