# what: tmux: a server with a terminal of its own, windows, keys sent and the screen read back
# packages: tmux ncurses-base
# set: some
export TERM=screen LC_ALL=C.UTF-8 SHELL=/bin/bash TMUX_TMPDIR=$PWD
tmux new-session -d -s s -x 80 -y 24; tmux new-window -t s; tmux split-window -t s
tmux send-keys -t s 'echo $((6 * 7))-answer' Enter
n=0; until tmux capture-pane -p -t s | grep -q 42-answer; do n=$((n + 1)); [ $n -lt 100 ] || exit 1; sleep 0.1; done
[ "$(tmux list-panes -s -t s | wc -l)" = 3 ]
tmux kill-server
