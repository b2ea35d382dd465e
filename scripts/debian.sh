# Packages of any Debian suite, unpacked beside the system: nothing is installed,
# the system's package state is not touched. To be sourced.
#
#   debian_suites STATE SUITE…     prepares STATE (a directory) for these suites
#   debian_fetch NAME SUITE DEST   unpacks NAME of SUITE into DEST, says its version
#   debian_fetch_all SUITE DEST NAME…   the same of many, in a fraction of the time
#
# The apt sources are the machine's own with the suite changed: mirrors, proxies
# and keys stay those of the machine.

debian_codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")

debian_suites() {
    debian_state=$1; shift
    mkdir -p "$debian_state/lists/partial" "$debian_state/cache/archives/partial" "$debian_state/deb"
    [ -n "$debian_codename" ] || { echo "no VERSION_CODENAME in /etc/os-release: needs Debian" >&2; return 1; }

    # One deb822 paragraph, made from the machine's first paragraph (or line)
    # whose suite is the codename itself.
    uri='' key='' line=''
    for file in /etc/apt/sources.list.d/*.sources; do
        [ -e "$file" ] || continue
        found=$(awk -v suite="$debian_codename" 'BEGIN { RS = "" } {
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
            grep -E "^deb .* $debian_codename " | head -n 1 || true)
        uri=$(echo "$line" | sed -E 's/^deb (\[[^]]*\] )?//; s/ .*//')
        key=$(echo "$line" | sed -nE 's/.*signed-by=([^] ]+).*/\1/p')
    fi
    [ -n "$uri" ] || { echo "no apt source for $debian_codename on this machine" >&2; return 1; }

    {
        printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\n' "$uri" "$*"
        [ -z "$key" ] || printf 'Signed-By: %s\n' "$key"
    } > "$debian_state/suites.sources"
    debian_apt apt-get update || { echo "apt-get update failed: see above" >&2; return 1; }
}

debian_apt() {
    tool=$1; shift
    "$tool" -qq -o Dir::Etc::sourcelist="$debian_state/suites.sources" \
        -o Dir::Etc::sourceparts=/dev/null -o Dir::State::lists="$debian_state/lists" \
        -o Dir::Cache="$debian_state/cache" -o APT::Sandbox::User=root "$@"
}

debian_fetch() {
    (cd "$debian_state/deb" && rm -f "$1_"*.deb && debian_apt apt-get download "$1/$2") || return 1
    dpkg -x "$debian_state/deb/$1_"*.deb "$3"
    echo "$1: $(dpkg-deb -f "$debian_state/deb/$1_"*.deb Version)"
    rm -f "$debian_state/deb/$1_"*.deb
}

debian_fetch_all() {
    debian_suite=$1 debian_dest=$2; shift 2
    rm -rf "$debian_state/all" && mkdir -p "$debian_state/all"
    (cd "$debian_state/all" && debian_apt apt-get download $(printf "%s/$debian_suite " "$@")) || return 1
    for debian_file in "$debian_state"/all/*.deb; do
        dpkg -x "$debian_file" "$debian_dest" || return 1
    done
    echo "$* of $debian_suite"
    rm -rf "$debian_state/all"
}
