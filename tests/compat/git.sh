# what: git: commits, branches, a merge, clone and push over the file system and git-daemon, gc
# packages: git
# set: some
export HOME=$PWD GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@b GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@b
git config --global init.defaultBranch main; git config --global safe.directory '*'
git init -q r
cd r
for i in $(seq 30); do echo $i >f$i; git add .; git commit -qm "c$i"; done
git checkout -qb side HEAD~5; echo s >s; git add s; git commit -qm s; git checkout -q main; git merge -q -m m side
cd ..
git clone -q --bare r b.git
git clone -q b.git c
cd c
echo n >n
git add n
git commit -qm n
git push -q origin main
cd ..
git daemon --reuseaddr --listen=127.0.0.1 --export-all --base-path="$PWD" --detach
n=0; until git ls-remote -q git://127.0.0.1/b.git >/dev/null 2>&1; do n=$((n + 1)); [ $n -lt 100 ] || exit 1; sleep 0.1; done
git clone -q git://127.0.0.1/b.git d
[ "$(git -C d rev-list --count HEAD)" = 33 ]
git -C d gc -q
git -C d fsck --full
git -C d status --porcelain
