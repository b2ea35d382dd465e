//! Becoming another program, and the descriptor table it inherits.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};

use crate::marked;

fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings
        .iter()
        .map(|s| s.as_ptr())
        .chain(std::iter::once(std::ptr::null()))
        .collect()
}

/// Executes the file behind `fd` (execveat(2) with AT_EMPTY_PATH). Returns
/// only on failure.
pub fn exec_fd(fd: impl AsFd, args: &[CString], env: &[CString]) -> io::Error {
    let (argv, envp) = (pointers(args), pointers(env));
    // SAFETY: both arrays are NULL-terminated and point to NUL-terminated
    // strings that outlive the call; on success this image is gone.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            fd.as_fd().as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            envp.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    io::Error::last_os_error()
}

/// Executes `path` (execve(2)). Returns only on failure.
pub fn exec(path: &CString, args: &[CString], env: &[CString]) -> io::Error {
    let (argv, envp) = (pointers(args), pointers(env));
    // SAFETY: as in `exec_fd`.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    io::Error::last_os_error()
}

/// Puts `files` at the descriptor numbers 0, 1, 2… and closes everything
/// above on exec. Works whatever numbers `files` have now.
pub fn install_descriptors(files: Vec<OwnedFd>) -> io::Result<()> {
    let count = files.len() as u32;
    // First out of the way of the targets, then down into place.
    let mut high = Vec::with_capacity(files.len());
    for file in &files {
        high.push(marked::copy_from(file, count.max(3) + 1)?);
    }
    drop(files);
    for (number, file) in high.iter().enumerate() {
        // SAFETY: dup2 onto numbers below `count`: whatever was there is meant
        // to be replaced (see the contract of this function).
        unsafe {
            marked::call(
                libc::SYS_dup2,
                [marked::number(file), number as u64, 0, 0, 0],
            )
        }?;
    }
    close_from_on_exec(count)
}

/// Marks every descriptor from `first` up close-on-exec (close_range(2)).
pub fn close_from_on_exec(first: u32) -> io::Result<()> {
    const CLOSE_RANGE_CLOEXEC: u32 = 4;
    // SAFETY: only flags of descriptors change.
    unsafe { close_range(first, u32::MAX, CLOSE_RANGE_CLOEXEC) }
}

/// # Safety
///
/// Without flags: nothing may use the descriptors any more.
unsafe fn close_range(first: u32, last: u32, flags: u32) -> io::Result<()> {
    let arguments = [first.into(), last.into(), flags.into(), 0, 0];
    // SAFETY: integers only; the rest is the caller's promise.
    unsafe { marked::call(libc::SYS_close_range, arguments) }.map(drop)
}

/// Closes every descriptor except `keep`. For a freshly forked child that is
/// about to forget its parent: values that owned the closed numbers must be
/// forgotten too, which the caller promises by never touching them again.
pub fn close_all_except(keep: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut numbers: Vec<u32> = keep.iter().map(|f| f.as_raw_fd() as u32).collect();
    numbers.sort_unstable();
    let mut first = 0u32;
    for number in numbers.into_iter().chain(std::iter::once(u32::MAX)) {
        if first < number {
            let last = if number == u32::MAX {
                u32::MAX
            } else {
                number - 1
            };
            // SAFETY: the caller runs in a fork whose other descriptors are
            // nobody's any more; no Rust value will use them again.
            unsafe { close_range(first, last, 0) }?;
        }
        first = number.saturating_add(1);
    }
    Ok(())
}

/// Makes `fd` survive exec and returns its number.
pub fn keep_on_exec(fd: OwnedFd) -> io::Result<RawFd> {
    rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty())?;
    Ok(fd.into_raw_fd())
}
