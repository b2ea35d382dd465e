//! Exec, attach and port-forward through the daemon's streaming server, by
//! WebSocket: each message begins with the number of its channel.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use casemate_tests::generation::NO_TERMINALS;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{ensure, ensure_eq};
use k8s_cri::v1::*;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use std::os::fd::AsFd;
use tungstenite::client::IntoClientRequest;
use tungstenite::http::HeaderValue;
use tungstenite::{Message, WebSocket};

use super::Cri;
use super::config::container;

crate::cri_tests![exec_with_input, exec_with_terminal, attach, port_forward];

/// 1.6 forgets the path of a runtime for all containers but the pod's first.
pub const SINCE_1_7: &[(&str, super::Test)] =
    &[("exec_with_terminal_denied", exec_with_terminal_denied)];

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
/// How it ended, as JSON.
const STATUS: u8 = 3;
const RESIZE: u8 = 4;

/// An open stream.
struct Stream {
    socket: WebSocket<TcpStream>,
    /// What arrived, by channel.
    seen: Vec<Vec<u8>>,
}

impl Stream {
    /// Connects to a URL of the streaming server, which listens in the
    /// network namespace that stands for the node's.
    fn open(cri: &Cri, url: &str) -> Result<Self, Stop> {
        let Some(rest) = url.strip_prefix("http://") else {
            return fail(format!("streaming URL {url}"));
        };
        let address = rest.split('/').next().unwrap_or_default().to_owned();
        let netns = std::fs::File::open(cri.node.netns.path())?;
        // In a thread of its own, which ends in that namespace.
        let connect = move || -> std::io::Result<TcpStream> {
            move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?;
            TcpStream::connect(address)
        };
        let socket = match std::thread::spawn(connect).join() {
            Ok(socket) => socket?,
            Err(_) => return fail("connecting panicked"),
        };
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        let mut request = format!("ws://{rest}").into_client_request()?;
        request.headers_mut().insert(
            "Sec-WebSocket-Protocol",
            HeaderValue::from_static("v4.channel.k8s.io"),
        );
        // The handshake is not to be cut into pieces by the time-out.
        socket.set_read_timeout(Some(Duration::from_secs(20)))?;
        let (socket, _) = tungstenite::client(request, socket)
            .map_err(|e| Stop::Fail(format!("open {url}: {e}")))?;
        socket
            .get_ref()
            .set_read_timeout(Some(Duration::from_millis(200)))?;
        Ok(Self {
            socket,
            seen: vec![Vec::new(); 8],
        })
    }

    fn send(&mut self, channel: u8, data: &[u8]) -> Outcome {
        let mut message = vec![channel];
        message.extend(data);
        self.socket.send(Message::binary(message))?;
        Ok(())
    }

    /// Reads until `done`, or the end of the stream; false: neither came.
    fn read_until(&mut self, done: impl Fn(&[Vec<u8>]) -> bool) -> bool {
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(30) {
            if done(&self.seen) {
                return true;
            }
            match self.socket.read() {
                Ok(message) => {
                    let data = message.into_data();
                    let Some((channel, data)) = data.split_first() else {
                        continue;
                    };
                    if let Some(buffer) = self.seen.get_mut(usize::from(*channel)) {
                        buffer.extend(data);
                    }
                }
                Err(tungstenite::Error::Io(e))
                    if matches!(
                        e.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
                    ) => {}
                Err(_) => return done(&self.seen),
            }
        }
        false
    }

    fn text(&self, channel: u8) -> String {
        self.seen
            .get(usize::from(channel))
            .map(|b| String::from_utf8_lossy(b).into_owned())
            .unwrap_or_default()
    }

    /// Waits for a text on a channel.
    fn expect(&mut self, channel: u8, text: &str) -> Outcome {
        let at = usize::from(channel);
        let found = self.read_until(|seen| {
            seen.get(at)
                .is_some_and(|b| String::from_utf8_lossy(b).contains(text))
        });
        ensure!(
            found,
            "no {text:?} on channel {channel}: {:?} {:?} {:?}",
            self.text(STDOUT),
            self.text(STDERR),
            self.text(STATUS)
        );
        Ok(())
    }
}

fn exec_with_input(cri: &Cri) -> Outcome {
    let pod = cri.pod("exec")?;
    let id = pod.sleeper("app")?;
    let script = "read line; echo got $line; echo complaint >&2; exit 9";
    let request = ExecRequest {
        container_id: id,
        cmd: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        tty: false,
        stdin: true,
        stdout: true,
        stderr: true,
    };
    let url = cri.call("Exec", async |mut c| c.exec(request).await)?.url;
    let mut stream = Stream::open(cri, &url)?;
    stream.send(STDIN, b"hello\n")?;
    stream.expect(STATUS, "ExitCode")?;
    ensure_eq!(stream.text(STDOUT), "got hello\n", "output");
    ensure_eq!(stream.text(STDERR), "complaint\n", "errors");
    let status = stream.text(STATUS);
    ensure!(status.contains("\"9\""), "status {status}");
    pod.remove()
}

fn exec_with_terminal(cri: &Cri) -> Outcome {
    let pod = cri.pod("terminal")?;
    let id = pod.sleeper("app")?;
    let script = "tty; read line; stty size; echo got $line";
    let request = ExecRequest {
        container_id: id,
        cmd: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
        tty: true,
        stdin: true,
        stdout: true,
        stderr: false,
    };
    let url = cri.call("Exec", async |mut c| c.exec(request).await)?.url;
    let mut stream = Stream::open(cri, &url)?;
    stream.expect(STDOUT, "/dev/")?;
    stream.send(RESIZE, br#"{"Width":91,"Height":37}"#)?;
    std::thread::sleep(Duration::from_millis(300));
    stream.send(STDIN, b"hello\n")?;
    stream.expect(STATUS, "Success")?;
    let out = stream.text(STDOUT);
    ensure!(out.contains("37 91\r\n"), "size of the terminal: {out:?}");
    ensure!(out.contains("got hello\r\n"), "output: {out:?}");
    pod.remove()
}

/// The node's configuration forbids terminals: the stream says so, nothing runs, and
/// without a terminal it does.
fn exec_with_terminal_denied(cri: &Cri) -> Outcome {
    crate::common::casemate_only()?;
    let pod = cri.pod_of(NO_TERMINALS, super::config::pod(cri, "noterminal"))?;
    let id = pod.sleeper("app")?;
    let begin = |tty: bool| -> Result<Stream, Stop> {
        let request = ExecRequest {
            container_id: id.clone(),
            cmd: ["/bin/sh", "-c", "echo ran | tee -a /ran"]
                .map(str::to_owned)
                .to_vec(),
            tty,
            stdin: true,
            stdout: true,
            stderr: !tty,
        };
        let url = cri.call("Exec", async |mut c| c.exec(request).await)?.url;
        Stream::open(cri, &url)
    };
    let mut denied = begin(true)?;
    denied.read_until(|seen| {
        seen.get(usize::from(STATUS))
            .is_some_and(|b| b.ends_with(b"}"))
    });
    let (status, out) = (denied.text(STATUS), denied.text(STDOUT));
    ensure!(
        status.contains("Failure") && status.contains("with a terminal is refused"),
        "status {status}, output {out:?}"
    );
    ensure!(!out.contains("ran"), "it ran: {out:?}");
    let mut plain = begin(false)?;
    plain.expect(STATUS, "Success")?;
    ensure_eq!(plain.text(STDOUT), "ran\n", "output without a terminal");
    ensure_eq!(pod.exec_sh(&id, "cat /ran")?, "ran\n", "what ran");
    pod.remove()
}

fn attach(cri: &Cri) -> Outcome {
    let pod = cri.pod("attach")?;
    let script = "while read line; do echo got $line; done; echo end";
    let mut config = container("app", &["/bin/sh", "-c", script]);
    config.stdin = true;
    let id = pod.run(config)?;
    for round in ["one", "two"] {
        let request = AttachRequest {
            container_id: id.clone(),
            stdin: true,
            tty: false,
            stdout: true,
            stderr: true,
        };
        let url = cri
            .call("Attach", async |mut c| c.attach(request).await)?
            .url;
        let mut stream = Stream::open(cri, &url)?;
        stream.send(STDIN, format!("{round}\n").as_bytes())?;
        stream.expect(STDOUT, &format!("got {round}\n"))?;
        // Gone without a word: the container must not see an end of input.
    }
    let status = pod.status(&id)?;
    ensure_eq!(
        status.state,
        ContainerState::ContainerRunning as i32,
        "state after two clients"
    );
    ensure_eq!(pod.log(&status, "stdout"), "got one\ngot two\n", "log");
    pod.remove()
}

fn port_forward(cri: &Cri) -> Outcome {
    let pod = cri.pod("forward")?;
    let script = "while :; do echo from-inside | nc -l -p 8080; done";
    pod.run(container("app", &["/bin/sh", "-c", script]))?;
    let mut last = String::new();
    for _ in 0..20 {
        let request = PortForwardRequest {
            pod_sandbox_id: pod.id.clone(),
            port: vec![8080],
        };
        let url = cri
            .call("PortForward", async |mut c| c.port_forward(request).await)?
            .url;
        let mut stream = Stream::open(cri, &url)?;
        stream.send(0, b"through\n")?;
        // Channel 0 is the connection, 1 its errors; both begin with the port.
        stream.read_until(|seen| {
            let long = |n: usize| seen.get(n).is_some_and(|b| b.len() > 2);
            long(0) || long(1)
        });
        last = format!("{:?} {:?}", stream.text(0), stream.text(1));
        if stream.text(0).contains("from-inside") {
            return pod.remove();
        }
        // The listener may not be there yet.
        std::thread::sleep(Duration::from_millis(200));
    }
    fail(format!("through the port: {last}"))
}
