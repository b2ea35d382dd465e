# what: two workers with threads for files; 10,000 requests by 25 clients, kept alive and not, errors, a reload
# packages: nginx-light apache2-utils
# server: /usr/sbin/nginx -c /w/n.conf
# reload: 1
# stop: 3
mkdir -p /w/logs /w/www /var/lib/nginx /var/log/nginx
dd if=/dev/urandom of=/w/www/f bs=1k count=100 status=none
echo small >/w/www/s
cat >/w/n.conf <<END
user app; daemon off; worker_processes 2; error_log /w/logs/e notice; pid /w/logs/pid;
events { worker_connections 512; }
http { access_log /w/logs/a; sendfile on; tcp_nopush on; aio threads; gzip on; gzip_types *;
  server { listen 127.0.0.1:80; location / { root /w/www; } } }
END
chmod -R a+rX /w
#: load
n=0; until ab -q -n 1 http://127.0.0.1/s >/dev/null 2>&1; do n=$((n + 1)); [ $n -lt 100 ]; sleep 0.1; done
ask() { ab -q "$@" >r; cat r; grep -Eq '^Failed requests: +0$' r; }
ask -n 4000 -c 25 http://127.0.0.1/f
ask -n 4000 -c 25 -k http://127.0.0.1/s
ask -n 1900 -c 5 -H 'Accept-Encoding: gzip' http://127.0.0.1/f
if grep Non-2xx r; then exit 1; fi
ask -n 100 -c 5 http://127.0.0.1/none
grep -Eq '^Non-2xx responses: +100$' r
