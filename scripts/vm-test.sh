#!/bin/bash
# Runs tests/vm-trials.txt inside the cloud kernels of the given Debian suites.
#
#   TARGET=DIR scripts/vm-test.sh SUITE…     DIR has our binaries; its deps/ the trials
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
binaries=${TARGET:?}
trials=$(find "$binaries/deps" -maxdepth 1 -type f -executable -name 'e2e-*' -printf '%T@ %p\n' |
  sort -n | tail -n 1 | cut -d' ' -f2)
[ -n "$trials" ] || { echo "no e2e program in $binaries/deps" >&2; exit 1; }

export CASEMATE_TEST_BIN_DIR=$binaries CASEMATE_TEST_LIST=$here/tests/vm-trials.txt
export VM_COPY="$trials $here/tests/allowed-skips.txt $CASEMATE_TEST_LIST"
for name in casemate casemate-agent containerd-shim-casemate-v2 probe testbed; do
  VM_COPY+=" $binaries/$name"
done
failed=0
for suite in "$@"; do
  VM_SECONDS=${VM_SECONDS:-300} "$here/scripts/vm.sh" "$suite" sh -c 'uname -r; exec "$0"' "$trials" ||
    failed=1
done
exit "$failed"
