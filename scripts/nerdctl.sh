#!/bin/sh
# Puts nerdctl, built from its Go module, and the iptables that its networks need into a
# prefix of their own, for the tests that are about it. Nothing is installed; what can't
# be had is said, and those tests are skipped.
#
#   scripts/nerdctl.sh [PREFIX]        (default: target/daemons/nerdctl)
#
# No part of scripts/daemons.sh, since it takes some minutes.
set -eu

version=v2.2.1
here=$(cd "$(dirname "$0")" && pwd)
prefix=${1:-$here/../target/daemons/nerdctl}
mkdir -p "$prefix/bin"
prefix=$(cd "$prefix" && pwd)
. "$here/debian.sh"

exec 9>"$prefix/lock"
flock 9

# With the libraries of the same suite beside it, so wrapped.
iptables() {
    root=$prefix/iptables
    rm -rf "$root"
    debian_suites "$prefix/apt" "$debian_codename" || return 1
    packages=$(debian_apt apt-cache depends --recurse --no-recommends --no-suggests \
        --no-conflicts --no-breaks --no-replaces --no-enhances iptables |
        grep -E '^(iptables|lib(ip[46]tc|xtables|nftnl|mnl|netfilter|nfnetlink).*)$' | sort -u)
    # shellcheck disable=SC2086 # Names.
    debian_fetch_all "$debian_codename" "$root" $packages || return 1
    libraries=$root/usr/lib/$(uname -m)-linux-gnu
    for name in ip6tables iptables; do
        printf '#!/bin/sh\nLD_LIBRARY_PATH=%s XTABLES_LIBDIR=%s exec %s %s "$@"\n' "$libraries" \
            "$libraries/xtables" "$root/usr/sbin/xtables-nft-multi" "$name" >"$prefix/bin/$name"
        chmod 755 "$prefix/bin/$name"
    done
    "$prefix/bin/iptables" --version
}

# `go install` refuses a module that replaces others. What it replaces is for its own
# tests alone, and no part of the module as it is published: both are left out.
source_of() {
    dir=$(cd "$prefix" && go mod download -json "github.com/containerd/nerdctl/v2@$version" |
        sed -n 's/^[[:space:]]*"Dir": "\(.*\)",$/\1/p')
    [ -n "$dir" ]
    cp -r "$dir" "$build"
    chmod -R u+w "$build"
    rm -f "$build"/cmd/nerdctl/helpers/testing*.go
    tests=github.com/containerd/nerdctl/mod/tigron
    (cd "$build" && go mod edit -droprequire "$tests" -dropreplace "$tests")
}

if [ ! -x "$prefix/bin/iptables" ]; then
    iptables || echo "nerdctl: no iptables: its tests are skipped" >&2
    rm -rf "$prefix/apt"
fi
[ ! -x "$prefix/bin/nerdctl" ] || exit 0
if ! command -v go >/dev/null; then
    echo "nerdctl: no Go here: its tests are skipped" >&2
    exit 0
fi
echo "building nerdctl $version into $prefix …"
build=$prefix/build
rm -rf "$build"
if source_of 2>"$prefix/go.log" &&
    (cd "$build" && CGO_ENABLED=0 GOFLAGS=-mod=mod nice -n 15 timeout 1800 \
        go build -ldflags "-s -w" -o nerdctl ./cmd/nerdctl) 2>"$prefix/go.log" &&
    "$build/nerdctl" --version; then
    mv "$build/nerdctl" "$prefix/bin/nerdctl"
else
    tail -n 3 "$prefix/go.log" >&2
    echo "nerdctl: it can't be built here: its tests are skipped" >&2
fi
rm -rf "$build"
