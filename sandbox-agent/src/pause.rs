//! The pause: first process of the pid namespace that containers of the pod may
//! share, so that orphans in there have somebody to go to.
//!
//! That namespace is below the agent's: from inside nobody sees agent or forkers.
//! The pause itself is seen, as pid 1, by whatever the tenant runs. So it has
//! nothing to offer: it takes no input, keeps no descriptor, its children are
//! reaped by the kernel (SIGCHLD is ignored), and its filter lets it wait, and end.
//! Its ids are the agent's, which containers don't have, and its memory belongs
//! to A: in B no capability counts for it but to signal it, and the kernel takes
//! no signal for a pid 1 from inside that it doesn't handle (pid_namespaces(7)).

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use casemate_protocol::plan::PausePlan;
use casemate_protocol::{Channel, FromPause, clip, read_plan};
use casemate_sys::mount::{self, Change, NewFs, attr, propagation};
use casemate_sys::namespace::kind;
use casemate_sys::process::{self, Fork};
use casemate_sys::{exec, memory, seccomp};
use rustix::fs::{CWD, Mode, OFlags};

use crate::companion;
use crate::error::{At, StepError};

/// Forks it. It answers on its own channel, so nothing is to be said here.
pub fn start(mut fds: Vec<OwnedFd>) {
    let (Some(namespace_b), Some(plan), Some(channel)) = (fds.pop(), fds.pop(), fds.pop()) else {
        return;
    };
    let channel = Channel::new(channel);
    match process::fork_into(kind::MOUNT | kind::PID, None) {
        Ok(Fork::Parent(..)) => {}
        Ok(Fork::Child) => {
            let keep = [channel.as_fd(), plan.as_fd(), namespace_b.as_fd()];
            // The agent's own descriptors end here, its values are never used again.
            let result = exec::close_all_except(&keep)
                .at("close", "inherited descriptors")
                .and_then(|()| lock(plan, namespace_b, &channel));
            let code = match result {
                Ok(()) => {
                    drop(channel);
                    wait()
                }
                Err(error) => {
                    tell(&channel, &error.to_string());
                    1
                }
            };
            process::exit_now(code)
        }
        Err(error) => tell(&channel, &format!("fork it: {error}")),
    }
}

fn tell(channel: &Channel, what: &str) {
    let text = clip(what);
    let _ = channel.send(&FromPause::Failed { text }, &[]);
}

/// For ever: only its end ends the namespace.
fn wait() -> i32 {
    loop {
        rustix::event::pause();
    }
}

fn lock(plan: OwnedFd, namespace_b: OwnedFd, channel: &Channel) -> Result<(), StepError> {
    let plan: PausePlan = read_plan(plan)
        .map_err(io::Error::other)
        .at("read", "its plan")?;
    process::reset_signals();
    process::ignore_children().at("ignore", "children")?;
    rustix::process::setsid().at("start", "session")?;
    empty_root()?;
    rustix::thread::set_name(c"casemate-pause").at("set", "name")?;
    let me = companion::settle(namespace_b, 0)?;
    channel
        .send(&FromPause::Ready, &[me.as_fd()])
        .map_err(io::Error::other)
        .at("answer", "shim")?;
    drop(me);
    memory::release_startup();
    seccomp::install_filter(&plan.filter, 0)
        .at("install filter", "")
        .map(drop)
}

/// A root with nothing in it: mounts of containers show in a process' mountinfo,
/// which all who see the process can read.
fn empty_root() -> Result<(), StepError> {
    let whole =
        rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).at("open", "/")?;
    let private = Change {
        propagation: propagation::PRIVATE,
        recursive: true,
        ..Change::default()
    };
    mount::set_attributes(&whole, private).at("make private", "/")?;
    let root = NewFs::open("tmpfs")
        .and_then(|fs| {
            fs.string("nr_inodes", "2")?;
            fs.mount(attr::RDONLY | attr::NOSUID | attr::NODEV | attr::NOEXEC)
        })
        .at("mount", "tmpfs")?;
    mount::attach(&root, CWD, "/new").at("attach", "tmpfs")?;
    mount::change_root(&root).at("change root", "")
}
