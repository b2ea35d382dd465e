#!/bin/bash
# `make run`: install what is missing, build, and show one container from
# inside. The command to run instead of the tour is in $CMD.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ "$(id -u)" != 0 ]; then
  echo "make run: needs root, for containerd; try: sudo make run" >&2
  exit 1
fi
scripts/packages.sh
# The build that `make test` goes on with.
cargo build --profile quick --locked --workspace --bins

bin="$(pwd)/target/$(uname -m)-unknown-linux-gnu/quick"
if [ -n "${CARGO_TARGET_DIR:-}" ]; then
  bin="$CARGO_TARGET_DIR/$(uname -m)-unknown-linux-gnu/quick"
fi
export CASEMATE_TEST_BIN_DIR="$bin"
words=()
if [ -n "${CMD:-}" ]; then
  # The user's own words, with the user's own quotes.
  eval "words=($CMD)"
fi
exec "$bin/testbed" run -- "${words[@]}"
