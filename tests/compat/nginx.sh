# what: nginx with two workers, on port 80, while ab asks 5,000 times, and a reload
# packages: nginx-light apache2-utils
# set: some
mkdir -p logs www /var/lib/nginx /var/log/nginx
dd if=/dev/urandom of=www/f bs=1k count=100 status=none
cat >n.conf <<END
user app; worker_processes 2; error_log $PWD/logs/e notice; pid $PWD/logs/pid;
events { worker_connections 512; }
http { access_log off; sendfile on; aio threads; server { listen 127.0.0.1:80; location / { root $PWD/www; } } }
END
chmod -R a+rX .
nginx -c "$PWD/n.conf" || { cat logs/e; exit 1; }
ab -q -n 5000 -c 25 http://127.0.0.1/f >r || { cat logs/e; exit 1; }
grep -Eq '^Failed requests: +0$' r
if grep -q Non-2xx r; then exit 1; fi
nginx -c "$PWD/n.conf" -s reload; sleep 0.5; ab -q -n 100 -c 5 http://127.0.0.1/f | grep -Eq '^Failed requests: +0$'
nginx -c "$PWD/n.conf" -s stop
