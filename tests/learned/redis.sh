# what: snapshots by fork and an append-only file; a benchmark of 20 clients, 20,000 requests, pub/sub, a rewrite
# packages: redis-server redis-tools
# server: /usr/bin/redis-server --dir /w/d --bind 127.0.0.1 --appendonly yes --daemonize no
# user: 102
# stop: 15
mkdir -p /w/d
chown 102:102 /w/d
#: load
n=0; until [ "$(redis-cli ping 2>/dev/null)" = PONG ]; do n=$((n + 1)); [ $n -lt 100 ]; sleep 0.1; done
redis-benchmark -q -n 5000 -c 20 -t set,get,lpush,incr
redis-cli set k v
saved=$(redis-cli lastsave); sleep 1
redis-cli bgsave
n=0; until [ "$(redis-cli lastsave)" != "$saved" ]; do n=$((n + 1)); [ $n -lt 100 ]; sleep 0.1; done
redis-cli bgrewriteaof
n=0; until redis-cli info persistence | grep -q aof_rewrite_in_progress:0; do n=$((n + 1)); [ $n -lt 100 ]; sleep 0.1; done
redis-cli info persistence | grep -q aof_last_bgrewrite_status:ok
redis-cli publish c x
redis-cli del mylist
redis-cli flushall async
redis-cli set k v
[ "$(redis-cli get k)" = v ]
