#!/bin/sh
# Runs the core's unit and integration tests under valgrind's memcheck; any error, or any block that is lost for sure, fails.
set -eu

command -v valgrind >/dev/null || {
    echo "error: valgrind is missing. Install it (Debian, Ubuntu: apt install valgrind; Fedora: dnf install valgrind; none for macOS on arm64)." >&2
    exit 1
}
host=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')

runner="CARGO_TARGET_${host}_RUNNER"
check="valgrind --quiet --error-exitcode=99"
export PROPTEST_CASES="${PROPTEST_CASES:-8}" # memcheck is about fifty times slower

# A thread pool lives until the process ends, so "still reachable" and "possibly lost" blocks (thread stacks) are no errors.
leaks="--leak-check=full --show-leak-kinds=definite --errors-for-leak-kinds=definite"
env "$runner=$check $leaks" cargo test --package paramstate --release --lib --tests -- --test-threads=2 --skip made_by_fork

# A forked child has lost the threads, and with them the blocks that only their stacks lead to: no look for leaks there.
env "$runner=$check" cargo test --package paramstate --release --test workers -- made_by_fork
