//! What a pod and its containers are, for an operator: numbers and names, and
//! nothing of what their workloads were given.

use casemate_cgroup::Stats;
use casemate_spec::network_rules::PortLock;
use serde_json::{Value, json};

use super::{Container, Sandbox};

impl Sandbox {
    /// The pod's part.
    pub fn facts(&self) -> Value {
        let cgroups: Vec<_> = self.cgroup.leaf_dirs().collect();
        json!({
            "agent": { "pid": self.agent.pid, "cgroups": cgroups, "usage": usage(&self.cgroup) },
            "pause": self.pause.get().map(super::pause::Pause::pid),
            "ids": { "agent": self.range.base(), "root": self.range.container_root() },
            "landlock": self.landlock,
            "port_lock": {
                "connect": port_lock(&self.ports.connect),
                "listen": port_lock(&self.ports.listen),
            },
        })
    }
}

impl Container {
    /// The container's part.
    pub fn facts(&self) -> Value {
        let cgroups: Vec<_> = self.cgroup.leaf_dirs().collect();
        let caps = &self.spec.process.caps;
        json!({
            "forker": self.forker_pid,
            "cgroups": cgroups,
            "usage": usage(&self.cgroup),
            "profile": self.spec.effective.profile_name,
            "learning": self.spec.effective.learn,
            "profile_hash": self.filters.profile.hash().to_string(),
            "no_new_privs": self.spec.process.no_new_privs,
            "own_filter": !self.filters.written.is_empty(),
            "capabilities": casemate_spec::caps::names(caps.bounding),
            "user": format!("{}:{}", self.spec.process.uid, self.spec.process.gid),
            "readonly_root": self.spec.readonly_rootfs,
        })
    }
}

/// The ports, or why all of them.
fn port_lock(lock: &PortLock) -> Value {
    match lock {
        PortLock::On(ports) => json!({ "ports": ports }),
        PortLock::Off(why) => json!({ "off": why }),
    }
}

/// Bytes in use and the limit, and how many processes there are; nothing where
/// there are no such controllers.
fn usage(cgroup: &casemate_cgroup::Cgroup) -> Value {
    let (usage, limit, processes) = match cgroup.stats() {
        Ok(Stats::V1(stats)) => {
            let memory = &stats.memory_usage;
            (memory.usage, memory.limit, stats.pids.current)
        }
        Ok(Stats::V2(stats)) => (
            stats.memory_usage,
            stats.memory_usage_limit,
            stats.pids.current,
        ),
        Err(_) => return Value::Null,
    };
    // v1 says that there is none by the largest page-aligned number.
    let limit = (limit < i64::MAX as u64 & !0xffff).then_some(limit);
    json!({ "memory": usage, "memory_limit": limit, "processes": processes })
}
