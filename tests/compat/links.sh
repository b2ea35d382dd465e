# what: hard links, within a directory and into another one
# packages: coreutils
# set: some
mkdir d
echo x >f
ln f g
ln f d/h
[ "$(stat -c %h f)" = 3 ]
mv d/h h
[ "$(stat -c %i f)" = "$(stat -c %i h)" ]
