//! The broker: answers the calls that a container's filter refuses, each with the
//! error that the filter would have given, and counts them. It never lets a call
//! run, and knows no policy: which rule a call meets is found by a program that
//! came from the shim, and what to answer stands in a table beside it.
//!
//! It works inside of the agent's one loop, a few questions a turn, so that a
//! flood of them delays a launch by no more than that. Tables are bounded. If the
//! agent dies its pod does; if it is stopped, the shim notices what waits here.

mod program;

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use casemate_protocol::plan::BrokerPlan;
use casemate_protocol::{Channel, Denial, FromAgent, MAX_DENIALS};
use casemate_sys::notify::{self, Question};
use rustix::event::PollFlags;

use program::Rules;

/// Questions answered of one container before the loop looks at the rest.
const AT_ONCE: usize = 16;
/// Sorts of denials told apart in a container; others are counted by rule alone.
const SORTS: usize = 64;
/// Between two reports of one container.
const REPORT_EACH: Duration = Duration::from_millis(500);
/// Sorts whose first is told at once, before reports wait for their turn.
const FIRST_AT_ONCE: u32 = SORTS as u32;
/// EPERM, for what a table says nothing of.
const EPERM: u16 = 1;

/// Calls of one sort.
struct Sort {
    denial: Denial,
    /// Told the shim of it before.
    told: bool,
}

/// The listeners of one container.
struct Container {
    number: u32,
    listeners: Vec<OwnedFd>,
    plan: BrokerPlan,
    rules: Rules,
    /// The specification's own filter.
    own: Rules,
    sorts: Vec<Sort>,
    last_report: Option<Instant>,
    firsts_left: u32,
}

/// All containers'.
#[derive(Default)]
pub struct Broker {
    containers: Vec<Container>,
}

impl Broker {
    /// Takes the listeners of a container.
    pub fn take(&mut self, number: u32, mut plan: BrokerPlan, listeners: Vec<OwnedFd>) {
        for listener in &listeners {
            // Only faster with it; kernels before 6.6 don't have it.
            let _slower = notify::wake_in_place(listener);
        }
        self.containers.push(Container {
            number,
            listeners,
            rules: Rules::new(&std::mem::take(&mut plan.program)),
            own: Rules::new(&std::mem::take(&mut plan.own)),
            plan,
            sorts: Vec::new(),
            last_report: None,
            firsts_left: FIRST_AT_ONCE,
        });
    }

    /// All listeners, in the order in which [`Broker::serve`] takes what poll(2)
    /// says of them.
    pub fn listeners(&self) -> impl Iterator<Item = &OwnedFd> {
        self.containers.iter().flat_map(|c| &c.listeners)
    }

    /// Until when a report waits, if one does.
    pub fn next_report(&self, now: Instant) -> Option<Instant> {
        let due = self.containers.iter().filter(|c| c.has_news());
        due.map(|container| container.report_at(now)).min()
    }

    /// Answers what waits at the listeners, of which `ready` has poll(2)'s word.
    pub fn serve(&mut self, ready: &[PollFlags]) {
        let mut ready = ready.iter();
        let mut ended = false;
        for container in &mut self.containers {
            let mut gone = Vec::new();
            for at in 0..container.listeners.len() {
                let flags = ready.next().copied().unwrap_or(PollFlags::empty());
                if flags.contains(PollFlags::IN) {
                    container.answer(at);
                } else if flags.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) {
                    // Nobody is left behind this filter.
                    gone.push(at);
                }
            }
            for at in gone.into_iter().rev() {
                container.listeners.remove(at);
                ended = true;
            }
        }
        if ended {
            self.containers
                .retain(|c| !c.listeners.is_empty() || c.has_news());
        }
    }

    /// Tells the shim what is due.
    pub fn report(&mut self, shim: &Channel) {
        let now = Instant::now();
        for container in &mut self.containers {
            if container.has_news() && container.report_at(now) <= now {
                container.report(shim, now);
            }
        }
        self.containers
            .retain(|c| !c.listeners.is_empty() || c.has_news());
    }
}

impl Container {
    fn answer(&mut self, listener: usize) {
        for turn in 0..AT_ONCE {
            let Some(fd) = self.listeners.get(listener) else {
                return;
            };
            // receive() waits where there is nothing: the first is known to be there.
            if turn > 0 && !is_readable(fd) {
                return;
            }
            let Ok(question) = notify::receive(fd) else {
                // Who asked was killed meanwhile.
                return;
            };
            let rule = self.rules.of(&question);
            let errno = rule.and_then(|rule| self.plan.errnos.get(usize::from(rule)));
            let errno = errno.copied().filter(|errno| *errno != 0).unwrap_or(EPERM);
            // Of two filters that refuse, the newest one's error counts (seccomp(2)).
            let own = self.own.errno_of(&question);
            let errno = own.unwrap_or(errno);
            // It may be gone by now: then there is nobody to answer.
            let _gone = notify::refuse(fd, question.id, errno);
            self.count(&question, rule.unwrap_or(u16::MAX), own);
        }
    }

    fn count(&mut self, question: &Question, rule: u16, own: Option<u16>) {
        let nr = question.nr;
        let classes = &self.plan.classes;
        let mask = classes.iter().find(|(known, _)| *known == nr);
        let mask = mask.map_or(0, |(_, mask)| *mask);
        let mut args = [0u32; 3];
        let chosen = (0..6).filter(|n| mask & 1 << n != 0);
        for (place, n) in args.iter_mut().zip(chosen) {
            *place = (question.args[n] & u64::from(u32::MAX)) as u32;
        }
        let is_same = |sort: &&mut Sort| {
            let known = &sort.denial;
            (known.rule, known.own, known.nr) == (rule, own, nr)
                && (known.args, known.others) == (args, false)
        };
        if let Some(sort) = self.sorts.iter_mut().find(is_same) {
            sort.denial.count = sort.denial.count.saturating_add(1);
            return;
        }
        if self.sorts.len() < SORTS {
            self.sorts.push(Sort {
                denial: Denial {
                    rule,
                    own,
                    nr,
                    args,
                    others: false,
                    count: 1,
                },
                told: false,
            });
            return;
        }
        // The last place is for all others, whatever they are.
        if let Some(last) = self.sorts.iter_mut().find(|sort| sort.denial.others) {
            last.denial.count = last.denial.count.saturating_add(1);
            return;
        }
        self.sorts.push(Sort {
            denial: Denial {
                rule,
                own,
                nr,
                args: [0; 3],
                others: true,
                count: 1,
            },
            told: false,
        });
    }

    fn has_news(&self) -> bool {
        self.sorts.iter().any(|sort| sort.denial.count > 0)
    }

    fn report_at(&self, now: Instant) -> Instant {
        let is_first = self.firsts_left > 0 && self.sorts.iter().any(|sort| !sort.told);
        match self.last_report {
            Some(last) if !is_first => last + REPORT_EACH,
            _ => now,
        }
    }

    fn report(&mut self, shim: &Channel, now: Instant) {
        self.last_report = Some(now);
        let due: Vec<usize> = (0..self.sorts.len())
            .filter(|at| self.sorts[*at].denial.count > 0)
            .collect();
        for some in due.chunks(MAX_DENIALS) {
            let list = some.iter().map(|at| self.sorts[*at].denial).collect();
            let message = FromAgent::Denied {
                container: self.number,
                list,
            };
            // Full: the counts stay, for the next time, which is never at once.
            if shim.send_now(&message, &[]).is_err() {
                self.firsts_left = 0;
                return;
            }
            for at in some {
                let sort = &mut self.sorts[*at];
                sort.denial.count = 0;
                if !sort.told {
                    sort.told = true;
                    self.firsts_left = self.firsts_left.saturating_sub(1);
                }
            }
        }
    }
}

/// Whether something waits there, without waiting.
pub fn is_readable(fd: impl AsFd) -> bool {
    let mut fds = [rustix::event::PollFd::new(&fd, PollFlags::IN)];
    let now = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().contains(PollFlags::IN)
}
