//! How the calling thread is scheduled (sched(7), ioprio_set(2), personality(2)).

use std::io;

fn check(r: libc::c_long) -> io::Result<()> {
    if r >= 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// `struct sched_attr` of sched_setattr(2), its first version.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Sets policy (`SCHED_*`) and nice value of one of the policies without a
/// priority (sched_setattr(2)).
pub fn set_policy(policy: u32, nice: i32) -> io::Result<()> {
    let attributes = Attributes {
        size: size_of::<Attributes>() as u32,
        policy,
        nice,
        ..Attributes::default()
    };
    // SAFETY: the kernel reads `size` bytes of the live struct; 0 is this thread.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) })
}

/// Sets class and level for input and output, as ioprio_set(2) packs them.
pub fn set_io_priority(value: u16) -> io::Result<()> {
    const WHO_PROCESS: libc::c_int = 1;
    // SAFETY: integers only; 0 is this thread.
    check(unsafe {
        libc::syscall(
            libc::SYS_ioprio_set,
            WHO_PROCESS,
            0,
            libc::c_int::from(value),
        )
    })
}

/// Confines to the processors in `cpus` (sched_setaffinity(2)).
pub fn set_affinity(cpus: &[u16]) -> io::Result<()> {
    const BITS: usize = 64;
    let words = cpus
        .iter()
        .max()
        .map_or(0, |most| usize::from(*most) / BITS + 1);
    let mut mask = vec![0u64; words];
    for cpu in cpus {
        mask[usize::from(*cpu) / BITS] |= 1 << (usize::from(*cpu) % BITS);
    }
    // SAFETY: length and pointer describe `mask`, which the kernel only reads.
    check(unsafe {
        libc::syscall(
            libc::SYS_sched_setaffinity,
            0,
            size_of_val(mask.as_slice()),
            mask.as_ptr(),
        )
    })
}

/// Back to the plain Linux personality: no flag of whoever started us, such as
/// one that switches off randomised addresses, is passed on.
pub fn reset_personality() -> io::Result<()> {
    // SAFETY: integers only.
    check(unsafe { libc::syscall(libc::SYS_personality, 0) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_takes_what_it_is_given() {
        // In a thread: the test program goes on as it was.
        std::thread::spawn(|| {
            set_policy(libc::SCHED_BATCH as u32, 5).unwrap();
            set_io_priority(2 << 13 | 6).unwrap();
            set_affinity(&[0]).unwrap();
            // SAFETY: integers only; 0 is this thread.
            let (policy, io) = unsafe {
                (
                    libc::sched_getscheduler(0),
                    libc::syscall(libc::SYS_ioprio_get, 1, 0),
                )
            };
            assert_eq!((policy, io), (libc::SCHED_BATCH, 2 << 13 | 6));
            let text = std::fs::read_to_string("/proc/thread-self/status").unwrap();
            assert!(text.contains("Cpus_allowed_list:\t0\n"), "{text}");
            assert!(set_affinity(&[]).is_err());
        })
        .join()
        .unwrap();
    }
}
