//! Whether one program lets run only what another one does.
//!
//! Both are walked together, for each number, with what is known of each word of
//! the arguments on the way: bits, bounds, and what they are not. A way on which the
//! first allows and the second refuses counts unless what is known contradicts
//! itself. So the answer may be a false alarm where conditions are intricate, and
//! never a false "yes".

use crate::action::Action;
use crate::compile::X32;
use crate::interp::SeccompData;
use crate::program::{self as bpf, Program, SockFilter};

/// Last number that is looked at apart; none above has a name.
const LAST: u32 = 1023;
/// Steps of a comparison; a shipped profile with itself takes some thousands.
const STEPS: usize = 1 << 18;
/// How many bits are tried with all values that they can have.
const OPEN: u32 = 8;

/// A call that the first program lets run and the second doesn't.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Beyond {
    /// The call, with arguments as far as both ask for them.
    pub call: SeccompData,
    /// The second one's answer; `None` where the comparison was given up.
    pub refused: Option<Action>,
}

/// What is known of a word.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Word {
    /// Bits that are known, and what they are.
    mask: u32,
    value: u32,
    low: u32,
    high: u32,
    /// On these bits it is not that.
    not: Vec<(u32, u32)>,
}

impl Default for Word {
    fn default() -> Self {
        Self {
            mask: 0,
            value: 0,
            low: 0,
            high: u32::MAX,
            not: Vec::new(),
        }
    }
}

impl Word {
    /// Learns `word & mask == value`; whether that can be.
    fn is(&mut self, mask: u32, value: u32) -> bool {
        if value & !mask != 0 || self.mask & mask & (self.value ^ value) != 0 {
            return false;
        }
        self.mask |= mask;
        self.value |= value;
        self.fits()
    }

    /// Learns `word & mask != value`; whether that can be.
    fn is_not(&mut self, mask: u32, value: u32) -> bool {
        if value & !mask != 0 {
            return true;
        }
        self.not.push((mask, value));
        self.fits()
    }

    /// Learns that it is not below or above; whether that can be.
    fn between(&mut self, low: u32, high: u32) -> bool {
        self.low = self.low.max(low);
        self.high = self.high.min(high);
        self.fits()
    }

    /// Whether what is known allows any value, as far as is seen: an end of the bounds
    /// that it is not makes them narrower, and bounds with one value in them are all
    /// its bits.
    fn fits(&mut self) -> bool {
        while self.low < self.high && self.excludes(self.low) {
            self.low += 1;
        }
        while self.low < self.high && self.excludes(self.high) {
            self.high -= 1;
        }
        if self.low > self.high {
            return false;
        }
        if self.low == self.high {
            if (self.low ^ self.value) & self.mask != 0 {
                return false;
            }
            (self.mask, self.value) = (u32::MAX, self.low);
        }
        // What it is not says what it is, where one bit is open.
        let mut at = 0;
        while let Some(&(mask, value)) = self.not.get(at) {
            at += 1;
            let open = mask & !self.mask;
            if (self.value ^ value) & mask & self.mask != 0 {
                continue;
            }
            if open == 0 {
                return false;
            }
            if open.is_power_of_two() {
                self.mask |= open;
                self.value |= !value & open;
                at = 0;
            }
        }
        // The least and the most that it can be, by its bits, meet its bounds.
        self.value <= self.high && (self.value | !self.mask) >= self.low
    }

    /// Whether it is said not to be this very value.
    fn excludes(&self, value: u32) -> bool {
        self.not.contains(&(u32::MAX, value))
    }
}

/// What the accumulator is.
#[derive(Debug, Clone, Copy)]
enum Held {
    Known(u32),
    /// This word of the arguments, cut down by the mask.
    Word(usize, u32),
}

type Words = [Word; 12];

/// A place in a program, and what is known there.
struct Way {
    at: usize,
    held: Held,
    words: Words,
}

impl Way {
    fn start(words: Words) -> Self {
        Self {
            at: 0,
            held: Held::Known(0),
            words,
        }
    }

    /// Bits of the accumulator that aren't known, where they are few and not a word's
    /// all: bounds of such are not kept.
    fn open(&self) -> Option<(usize, u32)> {
        let Held::Word(word, mask) = self.held else {
            return None;
        };
        let open = mask & !self.words.get(word)?.mask;
        (mask != u32::MAX && (1..=OPEN).contains(&open.count_ones())).then_some((word, open))
    }

    fn is_open(&self) -> bool {
        self.open().is_some()
    }

    /// One way for each value of those bits.
    fn split(self) -> Vec<Way> {
        let Some((word, open)) = self.open() else {
            return vec![self];
        };
        let mut ways = Vec::new();
        let mut value = 0u32;
        loop {
            let mut words = self.words.clone();
            if words.get_mut(word).is_some_and(|word| word.is(open, value)) {
                ways.push(Way { words, ..self });
            }
            // The next subset of those bits.
            value = value.wrapping_sub(open) & open;
            if value == 0 {
                return ways;
            }
        }
    }

    /// Learns that a comparison turned out so; whether that can be.
    fn learn(&mut self, ins: SockFilter, holds: bool) -> bool {
        let (word, mask) = match self.held {
            Held::Known(value) => return compare(ins, value) == holds,
            Held::Word(word, mask) => (word, mask),
        };
        let Some(word) = self.words.get_mut(word) else {
            return true;
        };
        if mask & !word.mask == 0 {
            return compare(ins, word.value & mask) == holds;
        }
        let whole = mask == u32::MAX;
        match (ins.code, holds) {
            (bpf::JEQ_K, true) => word.is(mask, ins.k),
            (bpf::JEQ_K, false) => word.is_not(mask, ins.k),
            (bpf::JSET_K, true) => mask & ins.k != 0 && word.is_not(mask & ins.k, 0),
            (bpf::JSET_K, false) => word.is(mask & ins.k, 0),
            (bpf::JGT_K, true) if whole => ins.k < u32::MAX && word.between(ins.k + 1, u32::MAX),
            (bpf::JGT_K, false) if whole => word.between(0, ins.k),
            (bpf::JGE_K, true) if whole => word.between(ins.k, u32::MAX),
            (bpf::JGE_K, false) if whole => ins.k > 0 && word.between(0, ins.k - 1),
            _ => true,
        }
    }
}

fn compare(ins: SockFilter, value: u32) -> bool {
    match ins.code {
        bpf::JEQ_K => value == ins.k,
        bpf::JGT_K => value > ins.k,
        bpf::JGE_K => value >= ins.k,
        _ => value & ins.k != 0,
    }
}

/// Walks all ways of `program` for calls like `data`; `end` gets what each returns
/// and what is known then, and returns what it was looking for.
fn walk<T>(
    program: &Program,
    data: &SeccompData,
    words: Words,
    steps: &mut usize,
    mut end: impl FnMut(Action, Words, &mut usize) -> Option<T>,
) -> Result<Option<T>, GivenUp> {
    let mut ways = vec![Way::start(words)];
    while let Some(mut way) = ways.pop() {
        loop {
            *steps = steps.checked_sub(1).ok_or(GivenUp)?;
            let Some(&ins) = program.instructions().get(way.at) else {
                return Err(GivenUp);
            };
            way.at += 1;
            match ins.code {
                bpf::LD_W_ABS => {
                    way.held = match ins.k {
                        0 => Held::Known(data.nr),
                        4 => Held::Known(data.arch),
                        16..64 => Held::Word((ins.k as usize - 16) / 4, u32::MAX),
                        // Where the call was made: no rule asks.
                        _ => return Err(GivenUp),
                    }
                }
                bpf::AND_K => {
                    way.held = match way.held {
                        Held::Known(value) => Held::Known(value & ins.k),
                        Held::Word(word, mask) => Held::Word(word, mask & ins.k),
                    }
                }
                bpf::JA => way.at = way.at.saturating_add(ins.k as usize),
                bpf::RET_K => {
                    if let Some(found) = end(Action::from_ret(ins.k), way.words, steps) {
                        return Ok(Some(found));
                    }
                    break;
                }
                bpf::JGT_K | bpf::JGE_K if way.is_open() => {
                    way.at -= 1;
                    ways.extend(way.split());
                    break;
                }
                bpf::JEQ_K | bpf::JGT_K | bpf::JGE_K | bpf::JSET_K => {
                    let mut other = Way {
                        words: way.words.clone(),
                        ..way
                    };
                    if other.learn(ins, false) {
                        other.at += usize::from(ins.jf);
                        ways.push(other);
                    }
                    if !way.learn(ins, true) {
                        break;
                    }
                    way.at += usize::from(ins.jt);
                }
                _ => return Err(GivenUp),
            }
        }
    }
    Ok(None)
}

struct GivenUp;

fn runs(action: Action) -> bool {
    matches!(action, Action::Allow | Action::Log)
}

/// A call that `inner` lets run and `outer` doesn't, if there may be one.
#[must_use]
pub fn beyond(inner: &Program, outer: &Program) -> Option<Beyond> {
    let mut steps = STEPS;
    let x32 = [X32, X32 + 1, X32 + LAST, u32::MAX];
    let numbers = (0..=LAST).chain(x32);
    for nr in numbers {
        let data = SeccompData::x86_64(nr, [0; 6]);
        let given_up = Beyond {
            call: data,
            refused: None,
        };
        let found = walk(
            inner,
            &data,
            Words::default(),
            &mut steps,
            |action, words, steps| {
                if !runs(action) {
                    return None;
                }
                let ended = walk(outer, &data, words, steps, |action, words, _| {
                    (!runs(action)).then(|| Beyond {
                        call: SeccompData {
                            args: args(&words),
                            ..data
                        },
                        refused: Some(action),
                    })
                });
                ended.unwrap_or(Some(given_up))
            },
        );
        match found {
            Ok(None) => {}
            Ok(found) => return found,
            Err(GivenUp) => return Some(given_up),
        }
    }
    None
}

/// Arguments of a call on that way, as far as is known.
fn args(words: &Words) -> [u64; 6] {
    let (pairs, _) = words.as_chunks::<2>();
    let mut args = [0; 6];
    for (arg, [low, high]) in args.iter_mut().zip(pairs) {
        *arg = u64::from(some(high)) << 32 | u64::from(some(low));
    }
    args
}

/// A value that the word can have, if one of those nearby is.
fn some(word: &Word) -> u32 {
    let bits = |value: u32| (value & !word.mask) | word.value;
    let near = (0..64u32).map(|n| word.low.wrapping_add(n));
    let single = (0..32u32).map(|bit| 1 << bit);
    near.chain(single)
        .map(bits)
        .find(|value| {
            (word.low..=word.high).contains(value)
                && !word.not.iter().any(|(mask, not)| value & mask == *not)
        })
        .unwrap_or(word.value)
}
