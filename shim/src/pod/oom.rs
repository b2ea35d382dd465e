//! Out-of-memory kills: told before the exit that they cause.

use std::os::fd::AsFd;
use std::sync::Arc;

use casemate_cgroup::OomWatch;
use containerd_shim_protos::events::task::TaskOOM;
use containerd_shim_protos::topics;
use tokio::io::Interest;

use super::task::Task;
use crate::events::Events;
use crate::io::watch;
use crate::record::{Record, Records};

/// A container's out-of-memory counter, armed when it is made.
pub struct Oom {
    container_id: String,
    watch: OomWatch,
    events: Events,
    records: Records,
}

impl Oom {
    /// Arms the watch; without one (no memory controller) there are no events.
    pub fn arm(task: &Task, events: &Events, records: &Records) -> Option<Oom> {
        let cgroup = task.container()?.cgroup()?;
        match cgroup.oom_watch() {
            Ok(watch) => Some(Oom {
                container_id: task.id.clone(),
                watch,
                events: events.clone(),
                records: records.clone(),
            }),
            Err(error) => {
                log::warn!("container {}: no out-of-memory events: {error}", task.id);
                None
            }
        }
    }

    /// Tells of a kill that hasn't been told yet. Called before every exit is
    /// recorded, because the counter's event may come later than the exit.
    pub fn check(&self) {
        if self.watch.drain() {
            self.records.push(&Record::Oom {
                container: self.container_id.clone(),
            });
            self.events.push(
                topics::TASK_OOM_EVENT_TOPIC,
                &TaskOOM {
                    container_id: self.container_id.clone(),
                    ..TaskOOM::default()
                },
            );
        }
    }

    /// Tells of kills as they come, for ever.
    pub async fn run(self: Arc<Oom>) {
        let registered = self
            .watch
            .as_fd()
            .try_clone_to_owned()
            .and_then(|fd| watch(fd, Interest::READABLE));
        let fd = match registered {
            Ok(fd) => fd,
            Err(error) => {
                log::warn!("container {}: watch memory: {error}", self.container_id);
                return;
            }
        };
        while let Ok(mut readable) = fd.readable().await {
            self.check();
            readable.clear_ready();
        }
    }
}
