//! Rules as a table of nf_tables, and its counters.
//!
//! ```text
//! chain output  every packet that leaves: lo passes, what is denied goes to refused;
//!               then, with a list, known connections, neighbours and what the list
//!               has pass, the rest goes to refused
//! chain input   the same for what comes in, where there is a list
//! chain refused the sender is told, so that programs fail at once
//! ```
//!
//! Without lists no connection is tracked, and packets that nobody denies pass a
//! comparison for each address that is denied.

use std::io;

use crate::expression::{Expressions, Verdict};
use crate::socket::{Failed, Socket};
use crate::wire::{self, Attributes, Messages, flag};
use crate::{Counter, Direction, GuardError, Rules, TABLE, Target};

/// The longest name of a rule, in bytes; longer ones are cut.
pub const COMMENT_LENGTH: usize = 127;

const NEW_TABLE: u16 = 0;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
/// Attributes of a rule.
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_USERDATA: u16 = 7;

const OUTPUT: &str = "output";
const INPUT: &str = "input";
const REFUSED: &str = "refused";

/// Makes the table of the calling thread's network namespace be these rules,
/// whatever it was before, in one step.
///
/// # Errors
/// The kernel lacks nf_tables or a part of it, or the caller the capability.
pub fn install(rules: &Rules) -> Result<(), GuardError> {
    let socket = Socket::open()?;
    // Nearly always there is none yet.
    match socket.transact(&transaction(rules, false)) {
        Err(Failed::Refused { code, .. }) if code == EXISTS => {
            socket.transact(&transaction(rules, true))
        }
        other => other,
    }
    .map_err(|failed| match failed {
        Failed::Other(error) => error,
        Failed::Refused { what, code } => refused(what, code),
    })
}

const EXISTS: i32 = 17;
const UNSUPPORTED: i32 = 95;
const INVALID: i32 = 22;

fn refused(what: String, code: i32) -> GuardError {
    let reason = io::Error::from_raw_os_error(code);
    // Without the subsystem the batch itself, or the first message, is refused.
    if (what == "begin" || what == TABLE) && [UNSUPPORTED, INVALID].contains(&code) {
        return GuardError::Missing(reason);
    }
    GuardError::Refused { what, reason }
}

fn transaction(rules: &Rules, replace: bool) -> Messages {
    let mut table = Table(Messages::begin());
    if replace {
        table.delete();
    }
    table.make();
    table.chain(REFUSED, None);
    table.rule(REFUSED, "", |e| {
        e.tcp();
        e.reject(true);
    });
    table.rule(REFUSED, "", |e| e.reject(false));
    table.chain(OUTPUT, Some(Direction::Out));
    // The pod's own addresses; what a refused sender is told goes there too.
    table.loopback(OUTPUT, Direction::Out);
    for target in &rules.denied {
        table.each("egress denied", OUTPUT, target, Verdict::Jump(REFUSED));
    }
    if let Some(list) = &rules.egress {
        table.list("egress", OUTPUT, list);
    }
    if let Some(list) = &rules.ingress {
        table.chain(INPUT, Some(Direction::In));
        table.loopback(INPUT, Direction::In);
        table.list("ingress", INPUT, list);
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

    fn loopback(&mut self, chain: &str, direction: Direction) {
        self.rule(chain, "", |e| {
            e.loopback(direction);
            e.verdict(Verdict::Accept);
        });
    }

    /// What a list lets through, and the end of the rest.
    fn list(&mut self, what: &str, chain: &str, list: &[Target]) {
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
            e.verdict(Verdict::Jump(REFUSED));
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
    socket.list(&ask, |answer| {
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
    })?;
    Ok(any.then_some(found))
}

fn comment_of(userdata: &[u8]) -> Option<String> {
    match userdata {
        [0, length, text @ ..] => text.get(..usize::from(*length)).map(wire::text),
        _ => None,
    }
}

/// Packets and bytes of the counter among a rule's expressions.
fn counted(expressions: &[u8]) -> Option<(u64, u64)> {
    wire::attributes(expressions).find_map(|(_, expression)| {
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
    })
}
