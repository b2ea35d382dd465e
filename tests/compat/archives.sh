# what: tar, gzip, zstd, xz and rsync of a tree with links, modes, owners and sparse files
# packages: tar gzip zstd xz-utils rsync
# set: some
mkdir -p t/d; for i in $(seq 50); do seq $i $((i * 100)) >t/d/f$i; done
truncate -s 5M t/sparse; ln -s d/f1 t/soft; chmod 640 t/d/f3; chown 1000:1000 t/d/f4
for z in gzip 'zstd -T2' 'xz -T2'; do
  rm -rf o
  mkdir o
  tar -cSf a -I "$z" t
  tar -xf a -I "${z%% *}" -C o
  diff -r --no-dereference t/d o/t/d
  [ "$(stat -c '%a %u' o/t/d/f3 o/t/d/f4)" = "$(stat -c '%a %u' t/d/f3 t/d/f4)" ]
done
rsync -aHS --delete t/ r/
rsync -aHSni --delete t/ r/ | wc -l | grep -qx 0
