//! The network namespace: whose it is, and the rules in it.

use std::fs::File;
use std::os::fd::AsFd;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::Report;
use crate::promise::{Promise, Rule};
use crate::status::{namespace, owner};

pub fn check(report: &mut Report, promise: &Promise) {
    let pid = promise.agent.pid;
    let promised = &promise.network;
    let Some(found) = namespace(pid, "net") else {
        // The agent isn't there, which is told elsewhere.
        return;
    };
    if let Some(wanted) = promised.namespace {
        report.equal("agent: net namespace", &wanted, &found);
        if wanted != found {
            return;
        }
    }
    let hosts = namespace(promise.shim.pid, "net");
    if hosts == Some(found) {
        return;
    }
    // Who has capabilities there can change its rules.
    let owner = owner(pid, "net");
    let pods = [namespace(pid, "user"), promise.users];
    if owner.is_some() && pods.contains(&owner) {
        let what = "network namespace: owner";
        report.add(what, "nobody in the pod", "a user namespace of the pod");
    }
    if let Some(wanted) = &promised.guard {
        rules(report, pid, wanted);
    }
}

fn rules(report: &mut Report, pid: u32, wanted: &[Rule]) {
    let found = match installed(pid) {
        Ok(found) => found,
        Err(reason) => return report.add("network guard", "to be read", reason),
    };
    for (n, wanted) in wanted.iter().enumerate() {
        match found.get(n) {
            Some(found) if found == wanted => {}
            // Where one is missing all behind it have other numbers.
            Some(found) if found.name == wanted.name => {
                let what = format!("network guard: {}", wanted.name);
                return report.add(what, &wanted.content, &found.content);
            }
            found => {
                let found = found.map_or("nothing", |line| &line.name);
                return report.add("network guard", &wanted.name, found);
            }
        }
    }
    if let Some(more) = found.get(wanted.len()) {
        report.add("network guard", "no more rules", &more.name);
    }
}

/// What is there, read by a thread that enters the namespace and ends.
fn installed(pid: u32) -> Result<Vec<Rule>, String> {
    let read = move || {
        let file = File::open(format!("/proc/{pid}/ns/net")).map_err(|e| e.to_string())?;
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|e| format!("enter the network namespace: {e}"))?;
        casemate_netguard::installed().map_err(|e| e.to_string())
    };
    let lines = std::thread::spawn(read)
        .join()
        .map_err(|_| "the thread that reads it has failed".to_owned())??;
    Ok(lines.into_iter().map(Rule::from).collect())
}
