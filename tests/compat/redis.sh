# what: redis-server as another user, with a benchmark, a snapshot by fork and an append-only file
# packages: redis-server redis-tools perl-base
# set: some
mkdir -p d
chown redis d
perl -e '$name = shift; (undef, undef, $uid, $gid) = getpwnam $name; $( = $gid; $) = "$gid $gid"; $< = $uid; $> = $uid; exec @ARGV or die' redis redis-server --dir "$PWD/d" --bind 127.0.0.1 --appendonly yes --daemonize no >log 2>&1 &
n=0; until [ "$(redis-cli ping 2>/dev/null)" = PONG ]; do n=$((n + 1)); [ $n -lt 100 ] || { cat log; exit 1; }; sleep 0.1; done
redis-benchmark -q -n 5000 -c 20 -t set,get,lpush
redis-cli set k v; redis-cli bgsave
n=0; until [ -s d/dump.rdb ]; do n=$((n + 1)); [ $n -lt 100 ] || { cat log; exit 1; }; sleep 0.1; done
redis-cli lastsave
[ "$(redis-cli get k)" = v ]
redis-cli shutdown nosave || true
wait
