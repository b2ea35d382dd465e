//! The life of one process, as a table.

/// Where a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// An exec that is registered and hasn't been started.
    Added,
    /// An init that is parked before exec.
    Created,
    /// Start of an exec has been asked for; its streams are being opened.
    Opening,
    /// Start has been asked for and hasn't been answered.
    Starting,
    /// Runs.
    Running,
    /// Has ended, or never came to be.
    Stopped,
}

/// What happens to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Start is asked for.
    Start,
    /// The streams of an exec are open.
    Opened,
    /// Start succeeded; its event is in the queue.
    Started,
    /// Start failed: there is no process.
    Failed,
    /// The forker reaped it.
    Exit,
}

/// What follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The new phase.
    To(Phase),
    /// Keep the exit until the start event is in the queue.
    Park,
    /// Not in this phase.
    Refuse,
}

impl Phase {
    /// The whole state machine.
    pub fn on(self, event: Event) -> Next {
        match (self, event) {
            (Phase::Added, Event::Start) => Next::To(Phase::Opening),
            (Phase::Opening, Event::Opened) | (Phase::Created, Event::Start) => {
                Next::To(Phase::Starting)
            }
            (Phase::Starting, Event::Started) => Next::To(Phase::Running),
            (Phase::Opening | Phase::Starting, Event::Failed) => Next::To(Phase::Stopped),
            (Phase::Starting, Event::Exit) => Next::Park,
            (Phase::Created | Phase::Running, Event::Exit) => Next::To(Phase::Stopped),
            _ => Next::Refuse,
        }
    }

    /// For error texts.
    pub fn name(self) -> &'static str {
        match self {
            Phase::Added => "added",
            Phase::Created => "created",
            Phase::Opening | Phase::Starting => "starting",
            Phase::Running => "running",
            Phase::Stopped => "stopped",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_phase_and_event_has_its_outcome() {
        use Event::{Exit, Failed, Opened, Start, Started};
        use Phase::{Added, Created, Opening, Running, Starting, Stopped};
        let events = [Start, Opened, Started, Failed, Exit];
        let (r, p) = (Next::Refuse, Next::Park);
        let table = [
            (Added, [Next::To(Opening), r, r, r, r]),
            (Created, [Next::To(Starting), r, r, r, Next::To(Stopped)]),
            (Opening, [r, Next::To(Starting), r, Next::To(Stopped), r]),
            (Starting, [r, r, Next::To(Running), Next::To(Stopped), p]),
            (Running, [r, r, r, r, Next::To(Stopped)]),
            (Stopped, [r, r, r, r, r]),
        ];
        for (phase, outcomes) in table {
            for (event, outcome) in events.into_iter().zip(outcomes) {
                assert_eq!(phase.on(event), outcome, "{phase:?} {event:?}");
            }
        }
    }
}
