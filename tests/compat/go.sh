# what: a program of Go: caddy serves files over http while ab asks 2,000 times
# packages: caddy apache2-utils
mkdir -p www
echo hello >www/index.html
HOME=$PWD caddy file-server --root www --listen 127.0.0.1:8082 >log 2>&1 &
n=0; until ab -q -n 1 http://127.0.0.1:8082/ >/dev/null 2>&1; do n=$((n + 1)); [ $n -lt 100 ] || { cat log; exit 1; }; sleep 0.1; done
ab -q -n 2000 -c 20 http://127.0.0.1:8082/ | grep -E '^(Complete requests: +2000|Failed requests: +0)$' | wc -l | grep -qx 2
kill $!; wait $! || true
