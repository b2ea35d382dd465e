//! Events to containerd: one queue, one order.
//!
//! The head is sent again until it is accepted or given up; nothing overtakes
//! it. The RPCs only push, so a daemon that hangs or is away costs them nothing.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

/// One attempt to hand over the head.
const ATTEMPT: Duration = Duration::from_secs(5);
/// How long the head is tried before it is dropped.
const GIVE_UP: Duration = Duration::from_secs(60);
/// Pause between attempts.
const RETRY: Duration = Duration::from_millis(250);
/// Events kept while the daemon is away; past it the oldest goes.
const CAPACITY: usize = 8192;

/// The queue; clones are handles to the same one.
#[derive(Clone)]
pub struct Events {
    shared: Arc<Shared>,
}

struct Shared {
    namespace: String,
    queue: Mutex<VecDeque<Envelope>>,
    pushed: Notify,
    emptied: Notify,
}

impl Events {
    /// A queue whose events carry this containerd namespace.
    pub fn new(namespace: &str) -> Events {
        Events {
            shared: Arc::new(Shared {
                namespace: namespace.to_owned(),
                queue: Mutex::new(VecDeque::new()),
                pushed: Notify::new(),
                emptied: Notify::new(),
            }),
        }
    }

    /// The containerd namespace of the events, and so of the pod.
    pub fn namespace(&self) -> &str {
        &self.shared.namespace
    }

    /// Puts one event at the end. Its time is now.
    pub fn push<M: Message>(&self, topic: &str, event: &M) {
        let value = match event.write_to_bytes() {
            Ok(value) => value,
            Err(error) => {
                log::error!("encode event {topic}: {error}");
                return;
            }
        };
        let envelope = Envelope {
            timestamp: MessageField::some(timestamp(SystemTime::now())),
            namespace: self.shared.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(Any {
                type_url: format!("containerd.events.{}", M::NAME),
                value,
                ..Any::default()
            }),
            ..Envelope::default()
        };
        let mut queue = self.shared.queue();
        if queue.len() >= CAPACITY {
            // Not the head: it may be on its way.
            if let Some(lost) = queue.remove(1) {
                log::error!("event {} dropped: {CAPACITY} are waiting", lost.topic);
            }
        }
        queue.push_back(envelope);
        drop(queue);
        self.shared.pushed.notify_one();
    }

    /// Sends what is pushed, for ever.
    pub async fn run(self, address: PathBuf) {
        let mut client = None;
        loop {
            let head = self.shared.queue().front().cloned();
            let Some(head) = head else {
                self.shared.emptied.notify_waiters();
                self.shared.pushed.notified().await;
                continue;
            };
            let request = ForwardRequest {
                envelope: MessageField::some(head),
                ..ForwardRequest::default()
            };
            let topic = || {
                request
                    .envelope
                    .as_ref()
                    .map_or("", |envelope| envelope.topic.as_str())
            };
            let since = Instant::now();
            while let Err(error) = forward(&mut client, &address, &request).await {
                client = None;
                if since.elapsed() > GIVE_UP {
                    log::error!("event {} given up after 60 s: {error}", topic());
                    break;
                }
                log::debug!("event {} not accepted yet: {error}", topic());
                sleep(RETRY).await;
            }
            self.shared.queue().pop_front();
        }
    }

    /// Waits until everything pushed has been sent, at most `limit`.
    pub async fn drain(&self, limit: Duration) {
        let emptied = async {
            loop {
                let notified = self.shared.emptied.notified();
                if self.shared.queue().is_empty() {
                    return;
                }
                notified.await;
            }
        };
        if timeout(limit, emptied).await.is_err() {
            let left = self.shared.queue().len();
            log::error!("{left} events not accepted within {limit:?}, dropped");
        }
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, VecDeque<Envelope>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn forward(
    client: &mut Option<EventsClient>,
    address: &PathBuf,
    request: &ForwardRequest,
) -> Result<(), String> {
    let attempt = async {
        let events = match client {
            Some(events) => events,
            None => {
                let stream = UnixStream::connect(address)
                    .await
                    .map_err(|error| format!("connect {}: {error}", address.display()))?;
                client.insert(EventsClient::new(Client::new(stream.into())))
            }
        };
        events
            .forward(ttrpc::context::with_duration(ATTEMPT), request)
            .await
            .map_err(|error| error.to_string())
    };
    match timeout(ATTEMPT, attempt).await {
        Ok(answer) => answer.map(|_| ()),
        Err(_) => Err(format!("no answer within {ATTEMPT:?}")),
    }
}

/// protobuf's form of a time.
pub fn timestamp(at: SystemTime) -> Timestamp {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Timestamp::default()
    }
}

/// The path in a ttrpc address: bare, or behind `unix://`.
pub fn socket_path(address: &str) -> Result<PathBuf, String> {
    let path = address.strip_prefix("unix://").unwrap_or(address);
    if !path.starts_with('/') || path.len() > 107 {
        return Err(format!(
            "TTRPC_ADDRESS {address:?} is no absolute path of a unix socket (107 bytes at most): containerd sets it for start"
        ));
    }
    Ok(PathBuf::from(path))
}

#[cfg(test)]
mod tests {
    use super::*;
    use containerd_shim_protos::events::task::TaskExit;

    #[test]
    fn type_urls_are_bare_and_order_is_kept() {
        let events = Events::new("ns");
        for pid in 0..3 {
            let exit = TaskExit {
                pid,
                ..TaskExit::default()
            };
            events.push("/tasks/exit", &exit);
        }
        let queue = events.shared.queue();
        let pids: Vec<u32> = queue
            .iter()
            .map(|envelope| {
                assert_eq!(envelope.event.type_url, "containerd.events.TaskExit");
                assert_eq!(envelope.namespace, "ns");
                TaskExit::parse_from_bytes(&envelope.event.value)
                    .unwrap()
                    .pid
            })
            .collect();
        assert_eq!(pids, [0, 1, 2]);
    }

    #[test]
    fn the_queue_is_bounded_and_keeps_its_head_and_its_tail() {
        let events = Events::new("ns");
        for number in 0..CAPACITY + 10 {
            events.push(&number.to_string(), &TaskExit::default());
        }
        let queue = events.shared.queue();
        assert_eq!(queue.len(), CAPACITY);
        assert_eq!(queue.front().unwrap().topic, "0");
        assert_eq!(queue.back().unwrap().topic, (CAPACITY + 9).to_string());
    }

    #[test]
    fn addresses_are_bare_paths_or_unix_urls() {
        assert_eq!(socket_path("/run/c.sock"), Ok("/run/c.sock".into()));
        assert_eq!(socket_path("unix:///run/c.sock"), Ok("/run/c.sock".into()));
        for bad in ["", "unix://", "run/c.sock", "tcp://h:1"] {
            assert!(socket_path(bad).unwrap_err().contains("TTRPC_ADDRESS"));
        }
    }
}
