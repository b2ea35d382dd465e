# what: sqlite3 with a write-ahead log, two writers, and an integrity check
# packages: sqlite3
# set: some
sqlite3 a.db 'pragma journal_mode=wal; create table t(x integer primary key, y);'
for w in 1 2; do
  (for i in $(seq 20); do sqlite3 -cmd '.timeout 20000' a.db "insert into t(y) values('$w-$i');"; done) &
done
wait
[ "$(sqlite3 a.db 'select count(*) from t;')" = 40 ]
sqlite3 a.db "insert into t(y) with recursive c(n) as (select 1 union all select n + 1 from c limit 100000) select n from c; vacuum; pragma integrity_check;" | grep -qx ok
