#!/bin/sh
# Fetches the runtimes that `make bench` compares with into a prefix of its own.
#
#   scripts/peers.sh [PREFIX]        (default: target/peers)
#
# runc and crun come from the machine's own Debian suite, runsc from its
# backports (its Sentry is newer there).
set -eu

here=$(dirname "$0")
prefix=${1:-$here/../target/peers}
mkdir -p "$prefix/bin"
prefix=$(cd "$prefix" && pwd)
. "$here/debian.sh"

debian_suites "$prefix/apt" "$debian_codename" "$debian_codename-backports"
for name in runc:"$debian_codename" crun:"$debian_codename" runsc:"$debian_codename-backports" \
    libyajl2:"$debian_codename"; do
    debian_fetch "${name%%:*}" "${name#*:}" "$prefix/root" ||
        echo "${name%%:*}: not to be had from ${name#*:}" >&2
done

for name in runc crun runsc; do
    for dir in usr/bin usr/sbin; do
        [ -x "$prefix/root/$dir/$name" ] && ln -sf "../root/$dir/$name" "$prefix/bin/$name"
    done
done
ls -l "$prefix/bin"
