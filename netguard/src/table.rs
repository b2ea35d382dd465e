//! Rules as a table of nf_tables, and its counters.
//!
//! ```text
//! chain output  every packet that leaves: lo passes, what is denied goes to refused;
//!               then, with a list, known connections, neighbours and what the list
//!               has pass, the rest goes to refused
//! chain input   the same for what comes in, where there is a list
//! chain refused counts by destination (refused_in: by source), shows the first
//!               packet of each to who listens, and tells the sender, so that
//!               programs fail at once
//! ```
//!
//! Without lists no connection is tracked, and packets that nobody denies pass a
//! comparison for each address that is denied.

use std::io;

use crate::expression::{Expressions, SetName, Verdict};
use crate::socket::{Failed, Socket};
use crate::wire::{self, Attributes, Messages, flag};
use crate::{Counter, Direction, GuardError, Installed, Rules, TABLE, Target};

/// The longest name of a rule, in bytes; longer ones are cut.
pub const COMMENT_LENGTH: usize = 127;

pub const NEW_TABLE: u16 = 0;
pub const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
pub const NEW_CHAIN: u16 = 3;
pub const GET_CHAIN: u16 = 4;
pub const NEW_RULE: u16 = 6;
pub const GET_RULE: u16 = 7;
const NEW_SET: u16 = 9;
/// Attributes of a rule.
pub const RULE_CHAIN: u16 = 2;
pub const RULE_EXPRESSIONS: u16 = 4;
pub const RULE_USERDATA: u16 = 7;

const OUTPUT: &str = "output";
const INPUT: &str = "input";

/// How refused packets of one direction are treated.
struct Refuse {
    direction: Direction,
    chain: &'static str,
    /// Of protocols without ports.
    other: &'static str,
    sets: [SetName; 2],
}

const REFUSE_OUT: Refuse = Refuse {
    direction: Direction::Out,
    chain: "refused",
    other: "refused_other",
    sets: [set("refused4", 1, false), set("refused6", 2, true)],
};
const REFUSE_IN: Refuse = Refuse {
    direction: Direction::In,
    chain: "refused_in",
    other: "refused_in_other",
    sets: [set("refused_in4", 3, false), set("refused_in6", 4, true)],
};

const fn set(name: &'static str, number: u32, v6: bool) -> SetName {
    SetName { name, number, v6 }
}

/// The sets, with the direction that each is for.
pub fn sets() -> impl Iterator<Item = (Direction, SetName)> {
    [REFUSE_OUT, REFUSE_IN]
        .into_iter()
        .flat_map(|refuse| refuse.sets.map(|set| (refuse.direction, set)))
}

/// Destinations that a set tells apart.
pub const MOST_REFUSED: u32 = 256;
/// How long one stays in it after its last packet, in milliseconds.
const REMEMBERED: u64 = 60 * 60 * 1000;
/// How often the kernel looks for those that have been there for so long. Its own
/// choice is each second, for each set of each pod.
const SWEPT: u32 = 10 * 60 * 1000;
/// New destinations shown in a second.
const SHOWN: u32 = 10;
/// What of their packets is shown: all headers there commonly are.
const SHOWN_BYTES: u32 = 128;
/// Messages of rules that show something are called so in errors.
const SHOWING: &str = "show";

/// Makes the table of the calling thread's network namespace be these rules,
/// whatever it was before, in one step.
///
/// # Errors
/// The kernel lacks nf_tables or a part of it, or the caller the capability.
pub fn install(rules: &Rules) -> Result<Installed, GuardError> {
    let socket = Socket::open()?;
    // Nearly always there is none yet.
    let (mut replace, mut shows) = (false, true);
    loop {
        match socket.transact(&transaction(rules, replace, shows)) {
            Ok(()) => return Ok(Installed { shows }),
            Err(Failed::Refused { code, .. }) if code == EXISTS && !replace => replace = true,
            // Without CONFIG_NETFILTER_NETLINK_LOG or CONFIG_NFT_LOG.
            Err(Failed::Refused { what, .. }) if what == SHOWING && shows => shows = false,
            Err(Failed::Refused { what, code }) => return Err(refused(what, code)),
            Err(Failed::Other(error)) => return Err(error),
        }
    }
}

const EXISTS: i32 = 17;
/// EOPNOTSUPP and EINVAL: what nfnetlink says where nf_tables isn't behind it.
const ABSENT: [i32; 2] = [95, 22];

fn refused(what: String, code: i32) -> GuardError {
    let reason = io::Error::from_raw_os_error(code);
    // Without the subsystem the batch itself, or the first message, is refused.
    if (what == "begin" || what == TABLE) && ABSENT.contains(&code) {
        return GuardError::Missing(reason);
    }
    GuardError::Refused { what, reason }
}

pub fn transaction(rules: &Rules, replace: bool, shows: bool) -> Messages {
    let mut table = Table(Messages::begin());
    if replace {
        table.delete();
    }
    table.make();
    if !rules.denied.is_empty() || rules.egress.is_some() {
        table.refuse(&REFUSE_OUT, shows);
    }
    table.chain(OUTPUT, Some(Direction::Out));
    // The pod's own addresses; what a refused sender is told goes there too.
    table.loopback(OUTPUT, Direction::Out);
    for target in &rules.denied {
        table.each(
            "egress denied",
            OUTPUT,
            target,
            Verdict::Jump(REFUSE_OUT.chain),
        );
    }
    if let Some(list) = &rules.egress {
        table.list("egress", OUTPUT, list, &REFUSE_OUT);
    }
    if let Some(list) = &rules.ingress {
        table.refuse(&REFUSE_IN, shows);
        table.chain(INPUT, Some(Direction::In));
        table.loopback(INPUT, Direction::In);
        table.list("ingress", INPUT, list, &REFUSE_IN);
    }
    // The kernel says once that all is done, at the last of them.
    table.make_again();
    table.0.end()
}

struct Table(Messages);

impl Table {
    fn named(&mut self, kind: u16, flags: u16) {
        self.0.add(kind, flags, TABLE, |a| a.text(1, TABLE));
    }

    fn make(&mut self) {
        self.named(NEW_TABLE, flag::CREATE | flag::EXCL);
    }

    /// Deletes it, whether it is there or not.
    fn delete(&mut self) {
        self.named(NEW_TABLE, flag::CREATE);
        self.named(DELETE_TABLE, 0);
    }

    fn make_again(&mut self) {
        self.named(NEW_TABLE, flag::CREATE | flag::ACK);
    }

    fn chain(&mut self, name: &'static str, hook: Option<Direction>) {
        self.0.add(NEW_CHAIN, flag::CREATE, name, |a| {
            a.text(1, TABLE);
            a.text(3, name);
            if let Some(direction) = hook {
                a.nested(4, |a| {
                    a.number(
                        1,
                        match direction {
                            Direction::In => 1,
                            Direction::Out => 3,
                        },
                    );
                    // Where other filters are: behind connection tracking, and
                    // behind what rewrites addresses.
                    a.number(2, 0);
                });
                a.number(5, 1);
                a.text(7, "filter");
            }
        });
    }

    fn rule(&mut self, chain: &str, comment: &str, fill: impl FnOnce(&mut Expressions<'_, '_>)) {
        let name = if comment.is_empty() { chain } else { comment };
        self.named_rule(name, (chain, comment), fill);
    }

    /// `name` is for errors.
    fn named_rule(
        &mut self,
        name: &str,
        (chain, comment): (&str, &str),
        fill: impl FnOnce(&mut Expressions<'_, '_>),
    ) {
        let flags = flag::CREATE | flag::APPEND;
        self.0.add(NEW_RULE, flags, name, |a: &mut Attributes<'_>| {
            a.text(1, TABLE);
            a.text(RULE_CHAIN, chain);
            a.nested(RULE_EXPRESSIONS, |a| fill(&mut Expressions(a)));
            if !comment.is_empty() {
                a.bytes(RULE_USERDATA, &as_comment(comment));
            }
        });
    }

    /// A rule for each of the target's protocols.
    fn each(&mut self, what: &str, chain: &str, target: &Target, verdict: Verdict) {
        let direction = if chain == INPUT {
            Direction::In
        } else {
            Direction::Out
        };
        let protocols: Vec<_> = match &target.protocols[..] {
            [] => vec![None],
            some => some.iter().copied().map(Some).collect(),
        };
        for protocol in protocols {
            self.rule(chain, &format!("{what} {}", target.name), |e| {
                e.target(direction, target, protocol);
                e.counter();
                e.verdict(verdict);
            });
        }
    }

    fn set(&mut self, set: SetName) {
        const TIMEOUT: u32 = 0x10;
        const CHANGED_BY_PACKETS: u32 = 0x20;
        // As nft(8) numbers what it shows: an address, a protocol, a port.
        const SIX_BITS: u32 = 6;
        let (address, length) = if set.v6 { (8, 16) } else { (7, 4) };
        let kind = (address << SIX_BITS | 12) << SIX_BITS | 13;
        self.0.add(NEW_SET, flag::CREATE, set.name, |a| {
            a.text(1, TABLE);
            a.text(2, set.name);
            a.number(3, TIMEOUT | CHANGED_BY_PACKETS);
            a.number(4, kind);
            a.number(5, length + 8);
            a.nested(9, |a| a.number(1, MOST_REFUSED));
            a.number(10, set.number);
            a.bytes(11, &REMEMBERED.to_be_bytes());
            a.number(12, SWEPT);
        });
    }

    /// Where refused packets of a direction go to.
    fn refuse(&mut self, refuse: &Refuse, shows: bool) {
        for set in refuse.sets {
            self.set(set);
        }
        for (chain, ports) in [(refuse.other, false), (refuse.chain, true)] {
            self.chain(chain, None);
            if ports {
                self.rule(chain, "", |e| {
                    e.without_ports();
                    e.verdict(Verdict::Goto(refuse.other));
                });
            }
            for set in refuse.sets {
                if shows {
                    self.named_rule(SHOWING, (chain, ""), |e| {
                        e.family(set.v6);
                        e.destination(refuse.direction, set.v6, ports);
                        e.is_not_in(set);
                        e.at_most(SHOWN);
                        e.show(crate::GROUP, SHOWN_BYTES);
                    });
                }
                // A full set ends this rule, and no more.
                self.rule(chain, "", |e| {
                    e.family(set.v6);
                    e.destination(refuse.direction, set.v6, ports);
                    e.count_in(set);
                });
            }
            if ports {
                self.rule(chain, "", |e| {
                    e.tcp();
                    e.reject(true);
                });
            }
            self.rule(chain, "", |e| e.reject(false));
        }
    }

    fn loopback(&mut self, chain: &str, direction: Direction) {
        self.rule(chain, "", |e| {
            e.loopback(direction);
            e.verdict(Verdict::Accept);
        });
    }

    /// What a list lets through, and the end of the rest.
    fn list(&mut self, what: &str, chain: &str, list: &[Target], refuse: &Refuse) {
        self.rule(chain, &format!("{what} known connections"), |e| {
            e.known_connection();
            e.verdict(Verdict::Accept);
        });
        // Listeners of multicast, routers and neighbours (RFC 2710, 4861); and
        // listeners of its second version (RFC 3810).
        for (first, last) in [(130, 136), (143, 143)] {
            self.rule(chain, "", |e| {
                e.icmp6(first, last);
                e.verdict(Verdict::Accept);
            });
        }
        for target in list {
            self.each(&format!("{what} allowed"), chain, target, Verdict::Accept);
        }
        self.rule(chain, &format!("{what} denied: not on the list"), |e| {
            e.counter();
            e.verdict(Verdict::Jump(refuse.chain));
        });
    }
}

/// The form in which nft(8) keeps the comment of a rule.
fn as_comment(text: &str) -> Vec<u8> {
    let mut end = text.len().min(COMMENT_LENGTH);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let text = text.get(..end).unwrap_or_default();
    let length = u8::try_from(text.len() + 1).unwrap_or(u8::MAX);
    let mut bytes = vec![0, length];
    bytes.extend(text.as_bytes());
    bytes.push(0);
    bytes
}

/// What the rules of the calling thread's network namespace have counted, in
/// their order; `None` if there is no table.
///
/// # Errors
/// The kernel lacks nf_tables, or the caller the capability.
pub fn counters() -> Result<Option<Vec<Counter>>, GuardError> {
    let socket = Socket::open()?;
    let mut ask = Messages::default();
    ask.add(GET_RULE, flag::DUMP, "rules", |a| a.text(1, TABLE));
    let mut found: Vec<Counter> = Vec::new();
    let mut any = false;
    let listed = socket.list(&ask, |answer| {
        let all: Vec<(u16, &[u8])> = answer.attributes().collect();
        let of = |kind| all.iter().find(|(k, _)| *k == kind).map(|(_, v)| *v);
        if of(1).map(wire::text).as_deref() != Some(TABLE) {
            return;
        }
        any = true;
        let name = of(RULE_USERDATA).and_then(comment_of);
        let counted = of(RULE_EXPRESSIONS).and_then(counted);
        let (Some(name), Some((packets, bytes))) = (name, counted) else {
            return;
        };
        // One line for all protocols of an entry.
        match found.iter_mut().find(|c| c.name == name) {
            Some(counter) => {
                counter.packets = counter.packets.saturating_add(packets);
                counter.bytes = counter.bytes.saturating_add(bytes);
            }
            None => found.push(Counter {
                name,
                packets,
                bytes,
            }),
        }
    });
    listed.map_err(|error| match error {
        GuardError::Io(e) if e.raw_os_error().is_some_and(|code| ABSENT.contains(&code)) => {
            GuardError::Missing(e)
        }
        error => error,
    })?;
    Ok(any.then_some(found))
}

pub fn comment_of(userdata: &[u8]) -> Option<String> {
    match userdata {
        [0, length, text @ ..] => text.get(..usize::from(*length)).map(wire::text),
        _ => None,
    }
}

/// Packets and bytes of the counter among a rule's expressions.
fn counted(expressions: &[u8]) -> Option<(u64, u64)> {
    wire::attributes(expressions).find_map(|(_, expression)| counter(expression))
}

/// Packets and bytes, if the expression is a counter.
pub fn counter(expression: &[u8]) -> Option<(u64, u64)> {
    let mut name = String::new();
    let mut data: &[u8] = &[];
    for (kind, value) in wire::attributes(expression) {
        match kind {
            1 => name = wire::text(value),
            2 => data = value,
            _ => {}
        }
    }
    if name != "counter" {
        return None;
    }
    let (mut bytes, mut packets) = (0, 0);
    for (kind, value) in wire::attributes(data) {
        match kind {
            1 => bytes = wire::long(value),
            2 => packets = wire::long(value),
            _ => {}
        }
    }
    Some((packets, bytes))
}
