# what: node: http server and client, worker threads, child processes, file watching, streams, WebAssembly, crypto
# packages: nodejs
cat >t.js <<'END'
const http = require('http'), fs = require('fs'), cp = require('child_process'), zlib = require('zlib'), crypto = require('crypto');
const { Worker, isMainThread, parentPort } = require('worker_threads');
const assert = require('assert');
if (!isMainThread) { parentPort.postMessage(crypto.createHash('sha256').update('x').digest('hex')); return; }
(async () => {
  const words = await Promise.all([1, 2, 3, 4].map(() => new Promise((ok, no) => new Worker(__filename).on('message', ok).on('error', no))));
  assert(words.every(w => w.startsWith('2d711642')));
  assert.equal(cp.execSync('echo hi').toString(), 'hi\n');
  assert.equal((await new Promise(ok => cp.fork('-e', []).on('exit', ok).on('error', ok))) !== undefined, true);
  const server = http.createServer((q, a) => a.end('hello')).listen(0, '127.0.0.1');
  await new Promise(ok => server.on('listening', ok));
  for (let i = 0; i < 200; i++) {
    const text = await new Promise((ok, no) => http.get({ port: server.address().port, host: '127.0.0.1' }, r => { let t = ''; r.on('data', d => t += d).on('end', () => ok(t)); }).on('error', no));
    assert.equal(text, 'hello');
  }
  server.close();
  const seen = new Promise(ok => { const w = fs.watch('.', () => { w.close(); ok(); }); });
  fs.writeFileSync('watched', 'x'); await seen;
  assert.equal(zlib.gunzipSync(zlib.gzipSync('y'.repeat(100000))).length, 100000);
  await new Promise((ok, no) => crypto.pbkdf2('a', 'b', 10000, 32, 'sha256', e => e ? no(e) : ok()));
  await WebAssembly.instantiate(new Uint8Array([0, 97, 115, 109, 1, 0, 0, 0]));
  await fs.promises.rm('watched'); console.log(process.memoryUsage().rss > 0, require('os').cpus().length);
})().catch(e => { console.error(e); process.exit(1); });
END
node t.js
