# what: python3: threads, subprocess, asyncio with sockets and servers, multiprocessing with shared memory, sqlite, files, signals
# packages: python3
# set: some
cat >t.py <<'END'
import asyncio, concurrent.futures, ctypes, fcntl, hashlib, mmap, multiprocessing as mp, os, random, select, signal
import socket, sqlite3, subprocess, sys, tempfile, threading, time
from multiprocessing import shared_memory
def square(n): return n * n
def main():
    total = []
    ts = [threading.Thread(target=lambda i=i: total.append(i)) for i in range(50)]
    [t.start() for t in ts]; [t.join() for t in ts]; assert sum(total) == 1225
    assert subprocess.run(["sh", "-c", "cat; exit 3"], input=b"x", capture_output=True).returncode == 3
    for method in ("fork", "spawn", "forkserver"):
        with mp.get_context(method).Pool(4) as pool: assert pool.map(square, range(20))[-1] == 361
    shm = shared_memory.SharedMemory(create=True, size=4096); shm.buf[0] = 7; shm.close(); shm.unlink()
    lock = mp.Lock()
    with lock: pass
    with concurrent.futures.ProcessPoolExecutor(2) as p: assert list(p.map(square, [3])) == [9]
    async def net():
        async def serve(r, w): w.write((await r.readline()).upper()); await w.drain(); w.close()
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async def one():
            r, w = await asyncio.open_connection("127.0.0.1", port)
            w.write(b"hello\n"); assert await r.read() == b"HELLO\n"; w.close()
        await asyncio.gather(*(one() for _ in range(100)))
        p = await asyncio.create_subprocess_exec("sleep", "0.1"); assert await p.wait() == 0
        await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.01) for _ in range(20)))
        server.close()
    asyncio.run(net())
    a, b = socket.socketpair(); socket.send_fds(a, [b"f"], [0]); assert socket.recv_fds(b, 1, 1)[1]
    m = mmap.mmap(-1, 1 << 20); m[:3] = b"abc"; assert m[:3] == b"abc"
    with tempfile.TemporaryFile() as f: fcntl.flock(f, fcntl.LOCK_EX); f.write(b"x"); f.flush(); os.fsync(f.fileno())
    ctypes.CDLL(None).getpid(); ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 1)()
    ep = select.epoll(); ep.register(a, select.EPOLLIN); os.getrandom(8); os.sched_getaffinity(0)
    signal.signal(signal.SIGALRM, lambda *_: None); signal.setitimer(signal.ITIMER_REAL, 0.01); signal.pause()
    db = sqlite3.connect("p.db"); db.execute("pragma journal_mode=wal"); db.execute("create table t(x)"); db.commit()
    os.fork() or os._exit(5); assert os.waitstatus_to_exitcode(os.wait()[1]) == 5
    pid, fd = os.forkpty() if os.path.exists("/dev/ptmx") else (1, 0)
    if pid == 0: os.write(1, b"tty"); os._exit(0)
    assert os.read(fd, 3) == b"tty"
    os.copy_file_range; open("c1", "w").write("x"); os.posix_fallocate(os.open("c1", os.O_RDWR), 0, 100)
if __name__ == "__main__": main()
END
python3 t.py
