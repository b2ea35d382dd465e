#!/bin/sh
# Builds the installer's image twice from what is committed, from nothing, in two
# directories whose names differ in length, under two homes of Cargo: fails unless both
# have the same digest. Two release builds long: a quarter of an hour on two cores.
#
#   scripts/reproduce.sh
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
home=${CARGO_HOME:-$HOME/.cargo}
unset CARGO_TARGET_DIR
mkdir -p "$work/other-home-of-cargo"
for part in registry git config.toml; do
    [ ! -e "$home/$part" ] || ln -s "$home/$part" "$work/other-home-of-cargo/$part"
done

build() {
    git clone -q "$here" "$1"
    echo "building in $1 …"
    (cd "$1" && CARGO_HOME=$2 make -s image >"$work/log" 2>&1) || { tail -n 20 "$work/log"; exit 1; }
}
build "$work/a" "$home"
build "$work/a-longer-name/b" "$work/other-home-of-cargo"

same=yes
for name in casemate casemate-agent containerd-shim-casemate-v2; do
    set -- "$work"/a/target/*/release/$name "$work"/a-longer-name/b/target/*/release/$name
    cmp "$1" "$2" || same=no
    # Neither has a place of its building in it.
    ! grep -aqF -e "$work" -e "$home/" "$1" || { echo "$name has a path of its building"; same=no; }
done
cmp "$work/a/dist/image/index.json" "$work/a-longer-name/b/dist/image/index.json" || same=no
grep -o 'sha256:[0-9a-f]*' "$work/a/dist/image/index.json" | head -n 1
[ "$same" = yes ] || { echo "not the same"; exit 1; }
echo "the same twice"
