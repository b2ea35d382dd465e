#!/bin/sh
# Unpacks containerd of several generations, each with its ctr and stock shim,
# and the CNI plugins, into a prefix of their own. Nothing is installed.
#
#   scripts/daemons.sh [PREFIX]        (default: target/daemons)
#
# PREFIX/1.6, 1.7, 2.1, 2.3 and cni then have a directory bin. What is there
# already is left as it is; what can't be had is said, and its tests are skipped.
# 1.6, 1.7 and 2.1 are what Debian 12, 13 and unstable have. 2.3 is no package:
# it is built from its Go module (a minute), where the machine has Go.
set -eu

here=$(dirname "$0")
prefix=${1:-$here/../target/daemons}
mkdir -p "$prefix"
prefix=$(cd "$prefix" && pwd)
. "$here/debian.sh"

lacks() { [ ! -e "$prefix/$1/bin/$2" ]; }
complete() {
    ! { lacks 1.6 containerd || lacks 1.7 containerd || lacks 2.1 containerd || lacks cni bridge ||
        { lacks 2.3 ctr && command -v go >/dev/null; }; }
}
! complete || exit 0

# One at a time: two test runs may begin together.
exec 9>"$prefix/lock"
flock 9
! complete || exit 0

# A generation is moved to its place whole, or not at all.
place() {
    name=$1 package=$2 suite=$3 from=$4
    rm -rf "$prefix/new"
    if timeout 300 sh -c '. "$0/debian.sh"; debian_state=$1; debian_fetch "$2" "$3" "$4"' \
        "$here" "$prefix/apt" "$package" "$suite" "$prefix/new"; then
        rm -rf "${prefix:?}/$name"
        mkdir -p "$prefix/$name"
        mv "$prefix/new/$from" "$prefix/$name/bin"
        # A suite's program may want more than this machine's C library has.
        if [ "$name" != cni ] && ! "$prefix/$name/bin/containerd" --version; then
            echo "daemons: containerd of $suite doesn't run here: the tests on $name are skipped" >&2
            rm -rf "${prefix:?}/$name"
        fi
    else
        echo "daemons: no $package of $suite: the tests on $name are skipped" >&2
    fi
    rm -rf "$prefix/new"
}

build() {
    for program in containerd ctr; do
        GOBIN=$prefix/new CGO_ENABLED=0 timeout 600 \
            go install "github.com/containerd/containerd/v2/cmd/$program@$1" || return 1
    done
    "$prefix/new/containerd" --version
}

if lacks 1.6 containerd || lacks 1.7 containerd || lacks 2.1 containerd || lacks cni bridge; then
    echo "unpacking containerd 1.6, 1.7, 2.1 and CNI plugins into $prefix …"
    debian_suites "$prefix/apt" bookworm trixie sid
    ! lacks cni bridge || place cni containernetworking-plugins bookworm usr/lib/cni
    ! lacks 1.6 containerd || place 1.6 containerd bookworm usr/bin
    ! lacks 1.7 containerd || place 1.7 containerd trixie usr/bin
    ! lacks 2.1 containerd || place 2.1 containerd sid usr/bin
    rm -rf "$prefix/apt"
fi
if lacks 2.3 ctr && command -v go >/dev/null; then
    echo "building containerd 2.3 into $prefix …"
    mkdir -p "$prefix/new" "$prefix/2.3"
    if build v2.3.4 2>"$prefix/go.log"; then
        rm -rf "$prefix/2.3/bin"
        mv "$prefix/new" "$prefix/2.3/bin"
    else
        tail -n 3 "$prefix/go.log" >&2
        echo "daemons: containerd 2.3 can't be built here: its tests are skipped" >&2
        rm -rf "$prefix/new"
    fi
fi
