# what: http.server with a thread for each request, beside asyncio; 2,000 requests by 16 clients to both, bodies through files
# packages: python3
# server: /usr/bin/python3 /w/s.py
# user: 1000
# stop: 15
mkdir -p /w/d
chown 1000:1000 /w/d
cat >/w/s.py <<'END'
import asyncio, hashlib, http.server, json, logging, os, signal, sys, tempfile, threading
logging.basicConfig(stream=sys.stdout, level=logging.INFO)
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with tempfile.TemporaryFile(dir="/w/d") as f:
            f.write(body); f.seek(0)
            answer = json.dumps({"sum": hashlib.sha256(f.read()).hexdigest(), "pid": os.getpid()}).encode()
        self.send_response(200); self.send_header("Content-Length", str(len(answer))); self.end_headers()
        self.wfile.write(answer)
    def log_message(self, *args): pass
class Server(http.server.ThreadingHTTPServer):
    request_queue_size = 64
async def serve(reader, writer):
    line = await reader.readline()
    answer = await asyncio.get_running_loop().run_in_executor(None, line.upper)
    writer.write(answer); await writer.drain(); writer.close()
async def main():
    web = Server(("127.0.0.1", 8000), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, end.set)
    async with await asyncio.start_server(serve, "127.0.0.1", 8001, backlog=64):
        logging.info("ready"); await end.wait()
    web.shutdown()
asyncio.run(main())
END
#: load
cat >l.py <<'END'
import concurrent.futures, hashlib, http.client, json, socket, time
for n in range(100):
    try: socket.create_connection(("127.0.0.1", 8001)).close(); break
    except OSError: time.sleep(0.1)
def one(n):
    body = str(n).encode() * 500
    web = http.client.HTTPConnection("127.0.0.1", 8000, timeout=30)
    web.request("POST", "/", body)
    assert json.loads(web.getresponse().read())["sum"] == hashlib.sha256(body).hexdigest()
    web.close()
    with socket.create_connection(("127.0.0.1", 8001), timeout=30) as s:
        s.sendall(b"hello %d\n" % n); assert s.recv(100) == b"HELLO %d\n" % n
    return 1
with concurrent.futures.ThreadPoolExecutor(16) as pool:
    assert sum(pool.map(one, range(1000))) == 1000
END
python3 l.py
