# what: ssh: keys are made, sshd lets its user in, a command runs with a terminal, scp copies
# fails with strict: sshd separates its privileges by chroot(2), and strict has no nested roots
# shown with strict: chroot("/run/sshd"): Operation not permitted
# packages: openssh-server openssh-client
# set: some
mkdir -p /run/sshd /root/.ssh; chmod 700 /root /root/.ssh; chmod 755 /run/sshd
ssh-keygen -q -t ed25519 -N '' -f host; ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id; cp /root/.ssh/id.pub /root/.ssh/authorized_keys
cat >conf <<END
Port 2222
ListenAddress 127.0.0.1
HostKey $PWD/host
StrictModes no
UsePAM no
PidFile $PWD/pid
Subsystem sftp internal-sftp
END
/usr/sbin/sshd -f "$PWD/conf" -E "$PWD/log"
# It is in the background before it listens; its pid is written after.
for _ in $(seq 200); do [ -s pid ] && break; sleep 0.05; done
o="-q -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -i /root/.ssh/id"
[ "$(ssh $o -p 2222 root@127.0.0.1 echo in)" = in ] || { tail -n 5 log; exit 1; }
[ "$(ssh $o -tt -p 2222 root@127.0.0.1 tty </dev/null | cut -c1-8)" = /dev/pts ] || { tail -n 5 log; exit 1; }
echo x >from
scp $o -P 2222 from root@127.0.0.1:"$PWD/to"
cmp from to
kill "$(cat pid)"
