#!/bin/bash
# A node of its own on this machine: its root, processes, cgroups and host name are in
# namespaces, so that programs find everything at its usual place and nothing of the
# machine's is touched. It ends, with all that runs on it, when its standard input does.
#
#   node.sh DIR NAME HOST CONTAINERD CNI KUBE    the caller is in the node's network namespace
#
# DIR/etc is what the node has in /etc beside the least, DIR/units a program for each
# service; CONTAINERD, CNI and KUBE are directories of programs.
set -eu

dir=$1 name=$2 host=$3 containerd=$4 cni=$5 kube=$6

if [ "${7:-}" != inside ]; then
    # A cgroup of its own in each hierarchy, which the node takes for the root.
    for hierarchy in /sys/fs/cgroup/*/; do
        [ -e "${hierarchy}cgroup.procs" ] || continue
        own=$hierarchy$name
        mkdir "$own"
        if [ -e "$own/cpuset.cpus" ]; then
            cat "${hierarchy}cpuset.cpus" >"$own/cpuset.cpus"
            cat "${hierarchy}cpuset.mems" >"$own/cpuset.mems"
        fi
        echo $$ >"$own/cgroup.procs"
    done
    exec unshare --mount --pid --cgroup --uts --ipc --fork --kill-child \
        "$BASH" "$0" "$@" inside
fi

hostname "$host"
mount --make-rprivate /
root=$dir/root
mkdir -p "$root" "$dir/usr" "$dir/usr-work"
mount --bind "$root" "$root"
cd "$root"
mkdir -p usr etc var/lib var/log var/tmp opt/cni/bin run tmp proc sys dev root srv/units srv/kube old
chmod 1777 tmp var/tmp
ln -s /run var/run
mount -t overlay -o "lowerdir=/usr,upperdir=$dir/usr,workdir=$dir/usr-work" node usr
for link in bin sbin lib lib64; do
    [ ! -h "/$link" ] || cp -a "/$link" .
done
for file in passwd group nsswitch.conf ld.so.cache; do
    cp "/etc/$file" etc/
done
cp -r "$dir/etc/." etc/
cp "$containerd"/* usr/bin/
mount --bind "$cni" opt/cni/bin
mount --bind "$dir/units" srv/units
mount --bind "$kube" srv/kube
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /dev dev
mount -t tmpfs -o mode=755 run run
mount -t tmpfs -o mode=755 cgroups sys/fs/cgroup
while IFS=: read -r id controllers _; do
    at=${controllers#name=}
    if [ "$id" = 0 ]; then
        mkdir sys/fs/cgroup/unified
        mount -t cgroup2 cgroup2 sys/fs/cgroup/unified
    else
        mkdir "sys/fs/cgroup/$at"
        [ "$at" = "$controllers" ] || controllers=none,$controllers
        mount -t cgroup -o "$controllers" cgroup "sys/fs/cgroup/$at"
    fi
done </proc/self/cgroup
pivot_root . old
cd /
umount -l old
rmdir old
mount --make-rshared /

# In place of systemd: `systemctl VERB UNIT` asks process 1, which is this script, so
# that a service never runs in the namespaces and cgroups of who asked.
cat >/usr/bin/systemctl <<'ASK'
#!/bin/sh
case $1 in
    # What kubeadm does besides, and asks of firewalld.
    daemon-reload | is-enabled) exit 0 ;;
    is-active) echo inactive && exit 3 ;;
esac
answer=$(mktemp -u /run/services/XXXXXX)
mkfifo "$answer"
echo "$1 ${2%.service} $answer" >/run/services/ask
read -r status <"$answer"
rm "$answer"
exit "$status"
ASK
chmod 755 /usr/bin/systemctl
mkdir -p /run/services
mkfifo /run/services/ask
declare -A pids
stop() {
    local pid=${pids[$1]:-}
    [ -n "$pid" ] || return 0
    kill "$pid" 2>/dev/null
    wait "$pid"
    unset "pids[$1]"
    return 0
}
start() {
    [ -x "/srv/units/$1" ] || return 5
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin \
        setsid "/srv/units/$1" >>"/var/log/$1.log" 2>&1 </dev/null 8<&- 9<&- &
    pids[$1]=$!
    echo "$1" >>/var/log/starts
}
set +e
exec 8<&0 9<>/run/services/ask </dev/null
{
    read -r _ <&8
    echo "end - -" >/run/services/ask
} &
echo up
while :; do
    # A moment's pause, so that the shell gets round to reaping orphans.
    read -r -t 1 verb unit answer <&9 || continue
    case $verb in
        start) start "$unit" ;;
        stop) stop "$unit" ;;
        restart)
            stop "$unit"
            start "$unit"
            ;;
        end) exit 0 ;;
        *) false ;;
    esac
    echo $? >"$answer"
done
