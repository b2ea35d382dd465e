# what: mkfifo, and a message through it
# packages: coreutils
# set: some
mkfifo p
(echo through >p &)
[ "$(cat p)" = through ]
