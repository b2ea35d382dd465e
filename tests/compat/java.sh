# what: OpenJDK: compiles its source with its own compiler, threads, garbage collectors, files, sockets, processes
# fails with strict: WatchService watches files by inotify_init, the old spelling, which strict leaves out; what is before it in the script works
# shown with strict: java.io.IOException: Function not implemented
# packages: openjdk-17-jdk-headless
cat >T.java <<'END'
import java.net.*; import java.nio.file.*; import java.util.*; import java.util.concurrent.*; import java.util.stream.*; import java.io.*;
public class T { public static void main(String[] a) throws Exception {
  ExecutorService pool = Executors.newFixedThreadPool(16); List<Future<Integer>> f = new ArrayList<>();
  for (int i = 0; i < 200; i++) { int n = i; f.add(pool.submit(() -> n)); }
  int sum = 0; for (var x : f) sum += x.get(); pool.shutdown(); if (sum != 19900) throw new Error();
  List<byte[]> keep = new ArrayList<>(); for (int i = 0; i < 20000; i++) { keep.add(new byte[10000]); if (keep.size() > 100) keep.clear(); } System.gc();
  try (ServerSocket s = new ServerSocket(0, 5, InetAddress.getLoopbackAddress())) {
    Thread t = new Thread(() -> { try (Socket c = s.accept()) { c.getOutputStream().write(42); } catch (IOException e) { throw new RuntimeException(e); } }); t.start();
    try (Socket c = new Socket(InetAddress.getLoopbackAddress(), s.getLocalPort())) { if (c.getInputStream().read() != 42) throw new Error(); } t.join(); }
  Process p = new ProcessBuilder("sh", "-c", "exit 7").start(); if (p.waitFor() != 7) throw new Error();
  Path d = Files.createTempDirectory("t"); Files.writeString(d.resolve("x"), "y"); if (!Files.readString(d.resolve("x")).equals("y")) throw new Error();
  try (WatchService w = FileSystems.getDefault().newWatchService()) { d.register(w, StandardWatchEventKinds.ENTRY_CREATE); Files.writeString(d.resolve("z"), ""); if (w.poll(20, TimeUnit.SECONDS) == null) throw new Error("watch"); }
  System.out.println(IntStream.range(0, 1000000).parallel().mapToLong(i -> i).sum());
} }
END
javac=/usr/lib/jvm/java-17-openjdk-amd64/bin/javac
$javac T.java
for gc in Serial Parallel G1 Z; do java -Xmx256m -XX:+Use${gc}GC T; done
