#!/bin/bash
# A root of Debian packages for the workloads of tests/compat: unpacked, not
# installed, so nothing of a package runs on this machine. Prints its directory.
#
#   scripts/compat-root.sh some|all|learned
#
# "some" has the packages of the workloads that are marked `# set: some`, "learned"
# those of tests/learned.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
. "$here/scripts/debian.sh"
set_=${1:?some, all or learned}
suite=bookworm
dir=$here/target/compat/$set_

# What every root has.
packages="base-files base-passwd bash coreutils dash grep sed mawk findutils tar gzip
  debianutils diffutils libc-bin util-linux login passwd hostname procps perl-base
  ca-certificates libnss-systemd-"
packages=${packages/libnss-systemd-/}
files=("$here"/tests/compat/*.sh)
[ "$set_" != learned ] || files=("$here"/tests/learned/*.sh)
for file in "${files[@]}"; do
  [ "$set_" != some ] || grep -q '^# set: some' "$file" || continue
  packages+=" $(sed -n 's/^# packages: //p' "$file")"
done
packages=$(printf '%s\n' $packages | sort -u)
want=$(printf '%s\n' "$packages" "$(cat "$0")" | sha256sum | cut -c1-16)
ready() { [ "$(cat "$dir/ready" 2>/dev/null)" = "$want" ]; }
if ready; then
  echo "$dir/root"
  exit
fi
# One at a time: they share what they download.
mkdir -p "$here/target/compat"
exec 9>"$here/target/compat/lock"
flock 9
if ready; then
  echo "$dir/root"
  exit
fi
root=$dir/root
rm -rf "$dir"
mkdir -p "$root"/{dev,proc,sys,run,tmp,root,home,etc,var/tmp,var/lib/dpkg/info} "$root"/usr/{bin,sbin,lib,lib64}
for name in bin sbin lib lib64; do ln -s "usr/$name" "$root/$name"; done
chmod 1777 "$root/tmp" "$root/var/tmp"

# The archives of the packages and of all that they need, of an empty system.
state=$here/target/compat/apt
debian_suites "$state" "$suite" >&2
debian_apt apt-get -y --download-only --no-install-recommends \
  -o Dir::State::status=/dev/null -o Debug::NoLocking=1 install $packages >&2
for package in $packages; do echo "$package"; done >"$dir/asked"
wanted=$(debian_apt apt-get -y --print-uris --no-install-recommends -o Dir::State::status=/dev/null \
  -o Debug::NoLocking=1 -o Dir::Cache::archives=/nonexistent install $packages | sed -n "s/^'[^']*' \([^ ]*\) .*/\1/p")
for file in $wanted; do
  deb=$state/cache/archives/$file
  dpkg-deb --fsys-tarfile "$deb" | tar -x --keep-directory-symlink -C "$root"
  # As installed, for dpkg and apt inside.
  dpkg-deb -f "$deb" | sed '1a Status: install ok installed' >>"$root/var/lib/dpkg/status"
  echo >>"$root/var/lib/dpkg/status"
  name=$(dpkg-deb -f "$deb" Package)
  dpkg-deb --fsys-tarfile "$deb" | tar -t | sed 's,^\.,,; s,/$,,; s,^$,/.,' >"$root/var/lib/dpkg/info/$name.list"
done

# What their scripts would have made, as far as the workloads need it.
cp "$root/usr/share/base-passwd/passwd.master" "$root/etc/passwd"
cp "$root/usr/share/base-passwd/group.master" "$root/etc/group"
id=100
for user in _apt postgres redis sshd messagebus; do
  echo "$user:x:$id:$id::/nonexistent:/bin/sh" >>"$root/etc/passwd"
  echo "$user:x:$id:" >>"$root/etc/group"
  id=$((id + 1))
done
echo "app:x:1000:1000::/tmp:/bin/bash" >>"$root/etc/passwd"
echo "app:x:1000:" >>"$root/etc/group"
echo "127.0.0.1 localhost" >"$root/etc/hosts"
for link in awk:mawk cc:gcc c99:gcc java:/usr/lib/jvm/java-17-openjdk-amd64/bin/java; do
  [ -e "$root/usr/bin/${link%%:*}" ] || ln -s "${link#*:}" "$root/usr/bin/${link%%:*}"
done
ldconfig -r "$root"
echo "$want" >"$dir/ready"
echo "$root"
