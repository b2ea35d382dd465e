#!/bin/bash
# Runs a command in a virtual machine with another Debian kernel, with cgroup v2
# alone, on a small root made of this machine's own programs. Emulated (TCG), so
# about ten times slower than native.
#
#   scripts/vm.sh SUITE COMMAND…     e.g. scripts/vm.sh bookworm uname -r
#   scripts/vm.sh SUITE              only gets what is needed for that
#
# SUITE is the Debian suite whose cloud kernel boots. VM_COPY names files and
# directories that are wanted inside at the same place. Variables CASEMATE_* are
# handed on. Kernels are kept in target/vm (or VM_DIR). VM_SECONDS bounds a run
# (default 900); VM_CPUS is 1, since some kernels panic under emulation with more. The exit code is the command's.
#
# With VM_SYSTEMD=1 process 1 is the suite's own systemd, and the command runs in
# a service. VM_APPEND is more for the kernel's command line. VM_NIC is a tap device,
# which the machine has as its network; VM_MEMORY its MiB (3072).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
dir=${VM_DIR:-$here/../target/vm}
suite=${1:?suite}; shift
mkdir -p "$dir"
dir=$(cd "$dir" && pwd)
. "$here/debian.sh"

# Block device, the file systems and devices that tests use, and the guard of networks.
modules="virtio_pci virtio_blk virtio_net ext4 overlay virtio_rng veth bridge tun loop
  nf_tables nft_reject_inet nft_ct nft_log nft_limit nfnetlink_log"
# Programs that the root has, with their libraries.
programs="bash sh containerd ctr containerd-shim-runc-v2 runc ip setsid mount umount
  cat ls ps sed grep awk sleep mkdir rm cp mv ln chmod chown env id uname dmesg
  unshare setpriv head tail timeout true false kill stat readlink tar gzip find mkfifo tr
  apparmor_parser secilc"

say() { echo "vm: $*" >&2; }

need=()
command -v qemu-system-x86_64 >/dev/null || need+=(qemu-system-x86)
command -v modprobe >/dev/null || need+=(kmod)
command -v cpio >/dev/null || need+=(cpio)
command -v mkfs.ext4 >/dev/null || need+=(e2fsprogs)
command -v xz >/dev/null || need+=(xz-utils)
command -v zstd >/dev/null || need+=(zstd)
busybox=$(command -v busybox || true)
{ [ -n "$busybox" ] && ! ldd "$busybox" >/dev/null 2>&1; } || need+=(busybox-static)
if [ ${#need[@]} -gt 0 ]; then
  say "installing ${need[*]}"
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${need[@]}" >/dev/null
fi
busybox=$(command -v busybox)

# A kernel and an initramfs with the modules that lead to the root.
kernel=$dir/$suite
if [ ! -e "$kernel/ready-5" ]; then
  rm -rf "$kernel"
  mkdir -p "$kernel/root"
  debian_suites "$dir/apt-$suite" "$suite" >&2
  package=$(debian_apt apt-cache depends linux-image-cloud-amd64 |
    sed -nE 's/.*Depends: (linux-image-[0-9][^ ]*)/\1/p' | head -n 1)
  [ -n "$package" ] || { say "no linux-image-cloud-amd64 in $suite"; exit 1; }
  # Newer suites put the image and the modules into packages of their own.
  for part in "$package" $(debian_apt apt-cache depends "$package" |
    sed -nE 's/.*Depends: (linux-(image|binary|modules)-[0-9][^ ]*)/\1/p'); do
    debian_fetch "$part" "$suite" "$kernel/root" >&2
  done
  image=$(find "$kernel/root" -type f -name 'vmlinuz*' -print -quit)
  [ -d "$kernel/root/lib" ] || ln -s usr/lib "$kernel/root/lib"
  release=$(basename "$(ls -d "$kernel"/root/lib/modules/*)")
  cp "$image" "$kernel/vmlinuz"
  depmod -b "$kernel/root" "$release"
  tree=$kernel/initramfs
  mkdir -p "$tree/bin" "$tree/lib" "$tree/proc" "$tree/dev" "$tree/sys" "$tree/new"
  cp "$busybox" "$tree/bin/busybox"
  : >"$tree/lib/order"
  for module in $modules; do
    modprobe -d "$kernel/root" -S "$release" --show-depends "$module" 2>/dev/null |
      sed -n 's/^insmod \([^ ]*\).*/\1/p' || true
  done | awk '!seen[$0]++' | while read -r file; do
    name=$(basename "$file" | sed 's/\.ko.*/.ko/')
    case $file in
      *.xz) xz -dc "$file" >"$tree/lib/$name" ;;
      *.zst) zstd -qdc "$file" >"$tree/lib/$name" ;;
      *) cp "$file" "$tree/lib/$name" ;;
    esac
    echo "$name" >>"$tree/lib/order"
  done
  cat >"$tree/init" <<'INIT'
#!/bin/busybox sh
/bin/busybox mkdir -p /bin /proc
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
export PATH=/bin
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do
  # With casemate.without=nf_tables on the command line: a kernel that lacks it.
  case $(cat /proc/cmdline),$module in
    *casemate.without=nf_tables*,nf_tables.ko | *casemate.without=nf_tables*,nft_* | \
      *casemate.without=nf_tables*,nfnetlink*) continue ;;
  esac
  insmod "/lib/$module" || echo "vm: no module $module"
done </lib/order
fail() { echo "vm: $*"; echo "casemate-vm exit 125"; echo o >/proc/sysrq-trigger; sleep 60; }
mount -t ext4 /dev/vda /new || fail "no root"
mount -t tmpfs tmpfs /new/run || fail "no tmpfs"
mount --move /proc /new/proc
mount --move /sys /new/sys
mount --move /dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts -o ptmxmode=666 devpts /new/dev/pts
mount -t tmpfs tmpfs /new/dev/shm
program=$(cat /program)
case $program in
  # It mounts what it wants itself.
  *systemd) ;;
  *) mount -t cgroup2 cgroup2 /new/sys/fs/cgroup || fail "no cgroup v2" ;;
esac
mount -t securityfs securityfs /new/sys/kernel/security
ifconfig lo up
hostname casemate-vm
cp /command /new/run/command
exec switch_root /new $program
INIT
  chmod +x "$tree/init"
  (cd "$tree" && find . | cpio -o -H newc --quiet | gzip -1) >"$kernel/initramfs.gz"
  touch "$kernel/ready-5"
fi

# systemd with all libraries that it loads or may load.
system=$kernel/systemd
if [ -n "${VM_SYSTEMD:-}" ] && [ ! -e "$system/ready" ]; then
  rm -rf "$system"
  mkdir -p "$system/root"
  debian_suites "$dir/apt-$suite" "$suite" >&2
  libraries=$(debian_apt apt-cache depends --recurse --no-suggests --no-conflicts --no-breaks \
    --no-replaces --no-enhances --no-recommends systemd | grep -E '^lib' | grep -v : | sort -u)
  # shellcheck disable=SC2086 # Names.
  debian_fetch_all "$suite" "$system/root" systemd $libraries >&2
  # Nothing here is for them to set up.
  rm -rf "$system"/root/{usr/,}lib/systemd/system-generators
  touch "$system/ready"
fi

# What loads profiles and policies of security modules, for this machine's libraries.
tools=$dir/tools
if [ ! -e "$tools/ready" ]; then
  rm -rf "$tools"
  mkdir -p "$tools/root"
  debian_suites "$dir/apt-$debian_codename" "$debian_codename" >&2
  for package in apparmor secilc; do
    debian_fetch "$package" "$debian_codename" "$tools/root" >&2
  done
  touch "$tools/ready"
fi

[ $# -gt 0 ] || exit 0
run=$(mktemp -d "${TMPDIR:-/tmp}/vm.XXXXXX")
qemu=
trap '[ -z "$qemu" ] || kill "$qemu" 2>/dev/null; rm -rf "$run"' EXIT

# What pid 1 runs: the command, then its exit code on the console.
{
  printf 'export PATH=/bin:/usr/bin:/usr/sbin HOME=/root\n'
  for name in ${!CASEMATE_@}; do printf 'export %s=%q\n' "$name" "${!name}"; done
  # What service managers give to containerd.
  printf 'ulimit -n 65536\ncd %q || exit\n' "$PWD"
  printf '%q ' "$@"
  # On a line of its own: newer systemd writes to the console, too, without ending its line.
  printf '\ncode=$?\necho\necho "casemate-vm exit $code"\necho o >/proc/sysrq-trigger\nsleep 60\n'
} >"$run/command"
if [ -n "${VM_SYSTEMD:-}" ]; then
  echo /usr/lib/systemd/systemd >"$run/program"
else
  echo "/bin/bash /run/command" >"$run/program"
fi
(cd "$run" && printf 'command\nprogram\n' | cpio -o -H newc --quiet | gzip -1) >"$run/command.gz"
cat "$kernel/initramfs.gz" "$run/command.gz" >"$run/initrd"

# The root: programs, what they load, what the caller wants.
tree=$run/root
mkdir -p "$tree"/{etc,proc,sys,dev,run,tmp,root,var/lib,usr/bin,usr/sbin,usr/lib,usr/lib64}
for name in bin sbin lib lib64; do ln -s "usr/$name" "$tree/$name"; done
chmod 1777 "$tree/tmp"
cp "$busybox" "$tree/bin/busybox"
for name in $programs; do
  file=$(PATH=$PATH:$tools/root/sbin:$tools/root/usr/bin type -P "$name") || continue
  file=$(realpath "$file")
  cp "$file" "$tree/bin/$name"
  ldd "$file" 2>/dev/null | grep -oE '/[^ ]+' | while read -r library; do
    [ -e "$tree$library" ] || { mkdir -p "$tree$(dirname "$library")"; cp -L "$library" "$tree$library"; }
  done || true
done
for applet in vi top ping nc mknod rmdir touch sync df free; do
  [ -e "$tree/bin/$applet" ] || ln -s busybox "$tree/bin/$applet"
done
cp /etc/passwd /etc/group /etc/os-release "$tree/etc/"
if [ -n "${VM_SYSTEMD:-}" ]; then
  for name in bin sbin lib lib64; do
    for part in "$system/root/$name" "$system/root/usr/$name"; do
      [ ! -d "$part" ] || cp -a --remove-destination "$part/." "$tree/usr/$name/"
    done
  done
  printf '%032d\n' 1 >"$tree/etc/machine-id"
  mkdir -p "$tree/etc/systemd/system"
  printf '[Unit]\nRequires=vm.service\n' >"$tree/etc/systemd/system/vm.target"
  # As containerd's own unit: its children are not systemd's business.
  cat >"$tree/etc/systemd/system/vm.service" <<'UNIT'
[Unit]
DefaultDependencies=no
[Service]
ExecStart=/bin/bash /run/command
StandardOutput=file:/dev/ttyS0
StandardError=inherit
Delegate=yes
KillMode=process
LimitNOFILE=65536
TasksMax=infinity
UNIT
fi
for path in ${VM_COPY:-}; do
  mkdir -p "$tree$(dirname "$path")"
  cp -a "$path" "$tree$path"
done
mkdir -p "$tree$PWD"
truncate -s 6G "$run/disk"
mkfs.ext4 -q -d "$tree" "$run/disk"
rm -rf "$tree"

say "booting $suite"
timeout "${VM_SECONDS:-900}" qemu-system-x86_64 -machine q35 -accel tcg,thread=multi -cpu max \
  -smp "${VM_CPUS:-1}" -m "${VM_MEMORY:-3072}" -nodefaults -display none -no-reboot -serial "file:$run/console" \
  -kernel "$kernel/vmlinuz" -initrd "$run/initrd" \
  -append "console=ttyS0 quiet panic=-1 lsm=landlock,lockdown,yama,integrity,apparmor systemd.unit=vm.target systemd.show_status=0 ${VM_APPEND:-}" \
  -drive "file=$run/disk,format=raw,if=virtio,cache=unsafe" -device virtio-rng-pci \
  ${VM_NIC:+-netdev tap,id=nic,ifname="$VM_NIC",script=no,downscript=no -device virtio-net-pci,netdev=nic} \
  </dev/null &
qemu=$!
tail --pid="$qemu" -n +1 -F "$run/console" 2>/dev/null | tr -d '\r' || true
wait "$qemu" || true
qemu=
code=$(tr -d '\r' <"$run/console" | sed -n 's/^casemate-vm exit \([0-9]*\)$/\1/p' | tail -n 1)
[ -n "$code" ] || { say "$suite ended without an exit code: time is up, or the kernel panicked"; exit 124; }
exit "$code"
