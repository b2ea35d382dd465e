//! The table in words that are the same for what was asked for and for what the
//! kernel has: so that whoever wants to know whether the guard still is as it was
//! made can compare the two.
//!
//! Left out is what the kernel adds or what moves: handles, counts, and numbers
//! that are 0, which it tells of some expressions and not of others.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use crate::socket::Socket;
use crate::table::{
    GET_CHAIN, GET_RULE, GET_TABLE, NEW_CHAIN, NEW_RULE, NEW_TABLE, RULE_CHAIN, RULE_EXPRESSIONS,
    RULE_USERDATA, comment_of, transaction,
};
use crate::wire::{self, Answer, Messages, SUBSYSTEM, attributes, flag};
use crate::{GuardError, Rules, TABLE};

/// A table, chain or rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Which: as `rule 3 of output (egress denied 169.254.169.254)`.
    pub name: String,
    /// What it says, not meant for reading: names, and numbers in hexadecimal.
    pub content: String,
}

/// `NFT_CHAIN_BASE`, which the kernel sets where there is a hook.
const BASE: u64 = 1;

/// What [`crate::install`] makes of these rules; `shows` as it answered.
#[must_use]
pub fn promised(rules: &Rules, shows: bool) -> Vec<Line> {
    let messages = transaction(rules, false, shows);
    let mut found = Found::default();
    for message in wire::answers(messages.bytes()) {
        found.take(&message);
    }
    found.lines()
}

/// What the calling thread's network namespace has; empty without the table.
///
/// # Errors
/// The kernel lacks nf_tables, or the caller the capability.
pub fn installed() -> Result<Vec<Line>, GuardError> {
    let socket = Socket::open()?;
    let mut found = Found::default();
    for kind in [GET_TABLE, GET_CHAIN, GET_RULE] {
        let mut ask = Messages::default();
        // A dump of tables takes no attribute, and one of chains none before 6.4.
        ask.add(kind, flag::DUMP, "list", |a| {
            if kind == GET_RULE {
                a.text(1, TABLE);
            }
        });
        socket.list(&ask, |answer| found.take(answer))?;
    }
    Ok(found.lines())
}

#[derive(Default)]
struct Found {
    table: Option<String>,
    chains: BTreeMap<String, String>,
    /// By chain, in their order.
    rules: BTreeMap<String, Vec<(String, String)>>,
}

impl Found {
    fn take(&mut self, message: &Answer<'_>) {
        let all: BTreeMap<u16, &[u8]> = message.attributes().collect();
        let text = |kind: u16| all.get(&kind).map(|v| wire::text(v)).unwrap_or_default();
        if text(1) != TABLE {
            return;
        }
        let number = |kind: u16| all.get(&kind).map_or(0, |v| wire::number(v));
        match message.kind.checked_sub(SUBSYSTEM << 8) {
            Some(NEW_TABLE) => {
                // Such as "dormant", with which it does nothing.
                self.table = Some(format!("flags {:x}", number(2)));
            }
            Some(NEW_CHAIN) => {
                let hook: BTreeMap<u16, &[u8]> = all
                    .get(&4)
                    .map(|v| attributes(v).collect())
                    .unwrap_or_default();
                let of_hook = |kind: u16| hook.get(&kind).map_or(0, |v| wire::number(v));
                let content = match hook.is_empty() {
                    true => String::from("to jump to"),
                    false => format!(
                        "{} at hook {:x}, priority {:x}, policy {:x}, flags {:x}",
                        text(7),
                        of_hook(1),
                        of_hook(2),
                        number(5),
                        number(10) & !BASE
                    ),
                };
                self.chains.insert(text(3), content);
            }
            Some(NEW_RULE) => {
                let comment = all.get(&RULE_USERDATA).and_then(|v| comment_of(v));
                let content = all.get(&RULE_EXPRESSIONS).map(|v| expressions(v));
                let rules = self.rules.entry(text(RULE_CHAIN)).or_default();
                rules.push((comment.unwrap_or_default(), content.unwrap_or_default()));
            }
            _ => {}
        }
    }

    fn lines(self) -> Vec<Line> {
        let line = |name: String, content: String| Line { name, content };
        let table = self
            .table
            .map(|content| line(format!("table {TABLE}"), content));
        let chains = self
            .chains
            .into_iter()
            .map(|(name, content)| line(format!("chain {name}"), content));
        let rules = self.rules.into_iter().flat_map(|(chain, rules)| {
            let named = rules.into_iter().enumerate();
            named.map(move |(n, (comment, content))| {
                let about = match comment.is_empty() {
                    true => String::new(),
                    false => format!(" ({comment})"),
                };
                line(format!("rule {} of {chain}{about}", n + 1), content)
            })
        });
        table.into_iter().chain(chains).chain(rules).collect()
    }
}

/// `name(attribute=value …)` for each expression of a rule.
fn expressions(list: &[u8]) -> String {
    let mut out = String::new();
    for (_, element) in attributes(list) {
        let parts: BTreeMap<u16, &[u8]> = attributes(element).collect();
        let name = parts.get(&1).map(|v| wire::text(v)).unwrap_or_default();
        if !out.is_empty() {
            out.push(' ');
        }
        out.push_str(&name);
        // Of a counter only that it is there.
        if let Some(data) = parts.get(&2).filter(|_| name != "counter") {
            out.push('(');
            content(&mut out, &name, data, 0);
            out.push(')');
        }
    }
    out
}

/// Whether this attribute of an expression holds others.
fn is_nested(expression: &str, kind: u16, depth: usize) -> bool {
    match (expression, depth) {
        ("cmp", 0) => kind == 3,
        ("bitwise", 0) => kind == 4 || kind == 5,
        // What comes into the register, and there the verdict.
        ("immediate", 0 | 1) => kind == 2,
        _ => false,
    }
}

/// Whether this attribute of an expression is the number of a register.
fn is_register(expression: &str, kind: u16) -> bool {
    match expression {
        "meta" | "payload" | "cmp" | "ct" | "immediate" => kind == 1,
        "bitwise" => kind == 1 || kind == 2,
        "lookup" => kind == 2,
        "dynset" => kind == 4,
        _ => false,
    }
}

/// Registers of four bytes are numbered from 8 on, and have the numbers of those of
/// sixteen, from 1 on, where they are at the same place: the kernel tells those.
fn register(number: u64) -> u64 {
    match number.checked_sub(8) {
        Some(small) if small % 4 == 0 => small / 4 + 1,
        _ => number,
    }
}

fn content(out: &mut String, expression: &str, data: &[u8], depth: usize) {
    let parts: BTreeMap<u16, &[u8]> = attributes(data).collect();
    let mut first = true;
    for (kind, value) in parts {
        // The number that a set has while it is being made.
        if depth == 0 && matches!((expression, kind), ("lookup", 4) | ("dynset", 2)) {
            continue;
        }
        let nested = is_nested(expression, kind, depth);
        if !nested && depth == 0 && value.iter().all(|b| *b == 0) {
            continue;
        }
        if !first {
            out.push(' ');
        }
        first = false;
        // Writing to a String doesn't fail.
        let _ = write!(out, "{kind}=");
        if depth == 0 && is_register(expression, kind) {
            let _ = write!(out, "r{}", register(wire::number(value)));
        } else if (expression, kind, depth) == ("dynset", 7, 0) {
            // What each element gets, a counter: its name.
            let inner: BTreeMap<u16, &[u8]> = attributes(value).collect();
            out.push_str(&inner.get(&1).map(|v| wire::text(v)).unwrap_or_default());
        } else if nested {
            out.push('(');
            content(out, expression, value, depth + 1);
            out.push(')');
        } else {
            for byte in value {
                let _ = write!(out, "{byte:02x}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Target;

    fn rules(address: &str) -> Rules {
        Rules {
            denied: vec![Target {
                name: address.into(),
                address: address.parse().unwrap(),
                prefix: 32,
                ports: None,
                protocols: Vec::new(),
            }],
            ..Rules::default()
        }
    }

    #[test]
    fn what_is_promised_differs_where_the_rules_do() {
        let one = promised(&rules("192.0.2.7"), true);
        let other = promised(&rules("192.0.2.8"), true);
        assert_eq!(one.len(), other.len());
        let differ: Vec<_> = one.iter().zip(&other).filter(|(a, b)| a != b).collect();
        assert_eq!(differ.len(), 1, "{differ:?}");
        assert!(differ[0].0.content.contains("c0000207"), "{differ:?}");
        assert!(differ[0].0.name.contains("egress denied 192.0.2.7"));
        let list = Rules {
            ingress: Some(Vec::new()),
            ..rules("192.0.2.7")
        };
        let more = promised(&list, true);
        assert!(more.len() > one.len());
        assert!(more.iter().any(|line| line.name == "chain input"));
    }
}
