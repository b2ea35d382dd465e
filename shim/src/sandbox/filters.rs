//! The system-call filters of a container: what is made of its profile and of its
//! specification's filter, for the forker and for each process.

use std::sync::Arc;

use casemate_protocol::plan::LaunchPlan;
use casemate_spec::Tightened;
use seccomp_profiles::stack::stack;
use seccomp_profiles::{Form, Prepared, Program, TooLarge, marked};

use super::SandboxError;
use crate::plan;

const _: () = assert!(casemate_sys::marked::MARK == marked::MARK);

/// The filters of a container: its profile, and what is made of it and of the
/// specification's.
#[derive(Debug, Clone)]
pub struct Filters {
    /// Whose they are.
    pub profile: Arc<Prepared>,
    /// The profile's for the forker, and so for all of the container, where no listener
    /// is asked; hooks have it always.
    pub enforce: Vec<u8>,
    /// In its place: asks a listener. Empty: there is no broker.
    pub asks: Vec<u8>,
    /// Beside it: refuses nothing, and asks about what is written down. Empty: the
    /// container isn't learned from.
    pub learns: Vec<u8>,
    /// What takes the forker's marked calls back, for hooks. Empty: there are none.
    pub closes: Vec<u8>,
    /// The last one of each process, with flags of seccomp(2): the specification's,
    /// which takes these calls back, too. Empty: none.
    pub own: (Vec<u8>, u32),
    /// As the specification has it.
    pub written: Vec<u8>,
}

impl Filters {
    /// Of a profile, and the specification's filter, which with a broker leaves it
    /// to the listener to refuse what either of the two does. (Where that is too
    /// large a program it refuses by itself, and is not heard of.)
    pub fn of(
        spec: &Tightened,
        profile: Arc<Prepared>,
        broker: bool,
    ) -> Result<Filters, SandboxError> {
        let learn = spec.effective.learn;
        let (written, flags) = plan::filter(spec.seccomp.as_ref(), learn)?;
        let mut filters = Filters {
            enforce: profile.program(Form::Enforce).to_vec(),
            asks: Vec::new(),
            learns: Vec::new(),
            closes: Vec::new(),
            own: (written.clone(), flags),
            written,
            profile,
        };
        // A container that is learned from has its listener for that.
        if learn {
            filters.learns = plan::program("learn")?;
        } else if broker {
            filters.asks = filters.profile.program(Form::Notify).to_vec();
            if !filters.written.is_empty()
                && let Some(asks) = Program::from_bytes(&filters.asks)
                && let Some(own) = Program::from_bytes(&filters.written)
                && let Ok(stacked) = stack(&asks, &own)
            {
                filters.asks = stacked.asks.to_bytes();
                filters.own.0 = stacked.own.to_bytes();
            }
        }
        match filters.profile.marked() {
            // Nothing has to be told apart.
            None if !learn => {}
            Some(marked) if !learn && filters.written.is_empty() => {
                filters.enforce.clone_from(&marked.enforce);
                if broker {
                    filters.asks.clone_from(&marked.notify);
                }
                filters.closes.clone_from(&marked.closes);
                filters.own.0.clone_from(&marked.closes);
            }
            _ => filters
                .mark()
                .map_err(|e| SandboxError::Invalid(format!("linux.seccomp: {e}")))?,
        }
        Ok(filters)
    }

    /// Lets the forker's calls run where they have its mark, and takes that back in the
    /// last filter.
    fn mark(&mut self) -> Result<(), TooLarge> {
        let program = |bytes: &[u8]| Program::from_bytes(bytes).filter(|_| !bytes.is_empty());
        let binding = match self.asks.is_empty() {
            true => &self.enforce,
            false => &self.asks,
        };
        let bound: Vec<Program> = [binding, &self.learns]
            .into_iter()
            .filter_map(|bytes| program(bytes))
            .collect();
        let bound: Vec<&Program> = bound.iter().collect();
        let own = program(&self.own.0);
        if let Some(closes) = marked::close(&bound, None)? {
            self.closes = closes.to_bytes();
        }
        if let Some(last) = marked::close(&bound, own.as_ref())? {
            self.own.0 = last.to_bytes();
        }
        for bytes in [&mut self.enforce, &mut self.asks, &mut self.learns] {
            if let Some(open) = program(bytes)
                .map(|p| marked::open(&p))
                .transpose()?
                .flatten()
            {
                *bytes = open.to_bytes();
            }
        }
        Ok(())
    }

    /// Puts them into the plan of a container.
    pub fn fill(&self, plan: &mut LaunchPlan) {
        plan.filter.clone_from(&self.enforce);
        plan.asks.clone_from(&self.asks);
        plan.learns.clone_from(&self.learns);
        plan.closes.clone_from(&self.closes);
        // Without no_new_privs, a last filter needs a capability.
        plan.own_filters = !plan.no_new_privs && !self.own.0.is_empty();
    }
}
