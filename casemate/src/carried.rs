//! A `casemate` that carries the other two programs behind its own end, so that a release
//! is one file to download, and the installer's image has one program.
//!
//! Behind the program itself come the others' bytes, a table of them as JSON, the length
//! of that table (8 bytes, little endian), and [`MARK`]. The kernel maps what a program's
//! headers name (elf(5)), so it never reads what is behind that; nor does any page of it
//! count as this program's memory. What is installed is the plain program.

use serde::{Deserialize, Serialize};

use crate::error::RunError;
use crate::install::files::digest;
use crate::release::CARRIED;

/// Last bytes of a program that carries others.
const MARK: &[u8; 8] = b"casemat1";
/// Bytes of the table's length.
const LENGTH: usize = 8;
/// The table is two lines; more is no table.
const MOST: usize = 4096;

/// A program, as the table has it.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    name: String,
    length: usize,
    /// SHA-256.
    digest: String,
}

/// A program, taken apart.
#[derive(Debug, PartialEq, Eq)]
pub struct Parts<'a> {
    /// Itself.
    pub plain: &'a [u8],
    /// The others, in the order of [`CARRIED`]; `None` if it carries none.
    pub others: Option<[&'a [u8]; CARRIED.len()]>,
}

/// Takes a program apart, and compares what it carries with the table's digests.
///
/// # Errors
/// It carries something, and not all of what was put there.
pub fn parts(program: &[u8]) -> Result<Parts<'_>, RunError> {
    let Some(marked) = program.strip_suffix(MARK) else {
        return Ok(Parts {
            plain: program,
            others: None,
        });
    };
    let (plain, others) = carried(marked).ok_or_else(|| {
        RunError::Refused(
            "check this program: what it carries is damaged: get the release's file again"
                .to_owned(),
        )
    })?;
    Ok(Parts {
        plain,
        others: Some(others),
    })
}

fn carried(marked: &[u8]) -> Option<(&[u8], [&[u8]; CARRIED.len()])> {
    let (rest, length) = marked.split_last_chunk::<LENGTH>()?;
    let length = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    if length > MOST {
        return None;
    }
    let (mut rest, table) = rest.split_at_checked(rest.len().checked_sub(length)?)?;
    let table: [Entry; CARRIED.len()] = serde_json::from_slice(table).ok()?;
    let mut others = [&[][..]; CARRIED.len()];
    // The last one is next to the table.
    for ((entry, name), other) in table.iter().zip(CARRIED).zip(&mut others).rev() {
        let (before, bytes) = rest.split_at_checked(rest.len().checked_sub(entry.length)?)?;
        if entry.name != name || entry.digest != digest(bytes) {
            return None;
        }
        *other = bytes;
        rest = before;
    }
    Some((rest, others))
}

/// The program `plain` with the others behind it.
///
/// # Errors
/// The table can't be written, which doesn't happen.
pub fn join(plain: &[u8], others: [&[u8]; CARRIED.len()]) -> Result<Vec<u8>, RunError> {
    let table: Vec<Entry> = CARRIED
        .into_iter()
        .zip(others)
        .map(|(name, bytes)| Entry {
            name: name.to_owned(),
            length: bytes.len(),
            digest: digest(bytes),
        })
        .collect();
    let table = serde_json::to_vec(&table)
        .map_err(|error| RunError::Refused(format!("write the table of programs: {error}")))?;
    let length = u64::try_from(table.len()).unwrap_or(u64::MAX).to_le_bytes();
    let mut whole = plain.to_vec();
    for part in others.into_iter().chain([&table[..], &length, MARK]) {
        whole.extend_from_slice(part);
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: &[u8] = b"\x7fELF casemate";
    const OTHERS: [&[u8]; 2] = [b"the shim", b"agent"];

    #[test]
    fn what_is_joined_comes_apart() {
        let whole = join(PLAIN, OTHERS).unwrap();
        let parts = parts(&whole).unwrap();
        assert_eq!(parts.plain, PLAIN);
        assert_eq!(parts.others, Some(OTHERS));
        // And again from the parts: the same bytes.
        assert_eq!(join(parts.plain, OTHERS).unwrap(), whole);
    }

    #[test]
    fn a_plain_program_carries_nothing() {
        for plain in [PLAIN, b"", b"casemat", &MARK[1..]] {
            let parts = parts(plain).unwrap();
            assert_eq!((parts.plain, parts.others), (plain, None));
        }
    }

    #[test]
    fn no_damage_passes() {
        let whole = join(PLAIN, OTHERS).unwrap();
        // Any byte behind the plain program, but for the mark, which makes it one that
        // carries.
        for at in PLAIN.len()..whole.len() - MARK.len() {
            for bit in [0x01, 0x80] {
                let mut damaged = whole.clone();
                damaged[at] ^= bit;
                let error = parts(&damaged).unwrap_err().to_string();
                assert!(error.contains("damaged"), "byte {at}: {error}");
            }
        }
        // The mark alone, and behind things too short to be anything.
        for length in 0..LENGTH + 3 {
            let short = [&vec![0xff; length][..], MARK].concat();
            assert!(parts(&short).is_err(), "{length}");
        }
    }
}
