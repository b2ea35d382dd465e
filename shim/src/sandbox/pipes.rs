//! A process' streams.

use std::os::fd::OwnedFd;

/// Makes a pipe the process' own, so that it can open /dev/stdout anew. Other
/// files, /dev/null above all, are shared with the host and stay as they are.
pub fn give_pipe(fd: &OwnedFd, root: u32, process: (u32, u32)) -> std::io::Result<()> {
    let stat = rustix::fs::fstat(fd)?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::Fifo {
        return Ok(());
    }
    if (stat.st_uid, stat.st_gid) != (0, 0) {
        // containerd named an owner (io_uid, io_gid: host ids), and it is set.
        return Ok(());
    }
    let uid = rustix::fs::Uid::from_raw(root + process.0);
    let gid = rustix::fs::Gid::from_raw(root + process.1);
    Ok(rustix::fs::fchown(fd, Some(uid), Some(gid))?)
}
