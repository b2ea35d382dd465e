#!/bin/sh
# Fetches the runtimes that `make bench` compares with into a prefix of its own:
# nothing is installed, the system's package state is not touched.
#
#   scripts/peers.sh [PREFIX]        (default: target/peers)
#
# runc and crun come from the machine's own Debian suite, runsc from its
# backports (its Sentry is newer there). The apt sources are the machine's own
# with the suite changed: mirrors, proxies and keys stay those of the machine.
set -eu

prefix=${1:-$(dirname "$0")/../target/peers}
mkdir -p "$prefix"
prefix=$(cd "$prefix" && pwd)
state=$prefix/apt
mkdir -p "$state/lists/partial" "$state/cache/archives/partial" "$state/deb" "$prefix/bin"

codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
[ -n "$codename" ] || { echo "peers.sh: no VERSION_CODENAME in /etc/os-release: needs Debian" >&2; exit 1; }

# One deb822 paragraph per suite, made from the machine's first paragraph (or
# line) whose suite is the codename itself.
uri='' key='' line=''
for file in /etc/apt/sources.list.d/*.sources; do
    [ -e "$file" ] || continue
    found=$(awk -v suite="$codename" 'BEGIN { RS = "" } {
        u = ""; s = ""; k = ""; n = split($0, rows, "\n")
        for (i = 1; i <= n; i++) {
            if (rows[i] ~ /^URIs:/)      { u = rows[i]; sub(/^URIs:[ \t]*/, "", u) }
            if (rows[i] ~ /^Suites:/)    { s = " " rows[i] " " }
            if (rows[i] ~ /^Signed-By:/) { k = rows[i]; sub(/^Signed-By:[ \t]*/, "", k) }
        }
        if (u != "" && index(s, " " suite " ")) { print u "|" k; exit }
    }' "$file")
    if [ -n "$found" ]; then uri=${found%%|*}; key=${found#*|}; break; fi
done
if [ -z "$uri" ]; then
    line=$(cat /etc/apt/sources.list /etc/apt/sources.list.d/*.list 2>/dev/null |
        grep -E "^deb .* $codename " | head -n 1 || true)
    uri=$(echo "$line" | sed -E 's/^deb (\[[^]]*\] )?//; s/ .*//')
    key=$(echo "$line" | sed -nE 's/.*signed-by=([^] ]+).*/\1/p')
fi
[ -n "$uri" ] || { echo "peers.sh: no apt source for $codename on this machine" >&2; exit 1; }

{
    printf 'Types: deb\nURIs: %s\nSuites: %s %s-backports\nComponents: main\n' \
        "$uri" "$codename" "$codename"
    [ -z "$key" ] || printf 'Signed-By: %s\n' "$key"
} > "$state/peers.sources"

apt() {
    tool=$1; shift
    "$tool" -qq -o Dir::Etc::sourcelist="$state/peers.sources" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::lists="$state/lists" -o Dir::Cache="$state/cache" \
        -o APT::Sandbox::User=root "$@"
}

apt apt-get update || { echo "peers.sh: apt-get update failed: see above" >&2; exit 1; }
for name in runc:"$codename" crun:"$codename" runsc:"$codename-backports" libyajl2:"$codename"; do
    package=${name%%:*} suite=${name#*:}
    if (cd "$state/deb" && rm -f "${package}_"*.deb && apt apt-get download "$package/$suite"); then
        dpkg -x "$state/deb/${package}_"*.deb "$prefix/root"
        echo "$package: $(dpkg-deb -f "$state/deb/${package}_"*.deb Version)"
    else
        echo "$package: not to be had from $suite" >&2
    fi
done

for name in runc crun runsc; do
    for dir in usr/bin usr/sbin; do
        [ -x "$prefix/root/$dir/$name" ] && ln -sf "../root/$dir/$name" "$prefix/bin/$name"
    done
done
ls -l "$prefix/bin"
