#!/bin/bash
# Runs trials inside the cloud kernels of the given Debian suites, with cgroup v2
# alone: those of tests/vm-trials.txt, and for SUITE:systemd, where the suite's
# systemd is process 1, those of tests/vm-systemd-trials.txt. SUITE:selinux boots
# with SELinux in place of AppArmor, for the one trial about it, SUITE:bare without
# nf_tables. SUITE alone also runs the guard's own tests on nf_tables, but for its speed.
#
#   TARGET=DIR scripts/vm-test.sh SUITE[:systemd|:selinux|:bare]…
#
# DIR has our binaries; its deps/ the trials.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
binaries=${TARGET:?}
newest() {
  find "$binaries/deps" -maxdepth 1 -type f -executable -name "$1-*" -printf '%T@ %p\n' |
    sort -n | tail -n 1 | cut -d' ' -f2 | grep . ||
    { echo "no program $1 in $binaries/deps" >&2; return 1; }
}
trials=$(newest e2e)
guard=$(newest kernel)

export CASEMATE_TEST_BIN_DIR=$binaries
copy="$trials $guard $here/tests/allowed-skips.txt"
for name in casemate casemate-agent containerd-shim-casemate-v2 probe testbed; do
  copy+=" $binaries/$name"
done
failed=0
for where in "$@"; do
  list=$here/tests/vm-trials.txt
  # One emulated processor: more trials at a time than two only wait for each other.
  program=(sh -c 'uname -r; cat /proc/1/comm; "$0" --test-threads 2 && exec "$1" --skip in_no_time' "$trials" "$guard")
  unset VM_SYSTEMD VM_APPEND CASEMATE_TEST_NODE CASEMATE_TEST_SLICE CASEMATE_TEST_SELINUX
  if [ "${where#*:}" != "$where" ]; then
    program=(sh -c 'uname -r; cat /proc/1/comm; exec "$0" --test-threads 2' "$trials")
  fi
  if [ "${where#*:}" = systemd ]; then
    list=$here/tests/vm-systemd-trials.txt
    export VM_SYSTEMD=1 CASEMATE_TEST_SLICE=casemate_vm-tests.slice CASEMATE_TEST_NODE=1
  fi
  if [ "${where#*:}" = selinux ]; then
    list=$here/tests/vm-selinux-trials.txt
    export VM_APPEND="selinux=1 lsm=landlock,lockdown,yama,integrity,selinux" CASEMATE_TEST_SELINUX=1
  fi
  if [ "${where#*:}" = bare ]; then
    list=$here/tests/vm-bare-trials.txt
    export VM_APPEND="casemate.without=nf_tables"
  fi
  export CASEMATE_TEST_LIST=$list VM_COPY="$copy $list"
  VM_SECONDS=${VM_SECONDS:-1200} "$here/scripts/vm.sh" "${where%%:*}" "${program[@]}" || failed=1
done
exit "$failed"
