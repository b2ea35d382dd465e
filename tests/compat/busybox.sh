# what: busybox, all of it: shell, files, text, archives, processes, a web server
# packages: busybox-static
# set: some
bb=$(command -v busybox)
mkdir -p b
cd b
for i in 1 2 3 4 5; do echo "line $i"; done >f
[ "$($bb wc -l <f)" = 5 ]
[ "$($bb awk '{ s += $2 } END { print s }' f)" = 15 ]
$bb tar czf f.tgz f
$bb mkdir -p x
$bb tar xzf f.tgz -C x
$bb cmp f x/f
$bb sed -i s/line/row/ f
$bb grep -c row f
$bb find / -xdev -name passwd | $bb grep -q /etc/passwd
$bb sh -c '$0 sleep 100 & kill $!; wait $! 2>/dev/null; [ $? = 143 ]' "$bb"
$bb ps >/dev/null; $bb df >/dev/null; $bb free >/dev/null; $bb uptime >/dev/null; $bb id
$bb httpd -p 127.0.0.1:8081 -h .
[ "$($bb wget -qO- http://127.0.0.1:8081/x/f | $bb head -n 1)" = "line 1" ]
