//! HOME of a user, from the image's own /etc/passwd: a hostile file.

use std::fs::File;
use std::io::Read;

use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, openat};

const PASSWD: &str = "/etc/passwd";

/// The most of the file that is read, in bytes.
const LIMIT: u64 = 1024 * 1024;

/// The home directory of `uid`; `/` when the file has none or can't be read.
///
/// Called inside the container's root, as that user and behind all of its locks: so
/// links lead nowhere that the user couldn't read anyway, and what is read decides the
/// value of HOME and nothing else. By openat(2), which every profile has.
pub fn home(uid: u32) -> String {
    let read = || -> Option<Vec<u8>> {
        // NONBLOCK: a fifo of that name must not hang us.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = File::from(openat(CWD, PASSWD, flags, Mode::empty()).ok()?);
        // Not by statx(2), which a profile may refuse.
        let mode = fstat(&file).ok()?.st_mode;
        if FileType::from_raw_mode(mode) != FileType::RegularFile {
            return None;
        }
        let mut bytes = Vec::new();
        file.take(LIMIT).read_to_end(&mut bytes).ok()?;
        Some(bytes)
    };
    read()
        .and_then(|bytes| find(&bytes, uid))
        .unwrap_or_else(|| "/".to_owned())
}

fn find(bytes: &[u8], uid: u32) -> Option<String> {
    bytes.split(|b| *b == b'\n').find_map(|line| {
        let mut fields = line.split(|b| *b == b':');
        let id = fields.nth(2)?;
        let home = fields.nth(2)?;
        let id: u32 = std::str::from_utf8(id).ok()?.parse().ok()?;
        let home = std::str::from_utf8(home).ok()?;
        (id == uid && home.starts_with('/') && !home.contains('\0')).then(|| home.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::find;

    #[test]
    fn the_home_of_a_user_is_found_among_rubbish() {
        let file = b"\xff\xfe\nroot:x:0:0:root:/root:/bin/sh\nx:y\n:::::\nweb:x:33:33::/srv:\n";
        assert_eq!(find(file, 0).as_deref(), Some("/root"));
        assert_eq!(find(file, 33).as_deref(), Some("/srv"));
        assert_eq!(find(file, 5), None);
        assert_eq!(find(b"a:x:5:5::relative:", 5), None);
    }
}
