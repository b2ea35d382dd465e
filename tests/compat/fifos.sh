# what: mkfifo, and a message through it
# fails with strict: mknod is left out with all special files
# packages: coreutils
# set: some
mkfifo p
(echo through >p &)
[ "$(cat p)" = through ]
