# what: apt-get update and install, from a repository of files, with a package's scripts; then purge
# fails with strict: apt asks for saved ids (getresuid) and writes its caches by msync, which strict leaves out: packages belong into the image
# shown with strict: Could not get saved set-user-ID
# packages: apt dpkg
# set: some
mkdir -p /repo p/DEBIAN p/usr/bin; printf '#!/bin/sh\necho hello\n' >p/usr/bin/greet; chmod 755 p/usr/bin/greet
printf 'Package: greet\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b>\nDescription: x\n' >p/DEBIAN/control
printf '#!/bin/sh\nset -e\ntouch /var/lib/greet-was-here\nchown app /usr/bin/greet\n' >p/DEBIAN/postinst; chmod 755 p/DEBIAN/postinst
dpkg-deb --root-owner-group -b p /repo/greet.deb >/dev/null
(cat p/DEBIAN/control; printf 'Filename: ./greet.deb\nSize: %s\nSHA256: %s\n' "$(stat -c %s /repo/greet.deb)" "$(sha256sum /repo/greet.deb | cut -d' ' -f1)") >/repo/Packages
mkdir -p /etc/apt/sources.list.d /etc/apt/apt.conf.d /etc/apt/preferences.d /var/lib/apt/lists/partial /var/cache/apt/archives/partial /var/log/apt /var/lib/dpkg/updates /var/lib/dpkg/triggers
touch /var/lib/dpkg/available; rm -f /etc/apt/sources.list.d/*; echo 'deb [trusted=yes] file:/repo ./' >/etc/apt/sources.list
apt-get -q update
apt-get -q -y install greet
[ "$(greet)" = hello ]
[ -e /var/lib/greet-was-here ]
[ "$(stat -c %U /usr/bin/greet)" = app ]
apt-get -q -y purge greet
if command -v greet; then exit 1; fi
