//! The life of a sandbox as the sandbox API tells it.

use std::time::SystemTime;

use super::process::Exited;

/// Where it is. Pods that `start` made from a specification stay at the first
/// unless somebody asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Life {
    /// CreateSandbox hasn't come yet.
    Awaited,
    /// Made: the agent waits.
    Created {
        /// When it was made.
        at: SystemTime,
    },
    /// Started: takes containers, as far as containerd is concerned.
    Ready {
        /// When it was made.
        at: SystemTime,
    },
    /// Stopped, or lost.
    Ended {
        /// When it was made.
        at: SystemTime,
        /// How it ended.
        exited: Exited,
    },
}

/// What happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// CreateSandbox has made it.
    Create(SystemTime),
    /// StartSandbox.
    Start,
    /// StopSandbox is done, or the agent has gone.
    End(Exited),
}

impl Life {
    /// What follows; `None`: not now.
    pub fn on(self, step: Step) -> Option<Life> {
        match (self, step) {
            (Life::Awaited, Step::Create(at)) => Some(Life::Created { at }),
            (Life::Created { at }, Step::Start) => Some(Life::Ready { at }),
            (Life::Created { at } | Life::Ready { at }, Step::End(exited)) => {
                Some(Life::Ended { at, exited })
            }
            _ => None,
        }
    }

    /// When it was made.
    pub fn created(self) -> Option<SystemTime> {
        match self {
            Life::Awaited => None,
            Life::Created { at } | Life::Ready { at } | Life::Ended { at, .. } => Some(at),
        }
    }

    /// How it ended.
    pub fn exited(self) -> Option<Exited> {
        match self {
            Life::Ended { exited, .. } => Some(exited),
            _ => None,
        }
    }

    /// For error texts.
    pub fn name(self) -> &'static str {
        match self {
            Life::Awaited => "not created",
            Life::Created { .. } => "created",
            Life::Ready { .. } => "ready",
            Life::Ended { .. } => "stopped",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_state_and_step_has_its_outcome() {
        let at = SystemTime::UNIX_EPOCH;
        let exited = Exited { status: 1, at };
        let steps = [Step::Create(at), Step::Start, Step::End(exited)];
        let created = Life::Created { at };
        let ready = Life::Ready { at };
        let ended = Life::Ended { at, exited };
        let table = [
            (Life::Awaited, [Some(created), None, None]),
            (created, [None, Some(ready), Some(ended)]),
            (ready, [None, None, Some(ended)]),
            (ended, [None, None, None]),
        ];
        for (life, outcomes) in table {
            for (step, outcome) in steps.into_iter().zip(outcomes) {
                assert_eq!(life.on(step), outcome, "{life:?} {step:?}");
            }
        }
    }
}
