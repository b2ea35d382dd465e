//! Finds the rule that a call meets: a classic BPF program, as seccomp(2) takes
//! them, is interpreted, and its verdict is the number of a rule. The few
//! instructions are those that such programs are made of.

use casemate_sys::notify::Question;

/// `SECCOMP_RET_TRACE`: the verdict that carries a rule's number.
const RULE: u32 = 0x7ff0_0000;
/// `SECCOMP_RET_ERRNO`.
const ERRNO: u32 = 0x0005_0000;
const ACTION: u32 = 0xffff_0000;

/// The program, instruction by instruction: code, jt, jf, k.
pub struct Rules(Vec<(u16, u8, u8, u32)>);

impl Rules {
    /// Of an array of `struct sock_filter`.
    pub fn new(program: &[u8]) -> Rules {
        let (whole, _) = program.as_chunks::<8>();
        let instruction = |&[c0, c1, jt, jf, k0, k1, k2, k3]: &[u8; 8]| {
            let code = u16::from_ne_bytes([c0, c1]);
            (code, jt, jf, u32::from_ne_bytes([k0, k1, k2, k3]))
        };
        Rules(whole.iter().map(instruction).collect())
    }

    /// The rule; `None` where the program has no answer.
    pub fn of(&self, question: &Question) -> Option<u16> {
        self.verdict(question, RULE)
    }

    /// The error of a filter; `None` where it answers something else.
    pub fn errno_of(&self, question: &Question) -> Option<u16> {
        self.verdict(question, ERRNO)
    }

    /// What a verdict of this action carries.
    fn verdict(&self, question: &Question, action: u32) -> Option<u16> {
        let mut acc = 0;
        let mut at = 0usize;
        // Jumps only go forward: it ends.
        loop {
            let (code, jt, jf, k) = *self.0.get(at)?;
            at += 1;
            let to = |holds: bool| usize::from(if holds { jt } else { jf });
            match code {
                0x20 => acc = word(question, k)?,
                0x54 => acc &= k,
                0x05 => at = at.checked_add(k as usize)?,
                0x15 => at += to(acc == k),
                0x25 => at += to(acc > k),
                0x35 => at += to(acc >= k),
                0x06 if k & ACTION == action => return Some((k & 0xffff) as u16),
                _ => return None,
            }
        }
    }
}

/// The word at an offset of `struct seccomp_data`.
fn word(question: &Question, offset: u32) -> Option<u32> {
    if !offset.is_multiple_of(4) {
        return None;
    }
    let half = |value: u64| {
        let half = if offset.is_multiple_of(8) {
            value
        } else {
            value >> 32
        };
        (half & u64::from(u32::MAX)) as u32
    };
    match offset {
        0 => Some(question.nr),
        4 => Some(question.arch),
        8 | 12 => Some(half(question.instruction_pointer)),
        16..=60 => question
            .args
            .get((offset as usize - 16) / 8)
            .copied()
            .map(half),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(list: &[(u16, u8, u8, u32)]) -> Rules {
        let bytes: Vec<u8> = list
            .iter()
            .flat_map(|(code, jt, jf, k)| {
                let mut bytes = code.to_ne_bytes().to_vec();
                bytes.extend([*jt, *jf]);
                bytes.extend(k.to_ne_bytes());
                bytes
            })
            .collect();
        Rules::new(&bytes)
    }

    fn question(nr: u32, args: [u64; 6]) -> Question {
        Question {
            nr,
            args,
            ..Question::default()
        }
    }

    #[test]
    fn a_call_finds_its_rule() {
        let rules = program(&[
            (0x20, 0, 0, 0),
            (0x15, 0, 4, 41),
            (0x20, 0, 0, 16),
            (0x54, 0, 0, 0xff),
            (0x35, 0, 1, 17),
            (0x06, 0, 0, RULE | 7),
            (0x06, 0, 0, 0x7fff_0000),
        ]);
        assert_eq!(rules.of(&question(41, [17, 0, 0, 0, 0, 0])), Some(7));
        assert_eq!(rules.of(&question(41, [0x111, 0, 0, 0, 0, 0])), Some(7));
        assert_eq!(rules.of(&question(41, [2, 0, 0, 0, 0, 0])), None);
        assert_eq!(rules.of(&question(1, [17, 0, 0, 0, 0, 0])), None);
    }

    #[test]
    fn a_broken_program_has_no_answer_and_no_panic() {
        for list in [
            &[][..],
            &[(0x20, 0, 0, 3)],
            &[(0x20, 0, 0, 64)],
            &[(0x05, 0, 0, u32::MAX)],
            &[(0x15, 255, 255, 0)],
            &[(0xffff, 0, 0, 0)],
            &[(0x06, 0, 0, 0x7fff_0000)],
        ] {
            assert_eq!(program(list).of(&question(0, [0; 6])), None);
        }
    }
}
