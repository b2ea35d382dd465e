//! Pods, as the kubelet makes them: over the CRI socket of real containerds of
//! several generations, `cri16_…`, `cri17_…` and so on; and tasks through each
//! generation's `ctr`, `ctr16_…`.
//!
//! One daemon of each generation serves all tests. Each test makes its own pods
//! and takes them away again.

mod classes;
pub mod client;
mod config;
mod guard;
mod learn;
mod life;
mod limits;
mod network;
mod node;
mod policy;
mod refuse;
mod sandboxer;
mod secrets;
mod security;
mod stream;
mod userns;
mod volumes;

use std::sync::{Arc, RwLock, RwLockReadGuard};

use casemate_tests::World;
use casemate_tests::generation::Generation;
use casemate_tests::skip::{self, Outcome, Stop, fail, skip};
use casemate_tests::world::Node;
use libtest_mimic::Trial;

/// One generation's daemon, as tests use it.
pub struct Cri {
    pub generation: Generation,
    pub node: Arc<Node>,
    pub world: &'static World,
}

/// A test of CRI.
pub type Test = fn(&Cri) -> Outcome;

/// Names tests after their functions.
#[macro_export]
macro_rules! cri_tests {
    ($($name:ident),+ $(,)?) => {
        pub const TESTS: &[(&str, $crate::cri::Test)] = &[$((stringify!($name), $name)),+];
    };
}

/// A test that restarts a daemon must not cut off another one's calls.
static RESTARTS: [RwLock<()>; 4] = [const { RwLock::new(()) }; 4];

fn gate(generation: Generation) -> &'static RwLock<()> {
    let at = Generation::ALL.iter().position(|g| *g == generation);
    &RESTARTS[at.unwrap_or(0)]
}

/// Keeps the daemon from being restarted while a test uses it.
fn hold(generation: Generation) -> Result<RwLockReadGuard<'static, ()>, Stop> {
    gate(generation)
        .read()
        .or_else(|_| fail("a test panicked in a restart"))
}

/// Its daemon, started at the first call; skips where there is none.
fn open(generation: Generation) -> Result<Cri, Stop> {
    let world = World::get()?;
    if generation.binaries().is_none() {
        return skip(generation.missing());
    }
    let cri = Cri {
        generation,
        node: world.node(generation)?,
        world,
    };
    cri.answers()?;
    Ok(cri)
}

/// All tests, for all generations.
pub fn trials() -> Vec<Trial> {
    let shared = [
        classes::TESTS,
        guard::TESTS,
        learn::TESTS,
        life::TESTS,
        limits::TESTS,
        network::TESTS,
        policy::TESTS,
        refuse::TESTS,
        secrets::TESTS,
        security::TESTS,
        stream::TESTS,
        volumes::TESTS,
    ];
    let mut all = Vec::new();
    for generation in Generation::ALL {
        let tag = generation.tag();
        let since = |first: Generation, tests: &'static [(&'static str, Test)]| match generation {
            g if g < first => &[],
            _ => tests,
        };
        let shared = shared.iter().copied().flatten();
        let newer = since(Generation::V1_7, life::SINCE_1_7)
            .iter()
            .chain(since(Generation::V1_7, stream::SINCE_1_7))
            .chain(since(Generation::V2_1, volumes::SINCE_2))
            .chain(since(Generation::V2_1, sandboxer::TESTS))
            .chain(since(Generation::V2_1, guard::BY_API))
            .chain(userns::tests(generation));
        for (name, test) in shared.chain(newer) {
            all.push(skip::trial(&format!("cri{tag}_{name}"), move || {
                let _hold = hold(generation)?;
                test(&open(generation)?)
            }));
        }
        for (name, test) in node::TESTS
            .iter()
            .chain(since(Generation::V2_1, node::SINCE_2))
        {
            all.push(skip::trial(&format!("ctr{tag}_{name}"), move || {
                let _hold = hold(generation)?;
                test(&open(generation)?)
            }));
        }
        for (name, test) in node::RESTARTS
            .iter()
            .chain(guard::ALONE)
            .chain(since(Generation::V2_1, sandboxer::RESTARTS))
        {
            all.push(skip::trial(&format!("cri{tag}_{name}"), move || {
                let Ok(_alone) = gate(generation).write() else {
                    return fail("a test panicked in a restart");
                };
                test(&open(generation)?)
            }));
        }
    }
    all
}
