//! A ttrpc `containerd.services.events.ttrpc.v1.Events` server that keeps what
//! it gets: the other end of a shim's event queue, where the order and the
//! bytes of each message can be looked at.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{Empty, ForwardRequest};
use containerd_shim_protos::{Events, create_events};
use protobuf::Message;
use ttrpc::TtrpcContext;

use crate::error::{Failure, Result};

/// One event, as it came.
#[derive(Debug, Clone)]
pub struct Event {
    /// containerd namespace.
    pub namespace: String,
    /// `/tasks/...`.
    pub topic: String,
    /// Type URL of the payload.
    pub type_url: String,
    /// The payload's protobuf bytes.
    pub payload: Vec<u8>,
}

impl Event {
    /// Decodes the payload as `M`.
    pub fn decode<M: Message>(&self) -> Result<M> {
        M::parse_from_bytes(&self.payload)
            .map_err(|e| Failure::Unexpected(format!("decode event {}: {e}", self.topic)))
    }
}

#[derive(Default)]
struct Log {
    events: Mutex<Vec<Event>>,
    grown: Condvar,
    delay: Mutex<Duration>,
}

/// The recording server; stops when dropped.
pub struct Recorder {
    log: Arc<Log>,
    path: PathBuf,
    server: Option<ttrpc::Server>,
}

struct Sink(Arc<Log>);

impl Events for Sink {
    fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let delay = self.0.delay.lock().map(|d| *d).unwrap_or_default();
        if !delay.is_zero() {
            std::thread::sleep(delay);
        }
        let mut envelope = request.envelope.unwrap_or_default();
        let event = envelope.event.take().unwrap_or_default();
        if let Ok(mut events) = self.0.events.lock() {
            events.push(Event {
                namespace: envelope.namespace,
                topic: envelope.topic,
                type_url: event.type_url,
                payload: event.value,
            });
            self.0.grown.notify_all();
        }
        Ok(Empty::default())
    }
}

impl Recorder {
    /// Listens on `path`.
    pub fn listen(path: &Path) -> Result<Self> {
        let mut recorder = Self {
            log: Arc::default(),
            path: path.to_owned(),
            server: None,
        };
        recorder.up()?;
        Ok(recorder)
    }

    /// Where to tell the shim to send events: the value for `TTRPC_ADDRESS`.
    pub fn address(&self) -> &Path {
        &self.path
    }

    /// Starts (or starts again) to listen.
    pub fn up(&mut self) -> Result<()> {
        let _ = std::fs::remove_file(&self.path);
        let rpc = |source| Failure::Rpc {
            method: format!("listen for events on {}", self.path.display()),
            source,
        };
        let mut server = ttrpc::Server::new()
            .bind(&format!("unix://{}", self.path.display()))
            .map_err(rpc)?
            .register_service(create_events(Arc::new(Sink(self.log.clone()))));
        server.start().map_err(rpc)?;
        self.server = Some(server);
        Ok(())
    }

    /// Stops listening and drops all connections, as a daemon's restart does.
    pub fn down(&mut self) {
        if let Some(server) = self.server.take() {
            server.shutdown();
        }
        let _ = std::fs::remove_file(&self.path);
    }

    /// Makes each later request take that long.
    pub fn slow_down(&self, delay: Duration) {
        if let Ok(mut slot) = self.log.delay.lock() {
            *slot = delay;
        }
    }

    /// All events so far.
    pub fn events(&self) -> Vec<Event> {
        self.log
            .events
            .lock()
            .map(|e| e.clone())
            .unwrap_or_default()
    }

    /// The topics so far, without `/tasks/`.
    pub fn topics(&self) -> Vec<String> {
        self.events()
            .iter()
            .map(|e| e.topic.trim_start_matches("/tasks/").to_owned())
            .collect()
    }

    /// Waits until an event with this topic (without `/tasks/`) has come.
    pub fn wait_for(&self, topic: &str, limit: Duration) -> Result<Event> {
        let end = Instant::now() + limit;
        let wanted = format!("/tasks/{topic}");
        let timeout = || Failure::Timeout {
            what: format!("event {wanted}; there were {:?}", self.topics()),
            seconds: limit.as_secs(),
        };
        let mut events = self.log.events.lock().map_err(|_| timeout())?;
        loop {
            if let Some(found) = events.iter().find(|e| e.topic == wanted) {
                return Ok(found.clone());
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                drop(events);
                return Err(timeout());
            }
            events = match self.log.grown.wait_timeout(events, left) {
                Ok((guard, _)) => guard,
                Err(_) => return Err(timeout()),
            };
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.down();
    }
}
