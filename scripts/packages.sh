#!/bin/bash
# Installs from Debian what the test bed needs and the machine lacks. As root;
# says nothing when there is nothing to do.
set -euo pipefail

missing=()
need() { command -v "$1" >/dev/null || missing+=("$2"); }
need containerd containerd
need runc runc
need ip iproute2
need setsid util-linux
need make make
need protoc protobuf-compiler
if ! command -v cc >/dev/null; then
  missing+=(gcc libc6-dev)
fi
busybox=$(command -v busybox || true)
if [ -z "$busybox" ] || ldd "$busybox" >/dev/null 2>&1; then
  missing+=(busybox-static)
fi
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ]; then
  echo "install ${missing[*]}: needs root; or run: apt-get install ${missing[*]}" >&2
  exit 1
fi
echo "installing ${missing[*]} …" >&2
export DEBIAN_FRONTEND=noninteractive
# A policy of its own for the time of the installation: the package would start
# a system-wide containerd, which nobody asked for.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy"
  chmod 755 "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
