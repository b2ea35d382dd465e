# what: bash and coreutils: job control, pipes, traps, here documents, ids, links, dates, sorting
# packages: bash coreutils util-linux procps
# set: some
cat >s.bash <<'END'
set -euo pipefail
trap 'echo trapped' USR1; kill -USR1 $$
coproc CAT { cat; }; echo co >&"${CAT[1]}"; read -r x <&"${CAT[0]}"; [ "$x" = co ]; kill "$CAT_PID"
sleep 30 & job=$!; jobs -l; kill "$job"; wait "$job" || [ $? = 143 ]
[ "$(seq 200000 | sort -rn --parallel=2 | head -n 1)" = 200000 ]
diff <(printf 'a\nb\n') <(printf 'a\nb\n')
truncate -s 1M big; dd if=/dev/zero of=big2 bs=64k count=16 status=none; cmp big big2
sha256sum big | grep -q ^30e14955
ln -s big soft; cp -a --reflink=auto soft soft2; cp big hard; mv hard hard2
chmod 4750 big2; chown app:app big2; touch -d '2001-02-03' big2; [ "$(date -r big2 +%F)" = 2001-02-03 ]
install -D -m 600 big d/e/f; du -s d; df .; timeout 5 true; nproc; env -i A=b env
mktemp -d; realpath .; shuf -i 1-9 -n 3; split -n 4 big; tee t </etc/hosts >/dev/null; flock lock true
timeout 1 sleep 10 || [ $? = 124 ]
setsid -w true; pgrep bash >/dev/null; ps -ef >/dev/null
END
bash s.bash
