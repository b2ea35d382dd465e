# what: PostgreSQL: initdb, start, pgbench with four clients, a backup, stop
# fails with strict: setpriv asks with capget(2), and PostgreSQL wants shared memory of System V; strict leaves out both
# shown with strict: setpriv: activate capabilities: Function not implemented
# packages: postgresql-15 postgresql-client-15 util-linux
export PATH=$PATH:/usr/lib/postgresql/15/bin LC_ALL=C.UTF-8
mkdir -p pg
chown postgres pg
as() { setpriv --reuid postgres --regid postgres --clear-groups env HOME="$PWD/pg" "$@"; }
as initdb -D "$PWD/pg/data" -A trust >log 2>&1 || { tail -n 5 log; exit 1; }
as pg_ctl -D "$PWD/pg/data" -w -l "$PWD/pg/log" -o "-k $PWD/pg -c listen_addresses=127.0.0.1" start || { cat pg/log; exit 1; }
as createdb -h "$PWD/pg" bench
as pgbench -q -h "$PWD/pg" -i bench
as pgbench -h 127.0.0.1 -c 4 -j 2 -t 100 bench | grep -q 'processed: 400/400'
as psql -h "$PWD/pg" bench -c "set max_parallel_workers_per_gather=2; select count(*) from pgbench_accounts" | grep -q 100000
as pg_dump -h "$PWD/pg" bench | tail -n 9 | grep -q complete
as pg_ctl -D "$PWD/pg/data" -w -m fast stop
