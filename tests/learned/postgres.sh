# what: a database made before, over TCP; pgbench of four clients, a parallel query, a sort on disk, a dump, a checkpoint, a vacuum, a reload
# packages: postgresql-15 postgresql-client-15 util-linux
# server: /usr/lib/postgresql/15/bin/postgres -D /w/pg -c listen_addresses=127.0.0.1 -c unix_socket_directories=
# user: 101
# reload: 1
# stop: 2
mkdir -p /w/pg
chown 101:101 /w/pg
export PATH=$PATH:/usr/lib/postgresql/15/bin LC_ALL=C.UTF-8 PGUSER=postgres PGHOST=127.0.0.1
as() { setpriv --reuid 101 --regid 101 --clear-groups "$@"; }
as initdb -D /w/pg -A trust -U postgres
as pg_ctl -D /w/pg -w -o '-c listen_addresses=127.0.0.1 -k /tmp' -l /tmp/log start
createdb bench
pgbench -q -i bench
as pg_ctl -D /w/pg -w -m fast stop
#: load
export PATH=$PATH:/usr/lib/postgresql/15/bin LC_ALL=C.UTF-8 PGUSER=postgres PGHOST=127.0.0.1
n=0; until pg_isready -q; do n=$((n + 1)); [ $n -lt 200 ]; sleep 0.1; done
pgbench -c 4 -j 2 -t 500 bench | tee r
grep -q 'processed: 2000/2000' r
psql bench -c "set max_parallel_workers_per_gather=2; set parallel_setup_cost=0; select count(*) from pgbench_accounts" | grep 100000
psql bench -c "set work_mem='64kB'; select count(*) from (select * from pgbench_accounts order by filler, aid desc) s" | grep 100000
pg_dump bench | tail -n 9 | grep complete
psql bench -c checkpoint -c 'vacuum analyze'
