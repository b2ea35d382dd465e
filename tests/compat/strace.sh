# what: strace, which can't work, is told so: an error, at once, and nothing else suffers
# packages: strace
# set: some
if timeout 20 strace -o trace true 2>e; then echo "strace worked"; exit 1; fi
grep -Eiq 'not permitted|not implemented|PTRACE' e
sleep 30 & if timeout 20 strace -p $! 2>e; then echo "strace attached"; exit 1; fi
kill -0 $!
kill $!
