//! The shim's side of the broker: gives the agent what it needs to answer a
//! container's refused calls, takes its word of them, and sees to it that none
//! waits for an agent that doesn't answer (see [`super::watch`]).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use casemate_protocol::plan::BrokerPlan;
use casemate_protocol::{Channel, FromAgent, ToAgent, TransportError, seal_plan};
use seccomp_profiles::{Action, Form, Prepared};
use tokio::io::Interest;
use tokio::sync::watch;
use tokio::time::Instant;

use super::SandboxError;
use super::watch::{LOOK_EACH, Line, Who, guard, is_listener};
use crate::host::Step;
use crate::host::agent::Agent;
use crate::record::denials::Container;
use crate::record::{Record, Records, class};

/// Plans kept, for containers that are yet to come.
const PLANS: usize = 16;
/// Messages taken of an agent in a second; the rest waits with it.
const MESSAGES: u32 = 64;

/// The broker of one pod.
pub struct Broker {
    line: Arc<Line>,
    book: Arc<Mutex<Book>>,
    records: Records,
}

#[derive(Default)]
struct Book {
    next: u32,
    containers: BTreeMap<u32, Arc<Container>>,
    /// Plans by name of the profile and filter of the specification, as containers
    /// of a pod mostly share one.
    plans: BTreeMap<(String, String), OwnedFd>,
}

fn lock(book: &Mutex<Book>) -> MutexGuard<'_, Book> {
    book.lock().unwrap_or_else(PoisonError::into_inner)
}

fn broker_plan(container: &Container, own: &[u8]) -> Result<OwnedFd, SandboxError> {
    let errno = |action| match action {
        Action::Errno(number) => number,
        _ => 0,
    };
    let rules = container.profile.explainer().rules();
    seal_plan(&BrokerPlan {
        program: container.profile.program(Form::Explain).to_vec(),
        errnos: rules.iter().map(|rule| errno(rule.action)).collect(),
        classes: class::masks(),
        own: own.to_vec(),
    })
    .map_err(|e| SandboxError::Failed(format!("write the broker's plan: {e}")))
}

impl Broker {
    /// Listens to the agent from now on.
    pub fn new(agent: &Agent, records: Records) -> Result<Broker, SandboxError> {
        let copy = |fd: &dyn AsFd| fd.as_fd().try_clone_to_owned();
        let line = Arc::new(Line {
            channel: Channel::new(copy(&agent.channel).step("copy", "the agent's channel")?),
            pid: agent.pid,
            pidfd: copy(&agent.pidfd).step("copy", "the agent's pidfd")?,
            pongs: watch::Sender::new(0),
            who: Who::Agent,
            told: AtomicBool::new(false),
        });
        let book = Arc::<Mutex<Book>>::default();
        tokio::spawn(listen(line.clone(), book.clone(), records.clone()));
        Ok(Broker {
            line,
            book,
            records,
        })
    }

    /// Hands the listeners of a container's filter to the agent; `own` is the
    /// specification's filter as written.
    pub fn take(
        &self,
        id: &str,
        (profile, own): (&Arc<Prepared>, &[u8]),
        listeners: Vec<OwnedFd>,
    ) -> Result<(), SandboxError> {
        for listener in &listeners {
            is_listener(listener)?;
        }
        let container = Arc::new(Container {
            id: id.to_owned(),
            profile: profile.clone(),
            own: !own.is_empty(),
        });
        let key = (profile.name().to_owned(), casemate_posture::hash(own));
        let number = {
            let mut book = lock(&self.book);
            if !book.plans.contains_key(&key) {
                let plan = broker_plan(&container, own)?;
                // Few pods have more than a handful of filters.
                while book.plans.len() >= PLANS {
                    book.plans.pop_first();
                }
                book.plans.insert(key.clone(), plan);
            }
            book.next += 1;
            let number = book.next;
            book.containers.insert(number, container);
            let mut fds = Vec::new();
            fds.extend(book.plans.get(&key).map(AsFd::as_fd));
            fds.extend(listeners.iter().map(AsFd::as_fd));
            let message = ToAgent::Broker { container: number };
            let sent = self.line.channel.send_now(&message, &fds);
            sent.map_err(|e| SandboxError::Unavailable(format!("ask the agent: {e}")))?;
            number
        };
        for listener in listeners {
            let (line, records) = (self.line.clone(), self.records.clone());
            let (book, id) = (self.book.clone(), id.to_owned());
            tokio::spawn(async move {
                guard(&line, listener, &records, &id).await;
                // The last report may be under way.
                tokio::time::sleep(LOOK_EACH * 3).await;
                lock(&book).containers.remove(&number);
            });
        }
        Ok(())
    }
}

/// Takes the agent's words until it ends, or says what it must not.
async fn listen(line: Arc<Line>, book: Arc<Mutex<Book>>, records: Records) {
    let copy = line.channel.as_fd().try_clone_to_owned().map(Channel::new);
    let Ok(channel) = copy.and_then(|copy| crate::io::watch(copy, Interest::READABLE)) else {
        return;
    };
    let (mut taken, mut since) = (0, Instant::now());
    loop {
        let Ok(mut guard) = channel.readable().await else {
            return;
        };
        let said = channel.get_ref().receive::<FromAgent>(false);
        let what = match said {
            Ok(Some((message, _))) => heard(&line, &book, &records, message),
            Ok(None) => return,
            Err(TransportError::Io(e)) if e.kind() == io::ErrorKind::WouldBlock => {
                guard.clear_ready();
                continue;
            }
            Err(_) => Err("what is no message"),
        };
        if let Err(what) = what {
            let text = format!("the agent says {what}; refused calls aren't counted any more");
            log::error!("{text}");
            records.push(&Record::BrokerLoss {
                container: String::new(),
                text,
            });
            return;
        }
        taken += 1;
        if taken >= MESSAGES {
            tokio::time::sleep_until(since + Duration::from_secs(1)).await;
            (taken, since) = (0, Instant::now());
        } else if since.elapsed() > Duration::from_secs(1) {
            (taken, since) = (0, Instant::now());
        }
    }
}

fn heard(
    line: &Line,
    book: &Mutex<Book>,
    records: &Records,
    message: FromAgent,
) -> Result<(), &'static str> {
    match message {
        FromAgent::Pong => {
            line.pongs.send_modify(|pongs| *pongs += 1);
            Ok(())
        }
        FromAgent::Denied { container, list } => {
            let known = lock(book).containers.get(&container).cloned();
            match known {
                Some(known) => records.denied(container, &known, &list),
                // Its container may have gone meanwhile.
                None if container <= lock(book).next => Ok(()),
                None => Err("that a container was refused something which it never had"),
            }
        }
        FromAgent::Ready { .. } | FromAgent::Failed { .. } => Err("that it starts, once more"),
    }
}
