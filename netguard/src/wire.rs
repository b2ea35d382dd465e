//! Netlink messages as bytes (netlink(7)): headers, attributes, and the batches
//! that nf_tables takes as one transaction.

/// Subsystem of nfnetlink that messages of nf_tables belong to.
pub const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// The family of tables that see IPv4 and IPv6.
const INET: u8 = 1;
const HEADER: usize = 16;
/// Header and `struct nfgenmsg`.
const WHOLE_HEADER: usize = HEADER + 4;
/// Length and type of an attribute.
const ATTRIBUTE: usize = 4;
/// Marks an attribute whose content is attributes.
const NESTED: u16 = 0x8000;

/// Flags of messages.
pub mod flag {
    pub const REQUEST: u16 = 0x1;
    pub const ACK: u16 = 0x4;
    pub const DUMP: u16 = 0x300;
    pub const EXCL: u16 = 0x200;
    pub const CREATE: u16 = 0x400;
    pub const APPEND: u16 = 0x800;
}

/// Kinds of answers that every family of netlink has.
pub const ERROR: u16 = 2;
pub const DONE: u16 = 3;

fn padded(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// Writes attributes behind what is there.
pub struct Attributes<'a>(&'a mut Vec<u8>);

impl Attributes<'_> {
    /// One with these bytes.
    pub fn bytes(&mut self, kind: u16, value: &[u8]) {
        // Longest are texts of ours, of some 200 bytes.
        let length = u16::try_from(ATTRIBUTE + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(padded(self.0.len()), 0);
    }

    /// A number, in network order as nf_tables has all of them.
    pub fn number(&mut self, kind: u16, value: u32) {
        self.bytes(kind, &value.to_be_bytes());
    }

    /// A name.
    pub fn text(&mut self, kind: u16, value: &str) {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.bytes(kind, &bytes);
    }

    /// One that holds others.
    pub fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Attributes<'_>)) {
        let start = self.0.len();
        self.bytes(kind | NESTED, &[]);
        fill(&mut Attributes(self.0));
        set_length(self.0, start);
    }
}

/// An attribute's length, now that it is all there.
fn set_length(bytes: &mut [u8], start: usize) {
    let length = u16::try_from(bytes.len() - start).unwrap_or(u16::MAX);
    if let Some(place) = bytes.get_mut(start..start + 2) {
        place.copy_from_slice(&length.to_ne_bytes());
    }
}

/// Messages to the kernel, one behind the other.
#[derive(Default)]
pub struct Messages {
    bytes: Vec<u8>,
    /// What each is for, by sequence number.
    names: Vec<String>,
}

impl Messages {
    /// An empty transaction.
    pub fn begin() -> Messages {
        let mut new = Messages::default();
        new.raw(BATCH_BEGIN, flag::REQUEST, (0, SUBSYSTEM), "begin", |_| ());
        new
    }

    /// The bytes of a whole transaction.
    pub fn end(mut self) -> Messages {
        self.raw(BATCH_END, flag::REQUEST, (0, SUBSYSTEM), "end", |_| ());
        self
    }

    /// Adds a message of nf_tables; `name` is for errors.
    pub fn add(
        &mut self,
        kind: u16,
        flags: u16,
        name: &str,
        fill: impl FnOnce(&mut Attributes<'_>),
    ) {
        let kind = SUBSYSTEM << 8 | kind;
        self.raw(kind, flag::REQUEST | flags, (INET, 0), name, fill);
    }

    /// Adds a message of nfnetlink_log to a group of its own.
    pub fn configure_log(&mut self, group: u16, fill: impl FnOnce(&mut Attributes<'_>)) {
        const LOG: u16 = 4;
        const CONFIGURE: u16 = 1;
        let flags = flag::REQUEST | flag::ACK;
        self.raw(LOG << 8 | CONFIGURE, flags, (0, group), "log", fill);
    }

    fn raw(
        &mut self,
        kind: u16,
        flags: u16,
        (family, resource): (u8, u16),
        name: &str,
        fill: impl FnOnce(&mut Attributes<'_>),
    ) {
        let start = self.bytes.len();
        let number = u32::try_from(self.names.len()).unwrap_or(u32::MAX);
        self.names.push(name.to_owned());
        self.bytes.extend(0u32.to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(flags.to_ne_bytes());
        self.bytes.extend(number.to_ne_bytes());
        self.bytes.extend(0u32.to_ne_bytes());
        self.bytes.extend([family, 0]);
        self.bytes.extend(resource.to_be_bytes());
        fill(&mut Attributes(&mut self.bytes));
        let length = u32::try_from(self.bytes.len() - start).unwrap_or(u32::MAX);
        if let Some(place) = self.bytes.get_mut(start..start + 4) {
            place.copy_from_slice(&length.to_ne_bytes());
        }
    }

    /// What is to be sent.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// What the message with this number was for.
    pub fn name(&self, number: u32) -> &str {
        usize::try_from(number)
            .ok()
            .and_then(|n| self.names.get(n))
            .map_or("?", String::as_str)
    }

    /// The number of the last message before the end.
    pub fn last(&self) -> u32 {
        u32::try_from(self.names.len().saturating_sub(2)).unwrap_or(u32::MAX)
    }
}

/// A message from the kernel.
pub struct Answer<'a> {
    /// Kind: [`ERROR`], [`DONE`], or subsystem and kind.
    pub kind: u16,
    /// Number of the message that it answers.
    pub number: u32,
    /// What follows the header.
    pub body: &'a [u8],
}

impl<'a> Answer<'a> {
    /// The kernel's error number, where it is one; 0 is an acknowledgement.
    pub fn error(&self) -> Option<i32> {
        let code = (self.kind == ERROR || self.kind == DONE)
            .then(|| self.body.first_chunk::<4>().copied().unwrap_or([0; 4]))?;
        Some(i32::from_ne_bytes(code).saturating_neg())
    }

    /// Attributes of a message of nf_tables.
    pub fn attributes(&self) -> impl Iterator<Item = (u16, &'a [u8])> + use<'a> {
        attributes(self.body.get(WHOLE_HEADER - HEADER..).unwrap_or_default())
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    let part = bytes.get(at..at + 2)?;
    Some(u16::from_ne_bytes(*part.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let part = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(*part.first_chunk()?))
}

/// The messages in what was received; ends where they make no sense.
pub fn answers(mut bytes: &[u8]) -> impl Iterator<Item = Answer<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let answer = Answer {
            kind: u16_at(bytes, 4)?,
            number: u32_at(bytes, 8)?,
            body: bytes.get(HEADER..length)?,
        };
        bytes = bytes.get(padded(length)..).unwrap_or_default();
        Some(answer)
    })
}

/// The attributes in `bytes`; ends where they make no sense.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & !NESTED;
        let value = bytes.get(ATTRIBUTE..length)?;
        bytes = bytes.get(padded(length)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The text of an attribute.
pub fn text(value: &[u8]) -> String {
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    String::from_utf8_lossy(value.get(..end).unwrap_or_default()).into_owned()
}

/// A number in network order; 0 if it is none.
pub fn number(value: &[u8]) -> u64 {
    value
        .first_chunk()
        .map_or(0, |bytes| u32::from_be_bytes(*bytes).into())
}

/// A number of eight bytes in network order.
pub fn long(value: &[u8]) -> u64 {
    value
        .first_chunk()
        .map_or(0, |bytes| u64::from_be_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let mut messages = Messages::begin();
        messages.add(6, flag::CREATE, "a rule", |a| {
            a.text(1, "casemate");
            a.nested(4, |a| a.number(2, 7));
            a.bytes(7, &[1, 2, 3]);
        });
        let messages = messages.end();
        let all: Vec<Answer<'_>> = answers(messages.bytes()).collect();
        assert_eq!(all.len(), 3);
        assert_eq!(all.iter().map(|a| a.number).collect::<Vec<_>>(), [0, 1, 2]);
        assert_eq!((all[0].kind, all[1].kind, all[2].kind), (16, 0xa06, 17));
        let read: Vec<_> = all[1].attributes().collect();
        assert_eq!(text(read[0].1), "casemate");
        assert_eq!(read[1].0, 4);
        let inside: Vec<_> = attributes(read[1].1).collect();
        assert_eq!(inside, [(2, &7u32.to_be_bytes()[..])]);
        assert_eq!(read[2], (7, &[1, 2, 3][..]));
        assert_eq!(messages.name(1), "a rule");
        assert_eq!(messages.last(), 1);
    }

    #[test]
    fn nonsense_ends_the_reading() {
        let whole = {
            let mut messages = Messages::begin();
            messages.add(6, 0, "x", |a| a.text(1, "casemate"));
            messages.end().bytes().to_vec()
        };
        for end in 0..whole.len() {
            for answer in answers(&whole[..end]) {
                answer.attributes().for_each(drop);
            }
        }
        // A length of 0 must not turn for ever.
        assert_eq!(answers(&[0; 64]).count(), 0);
        assert_eq!(attributes(&[0; 64]).count(), 0);
        assert_eq!(attributes(&[3, 0, 1, 0, 9]).count(), 0);
    }
}
