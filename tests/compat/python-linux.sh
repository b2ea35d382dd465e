# what: python3, what Linux alone has: memfd, eventfd, pidfd, a child with another user
# fails with strict: memfd_create, pidfd_open and setreuid are left out
# shown with strict: Function not implemented
# packages: python3
# set: some
cat >t.py <<'END'
import os, subprocess
fd = os.memfd_create("m"); os.write(fd, b"1"); os.eventfd(0); os.pidfd_open(os.getpid())
assert subprocess.run(["id", "-u"], user=1000, capture_output=True).stdout == b"1000\n"
END
python3 t.py
