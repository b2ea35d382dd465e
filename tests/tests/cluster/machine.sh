#!/bin/bash
# A node that is a machine, with systemd as process 1 and cgroup v2: what its administrator
# would have set up, then its services, until the machine is ended. Run in it, as a service.
#
#   machine.sh DIR HOST ADDRESS GATEWAY CONTAINERD CNI KUBELET TREE
#
# DIR/etc is what the node has in /etc beside the least, CONTAINERD and CNI are directories
# of programs, KUBELET is one, TREE a script that tells what an installer could change.
set -eu

dir=$1 host=$2 address=$3 gateway=$4 containerd=$5 cni=$6 kubelet=$7 tree=$8

echo "$host" >/proc/sys/kernel/hostname
mount --make-rshared /
cp -r "$dir/etc/." /etc/
cp "$containerd"/* "$kubelet" /usr/bin/
mkdir -p /opt/cni/bin /usr/local/bin /var/lib/kubelet /var/log
cp "$cni"/* /opt/cni/bin/
nic=$(ls -d /sys/class/net/e* | head -n 1)
nic=${nic##*/}
ip link set "$nic" up
ip addr add "$address/32" dev "$nic"
ip route add "$gateway/32" dev "$nic"
ip route add default via "$gateway" dev "$nic" onlink src "$address"
echo 1 >/proc/sys/net/ipv4/ip_forward
# Busybox has what the node lacks.
for applet in chroot cmp sha256sum sort sync tee wc; do
    [ -e "/usr/bin/$applet" ] || ln -s busybox "/usr/bin/$applet"
done

# As containerd has its unit; each start leaves a line.
cat >/etc/systemd/system/containerd.service <<'UNIT'
[Unit]
DefaultDependencies=no
[Service]
ExecStartPre=/bin/sh -c 'echo containerd >>/var/log/starts'
ExecStart=/usr/bin/containerd
StandardOutput=append:/var/log/containerd.log
StandardError=inherit
Type=notify
Delegate=yes
KillMode=process
Restart=always
RestartSec=5
LimitNPROC=infinity
LimitCORE=infinity
TasksMax=infinity
OOMScoreAdjust=-999
UNIT
cat >/etc/systemd/system/kubelet.service <<UNIT
[Unit]
DefaultDependencies=no
[Service]
ExecStart=/usr/bin/kubelet --config=/etc/kubernetes/kubelet.json --kubeconfig=/etc/kubernetes/kubelet --hostname-override=$host --node-ip=$address
StandardOutput=append:/var/log/kubelet.log
StandardError=inherit
Restart=always
RestartSec=10
UNIT
systemctl daemon-reload
systemctl start containerd
sh "$tree" >/root/before
systemctl start kubelet
echo "the node is up"
exec sleep infinity
