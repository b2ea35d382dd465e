//! What a container was seen to do: bounded tables, and what of them the shim hasn't
//! heard yet.

use std::collections::BTreeMap;

use casemate_protocol::plan::{AddressForm, LearnPlan};
use casemate_protocol::{Channel, FromLearner, MAX_SEEN, Seen};
use casemate_sys::notify::Question;
use casemate_sys::observe::Asked;

use super::memory::{Path, Reader, SHORTEST, Unread};

/// Kinds of calls that are told apart.
const KINDS: usize = 4096;
/// Of one call.
const KINDS_OF_ONE: u16 = 512;
/// Ports, each way.
const PORTS: usize = 256;
/// Directories.
const DIRECTORIES: usize = 64;

/// What of the news is told.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Which {
    /// What wasn't seen before.
    New,
    /// What was seen again, too.
    All,
}

/// How often a kind of call was made since that was told, and whether it ever was.
#[derive(Default)]
struct Tally {
    count: u64,
    told: bool,
}

#[derive(Default)]
struct Lost {
    calls: u64,
    ports: u64,
    directories: u64,
    unread: u64,
}

/// The tables.
pub struct Notes {
    reader: Reader,
    kinds: BTreeMap<u32, Vec<(u8, u32)>>,
    paths: BTreeMap<u32, (u8, Option<u8>)>,
    addresses: BTreeMap<u32, (u8, AddressForm)>,
    calls: BTreeMap<(u32, [u32; 3]), Tally>,
    /// Kinds by call.
    of_call: BTreeMap<u32, u16>,
    /// Whether it was told.
    bound: BTreeMap<u16, bool>,
    connected: BTreeMap<u16, bool>,
    directories: BTreeMap<String, bool>,
    lost: Lost,
    has_news: bool,
}

impl Notes {
    /// Empty ones.
    pub fn new(plan: &LearnPlan, reader: Reader) -> Notes {
        let (paths, addresses) = (plan.paths.iter(), plan.addresses.iter());
        Notes {
            reader,
            kinds: plan.kinds.iter().cloned().collect(),
            paths: paths.map(|(nr, at, start)| (*nr, (*at, *start))).collect(),
            addresses: addresses
                .map(|(nr, at, form)| (*nr, (*at, *form)))
                .collect(),
            calls: BTreeMap::new(),
            of_call: BTreeMap::new(),
            bound: BTreeMap::new(),
            connected: BTreeMap::new(),
            directories: BTreeMap::new(),
            lost: Lost::default(),
            has_news: false,
        }
    }

    /// Whether there is anything to tell.
    pub fn has_news(&self) -> bool {
        self.has_news
    }

    /// Takes a call in; whether something of it is new.
    pub fn take(&mut self, asked: &Asked<'_>) -> bool {
        let question = asked.question();
        let mut new = self.call(question);
        if let Some((at, start)) = self.paths.get(&question.nr) {
            // Descriptors are ints, whatever the upper half says.
            let start = start.map(|at| argument(question, at) as i32);
            let address = argument(question, *at);
            let path = self.reader.path(question.pid, address, start);
            new |= self.path(path, || asked.is_current());
        }
        if let Some((at, form)) = self.addresses.get(&question.nr).copied() {
            for port in self.ports(question, at, form) {
                let own = form == AddressForm::Own;
                new |= self.port(port, own, || asked.is_current());
            }
        }
        new
    }

    fn ports(&self, question: &Question, at: u8, form: AddressForm) -> Vec<Result<u16, Unread>> {
        let (pid, address) = (question.pid, argument(question, at));
        let length = argument(question, at + 1);
        let messages = match form {
            // sendto(2) has no address on a connected socket.
            AddressForm::Own | AddressForm::Other if address == 0 || length < SHORTEST => {
                return Vec::new();
            }
            AddressForm::Own | AddressForm::Other => return vec![self.reader.port(pid, address)],
            AddressForm::Message => 1,
            AddressForm::Messages => length as u32,
        };
        if messages == 0 {
            return Vec::new();
        }
        match self
            .reader
            .ports_of_messages(pid, address, messages as usize)
        {
            Ok(ports) => ports.into_iter().map(Ok).collect(),
            Err(why) => vec![Err(why)],
        }
    }

    fn call(&mut self, question: &Question) -> bool {
        self.has_news = true;
        let mut args = [0; 3];
        let chosen = self.kinds.get(&question.nr).into_iter().flatten();
        for (place, (at, mask)) in args.iter_mut().zip(chosen) {
            *place = (argument(question, *at) & u64::from(*mask)) as u32;
        }
        if let Some(tally) = self.calls.get_mut(&(question.nr, args)) {
            tally.count = tally.count.saturating_add(1);
            return false;
        }
        let of_call = self.of_call.entry(question.nr).or_default();
        if self.calls.len() >= KINDS || *of_call >= KINDS_OF_ONE {
            self.lost.calls = self.lost.calls.saturating_add(1);
            return false;
        }
        *of_call += 1;
        let tally = Tally {
            count: 1,
            told: false,
        };
        self.calls.insert((question.nr, args), tally);
        true
    }

    /// `is_current` is asked last, and only of what is new.
    fn path(&mut self, path: Result<Path, Unread>, is_current: impl Fn() -> bool) -> bool {
        let name = match path {
            Ok(Path::Nowhere) | Err(Unread::Runtime) => return false,
            Ok(Path::Below(name)) if self.directories.contains_key(&name) => return false,
            Ok(Path::Below(name)) if self.directories.len() < DIRECTORIES => name,
            Ok(Path::Below(_) | Path::Odd) => {
                self.lost.directories = self.lost.directories.saturating_add(1);
                return false;
            }
            Err(Unread::Nothing) => {
                self.lost.unread = self.lost.unread.saturating_add(1);
                return false;
            }
        };
        is_current() && self.directories.insert(name, false).is_none()
    }

    fn port(
        &mut self,
        port: Result<u16, Unread>,
        own: bool,
        is_current: impl Fn() -> bool,
    ) -> bool {
        let ports = if own {
            &mut self.bound
        } else {
            &mut self.connected
        };
        match port {
            // "Any", or no internet address at all.
            Ok(0) | Err(Unread::Runtime) => false,
            Ok(port) if ports.contains_key(&port) => false,
            Ok(port) if ports.len() < PORTS => is_current() && ports.insert(port, false).is_none(),
            Ok(_) => {
                self.lost.ports = self.lost.ports.saturating_add(1);
                false
            }
            Err(Unread::Nothing) => {
                self.lost.unread = self.lost.unread.saturating_add(1);
                false
            }
        }
    }

    /// Tells the shim. What it can't take now stays, for the next time.
    pub fn tell(&mut self, shim: &Channel, which: Which) {
        let due = self.due(which);
        for some in due.chunks(MAX_SEEN) {
            let message = FromLearner::Seen(some.to_vec());
            if shim.send_now(&message, &[]).is_err() {
                return;
            }
            for seen in some {
                self.told(seen);
            }
        }
        if which == Which::All {
            self.has_news = false;
        }
    }

    fn due(&self, which: Which) -> Vec<Seen> {
        let wanted = |tally: &Tally| !tally.told || which == Which::All && tally.count > 0;
        let calls = self.calls.iter().filter(|(_, tally)| wanted(tally));
        let mut due: Vec<Seen> = calls
            .map(|((nr, args), tally)| Seen::Call {
                nr: *nr,
                args: *args,
                count: tally.count,
            })
            .collect();
        fn new<K>(table: &BTreeMap<K, bool>) -> impl Iterator<Item = &K> {
            table.iter().filter(|(_, told)| !**told).map(|(key, _)| key)
        }
        due.extend(new(&self.bound).copied().map(Seen::Bound));
        due.extend(new(&self.connected).copied().map(Seen::Connected));
        due.extend(new(&self.directories).cloned().map(Seen::Directory));
        let Lost {
            calls,
            ports,
            directories,
            unread,
        } = self.lost;
        if which == Which::All && [calls, ports, directories, unread] != [0; 4] {
            due.push(Seen::Lost {
                calls,
                ports,
                directories,
                unread,
            });
        }
        due
    }

    fn told(&mut self, seen: &Seen) {
        match seen {
            Seen::Call { nr, args, .. } => {
                self.calls.insert(
                    (*nr, *args),
                    Tally {
                        count: 0,
                        told: true,
                    },
                );
            }
            Seen::Bound(port) => {
                self.bound.insert(*port, true);
            }
            Seen::Connected(port) => {
                self.connected.insert(*port, true);
            }
            Seen::Directory(name) => {
                self.directories.insert(name.clone(), true);
            }
            Seen::Lost { .. } => self.lost = Lost::default(),
        }
    }
}

fn argument(question: &Question, at: u8) -> u64 {
    question.args.get(usize::from(at)).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use casemate_sys::message;

    fn notes() -> Notes {
        let plan = LearnPlan {
            kinds: vec![(16, vec![(1, u32::MAX)])],
            ..LearnPlan::default()
        };
        Notes::new(&plan, Reader::new(b"casemate-agent"))
    }

    fn call(nr: u32, request: u64) -> Question {
        Question {
            nr,
            args: [7, request, 8, 9, 10, 11],
            ..Question::default()
        }
    }

    fn heard(shim: &Channel) -> Vec<Seen> {
        let mut all = Vec::new();
        while let Ok(Some((FromLearner::Seen(list), _))) = shim.receive(false) {
            assert!(list.len() <= MAX_SEEN);
            all.extend(list);
        }
        all
    }

    fn channels() -> (Channel, Channel) {
        let (a, b) = message::pair().unwrap();
        (Channel::new(a), Channel::new(b))
    }

    #[test]
    fn kinds_are_told_once_at_once_and_then_counted() {
        let (ours, shims) = channels();
        let mut notes = notes();
        assert!(notes.call(&call(16, 0x5401)));
        assert!(!notes.call(&call(16, 0x5401 | 1 << 40)));
        assert!(notes.call(&call(16, 0x5402)));
        notes.tell(&ours, Which::New);
        let of = |nr, arg, count| Seen::Call {
            nr,
            args: [arg, 0, 0],
            count,
        };
        assert_eq!(heard(&shims), [of(16, 0x5401, 2), of(16, 0x5402, 1)]);
        assert!(!notes.call(&call(16, 0x5402)));
        assert!(notes.call(&call(1, 3)) && !notes.call(&call(1, 4)));
        notes.tell(&ours, Which::New);
        assert_eq!(heard(&shims), [of(1, 0, 2)]);
        notes.tell(&ours, Which::All);
        assert_eq!(heard(&shims), [of(16, 0x5402, 1)]);
        notes.tell(&ours, Which::All);
        assert_eq!(heard(&shims), []);
        assert!(!notes.has_news());
    }

    #[test]
    fn tables_are_bounded_and_what_is_lost_is_counted() {
        let (ours, shims) = channels();
        let mut notes = notes();
        for request in 0..600 {
            notes.call(&call(16, request));
        }
        for port in 0..300 {
            notes.port(Ok(port), true, || true);
            notes.port(Ok(port), false, || true);
        }
        for n in 0..70 {
            notes.path(Ok(Path::Below(format!("d{n}"))), || true);
        }
        notes.path(Ok(Path::Odd), || true);
        notes.path(Err(Unread::Runtime), || true);
        notes.path(Err(Unread::Nothing), || true);
        notes.port(Err(Unread::Nothing), true, || true);
        assert!(!notes.port(Ok(9999), true, || true));
        let mut all = Vec::new();
        while notes.has_news() {
            notes.tell(&ours, Which::All);
            all.extend(heard(&shims));
        }
        let count = |is: fn(&Seen) -> bool| all.iter().filter(|seen| is(seen)).count();
        assert_eq!(count(|s| matches!(s, Seen::Call { .. })), 512);
        assert_eq!(count(|s| matches!(s, Seen::Bound(_))), 256);
        assert_eq!(count(|s| matches!(s, Seen::Connected(_))), 256);
        assert_eq!(count(|s| matches!(s, Seen::Directory(_))), 64);
        let lost = Seen::Lost {
            calls: 88,
            ports: 87,
            directories: 7,
            unread: 2,
        };
        assert_eq!(all.last(), Some(&lost));
    }

    #[test]
    fn what_was_read_of_somebody_else_is_not_kept() {
        let mut notes = notes();
        let srv = || Ok(Path::Below("srv".to_owned()));
        // The caller has gone, and its pid may be another's since.
        assert!(!notes.path(srv(), || false));
        assert!(!notes.port(Ok(80), true, || false));
        assert!(!notes.port(Ok(80), false, || false));
        // So it is new when it is seen in earnest.
        assert!(notes.path(srv(), || true) && !notes.path(srv(), || true));
        assert!(notes.port(Ok(80), true, || true) && notes.port(Ok(80), false, || true));
    }

    #[test]
    fn what_a_full_channel_does_not_take_is_told_later() {
        let (ours, shims) = channels();
        let mut notes = notes();
        let mut told = 0;
        for request in 0..512 {
            notes.call(&call(16, request));
            notes.tell(&ours, Which::New);
        }
        loop {
            let some = heard(&shims).len();
            told += some;
            if some == 0 {
                break;
            }
            notes.tell(&ours, Which::New);
        }
        assert_eq!(told, 512);
    }
}
