//! System calls with arguments of the caller's choice, for probes of a sandbox.
//!
//! Only calls of a fixed list, and never with an address of ours: what is passed
//! by pointer is copied into a buffer made for the call, and is larger than
//! anything that these calls write.

use std::io;

/// An argument of [`raw`].
#[derive(Debug, Clone, Copy)]
pub enum Arg<'a> {
    /// An integer.
    Int(usize),
    /// The address of a copy of these bytes, with zeros behind them.
    Bytes(&'a [u8]),
    /// The null address.
    Null,
}

/// Bytes of every buffer.
const BUFFER: usize = 1 << 16;

/// What the integers of a call can be.
#[derive(Clone, Copy, PartialEq)]
enum Ints {
    /// Anything: the kernel takes none of them for an address.
    Any,
    /// Which ones are addresses depends on another argument: no value that could
    /// be one of this process.
    NoAddress,
    /// Lengths of what the kernel may write, beside small flags: no more than a
    /// buffer holds. So for the first word of each buffer.
    Lengths,
}
use Ints::{Any, Lengths, NoAddress};

/// Name, number, positions (bits) of the arguments that are addresses, the rest.
type Call = (&'static str, libc::c_long, u8, Ints);

const CALLS: &[Call] = &[
    ("mount", libc::SYS_mount, 0b10111, Any),
    ("umount2", libc::SYS_umount2, 0b1, Any),
    ("pivot_root", libc::SYS_pivot_root, 0b11, Any),
    ("fsopen", libc::SYS_fsopen, 0b1, Any),
    ("fspick", libc::SYS_fspick, 0b10, Any),
    ("fsconfig", libc::SYS_fsconfig, 0b1100, Any),
    ("fsmount", libc::SYS_fsmount, 0, Any),
    ("open_tree", libc::SYS_open_tree, 0b10, Any),
    ("open_tree_attr", 467, 0b1010, Any),
    ("move_mount", libc::SYS_move_mount, 0b1010, Any),
    ("mount_setattr", libc::SYS_mount_setattr, 0b1010, Any),
    ("statmount", 457, 0b11, Lengths),
    ("listmount", 458, 0b11, Lengths),
    ("listns", 470, 0b11, Lengths),
    ("file_setattr", 469, 0b110, Any),
    ("chroot", libc::SYS_chroot, 0b1, Any),
    ("mknod", libc::SYS_mknod, 0b1, Any),
    (
        "name_to_handle_at",
        libc::SYS_name_to_handle_at,
        0b1110,
        Any,
    ),
    ("open_by_handle_at", libc::SYS_open_by_handle_at, 0b10, Any),
    ("fanotify_init", libc::SYS_fanotify_init, 0, Any),
    ("quotactl", libc::SYS_quotactl, 0b1010, Any),
    ("quotactl_fd", 443, 0b1000, Any),
    ("acct", libc::SYS_acct, 0b1, Any),
    ("swapon", libc::SYS_swapon, 0b1, Any),
    ("swapoff", libc::SYS_swapoff, 0b1, Any),
    ("reboot", libc::SYS_reboot, 0b1000, Any),
    ("init_module", libc::SYS_init_module, 0b101, Any),
    ("finit_module", libc::SYS_finit_module, 0b10, Any),
    ("delete_module", libc::SYS_delete_module, 0b1, Any),
    ("kexec_load", libc::SYS_kexec_load, 0b100, Any),
    ("kexec_file_load", libc::SYS_kexec_file_load, 0b1000, Any),
    ("sethostname", libc::SYS_sethostname, 0b1, Any),
    ("setdomainname", libc::SYS_setdomainname, 0b1, Any),
    ("settimeofday", libc::SYS_settimeofday, 0b11, Any),
    ("clock_settime", libc::SYS_clock_settime, 0b10, Any),
    ("clock_adjtime", libc::SYS_clock_adjtime, 0b10, Any),
    ("adjtimex", libc::SYS_adjtimex, 0b1, Any),
    ("syslog", libc::SYS_syslog, 0b10, Lengths),
    ("vhangup", libc::SYS_vhangup, 0, Any),
    ("iopl", libc::SYS_iopl, 0, Any),
    ("ioperm", libc::SYS_ioperm, 0, Any),
    ("modify_ldt", libc::SYS_modify_ldt, 0b10, Any),
    ("uselib", libc::SYS_uselib, 0b1, Any),
    ("ustat", libc::SYS_ustat, 0b10, Any),
    ("sysfs", libc::SYS_sysfs, 0, NoAddress),
    ("lookup_dcookie", libc::SYS_lookup_dcookie, 0b10, Lengths),
    ("unshare", libc::SYS_unshare, 0, Any),
    ("setns", libc::SYS_setns, 0, Any),
    ("clone", libc::SYS_clone, 0b11110, Any),
    ("clone3", libc::SYS_clone3, 0b1, Any),
    ("ptrace", libc::SYS_ptrace, 0b1100, Any),
    (
        "process_vm_readv",
        libc::SYS_process_vm_readv,
        0b1010,
        NoAddress,
    ),
    (
        "process_vm_writev",
        libc::SYS_process_vm_writev,
        0b1010,
        NoAddress,
    ),
    ("process_madvise", 440, 0b10, NoAddress),
    ("process_mrelease", 448, 0, Any),
    ("pidfd_getfd", libc::SYS_pidfd_getfd, 0, Any),
    ("kcmp", libc::SYS_kcmp, 0, Any),
    ("personality", libc::SYS_personality, 0, Any),
    ("prctl", libc::SYS_prctl, 0, NoAddress),
    ("seccomp", libc::SYS_seccomp, 0b100, Any),
    ("bpf", libc::SYS_bpf, 0b10, NoAddress),
    ("perf_event_open", libc::SYS_perf_event_open, 0b1, NoAddress),
    ("io_uring_setup", libc::SYS_io_uring_setup, 0b10, NoAddress),
    ("userfaultfd", libc::SYS_userfaultfd, 0, Any),
    ("memfd_secret", 447, 0, Any),
    ("remap_file_pages", libc::SYS_remap_file_pages, 0b1, Any),
    ("mbind", libc::SYS_mbind, 0b1001, Any),
    ("set_mempolicy", libc::SYS_set_mempolicy, 0b10, Any),
    ("get_mempolicy", libc::SYS_get_mempolicy, 0b1011, Lengths),
    ("move_pages", libc::SYS_move_pages, 0b11_1100, Any),
    ("migrate_pages", libc::SYS_migrate_pages, 0b1100, Any),
    ("vmsplice", libc::SYS_vmsplice, 0b10, NoAddress),
    ("add_key", libc::SYS_add_key, 0b111, Any),
    ("request_key", libc::SYS_request_key, 0b111, Any),
    ("keyctl", libc::SYS_keyctl, 0, NoAddress),
    ("lsm_list_modules", 461, 0b11, Lengths),
    ("map_shadow_stack", 453, 0b1, Any),
    ("uprobe", 336, 0, Any),
    ("socket", libc::SYS_socket, 0, Any),
    ("setsockopt", libc::SYS_setsockopt, 0b1000, NoAddress),
    ("getsockopt", libc::SYS_getsockopt, 0b11000, Lengths),
    ("ioctl", libc::SYS_ioctl, 0b100, NoAddress),
    ("setpriority", libc::SYS_setpriority, 0, Any),
    (
        "sched_setscheduler",
        libc::SYS_sched_setscheduler,
        0b100,
        Any,
    ),
    ("ioprio_set", libc::SYS_ioprio_set, 0, Any),
    ("prlimit64", libc::SYS_prlimit64, 0b1100, Any),
    ("setrlimit", libc::SYS_setrlimit, 0b10, Any),
    ("shmget", libc::SYS_shmget, 0, Any),
    ("msgget", libc::SYS_msgget, 0, Any),
    ("semget", libc::SYS_semget, 0, Any),
    ("mq_open", libc::SYS_mq_open, 0b1001, Any),
];

/// Whether a number could be an address of this process. User space of x86-64 is
/// from vm.mmap_min_addr to 2^47; a program that isn't position independent is in
/// its first 4 GiB with its heap, everything else near its end, or from a third of
/// it upwards.
fn could_be_address(value: usize) -> bool {
    (1 << 16..1 << 32).contains(&value) || (1 << 40..1 << 47).contains(&value)
}

/// Makes a call of the list; what it returned, and what is in the buffers now,
/// in the order of the arguments.
///
/// # Errors
/// What the kernel answers. `InvalidInput` for a call that isn't in the list, or
/// an argument that is, or could be, an address.
pub fn raw(name: &str, args: &[Arg<'_>]) -> io::Result<(i64, Vec<Vec<u8>>)> {
    let wrong = || io::Error::from(io::ErrorKind::InvalidInput);
    let call = CALLS.iter().find(|(known, ..)| *known == name);
    let (_, number, pointers, ints) = *call.ok_or_else(wrong)?;
    let mut values = [0usize; 6];
    let mut buffers: Vec<(usize, Vec<u8>)> = Vec::new();
    for (n, arg) in args.iter().enumerate() {
        let slot = values.get_mut(n).ok_or_else(wrong)?;
        let is_pointer = pointers >> n & 1 == 1;
        match *arg {
            Arg::Null => {}
            Arg::Int(value) => {
                let unfit = match ints {
                    Any => false,
                    // Requests of ioctl are wider; that is no address.
                    NoAddress if name == "ioctl" && n == 1 => false,
                    NoAddress => could_be_address(value),
                    Lengths => (BUFFER / 2..usize::MAX - 4096).contains(&value),
                };
                if is_pointer || unfit {
                    return Err(wrong());
                }
                *slot = value;
            }
            Arg::Bytes(bytes) => {
                let words = bytes.chunks_exact(8).filter_map(|w| w.try_into().ok());
                let mut words = words.map(usize::from_ne_bytes);
                let first = bytes.first_chunk().map_or(0, |w| u32::from_ne_bytes(*w));
                let unfit = match ints {
                    Any => false,
                    NoAddress => words.any(could_be_address),
                    Lengths => first as usize > BUFFER / 2,
                };
                if !is_pointer || unfit || bytes.len() > BUFFER / 2 {
                    return Err(wrong());
                }
                let mut buffer = vec![0u8; BUFFER];
                buffer[..bytes.len()].copy_from_slice(bytes);
                buffers.push((n, buffer));
            }
        }
    }
    for (n, buffer) in &mut buffers {
        values[*n] = buffer.as_mut_ptr() as usize;
    }
    let [a, b, c, d, e, f] = values;
    // SAFETY: positions that the kernel takes for addresses hold null or the
    // address of a buffer of 64 KiB that lives through the call and that nobody
    // else refers to. No call of the list writes more than a page there, save
    // those that are told a length (`Lengths`), which was seen to fit. Where an
    // address could be elsewhere (`NoAddress`: in the bytes, or in an argument
    // whose meaning depends on another), numbers that could be one were refused.
    let r = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if r < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok((r, buffers.into_iter().map(|(_, buffer)| buffer).collect()))
}

#[cfg(test)]
mod tests {
    use super::{Arg, raw};

    #[test]
    fn addresses_and_unknown_calls_are_refused() {
        let local = 7usize;
        let address = Arg::Int(&raw const local as usize);
        for (name, args) in [
            ("munmap", &[Arg::Int(0)][..]),
            ("mount", &[address]),
            ("prctl", &[Arg::Int(35), address]),
            ("ioctl", &[Arg::Int(0), Arg::Int(0x5412), address]),
            ("setsockopt", &[Arg::Int(0), address]),
            ("unshare", &[Arg::Bytes(b"x")]),
            (
                "bpf",
                &[Arg::Int(0), Arg::Bytes(&0x40_0000usize.to_ne_bytes())],
            ),
        ] {
            let refused = raw(name, args).unwrap_err();
            assert_eq!(refused.kind(), std::io::ErrorKind::InvalidInput, "{name}");
            assert_eq!(refused.raw_os_error(), None, "{name}");
        }
    }

    #[test]
    fn buffers_come_back() {
        // ENOENT names the path as it was passed.
        let (_, buffers) = raw(
            "name_to_handle_at",
            &[
                Arg::Int(-100isize as usize),
                Arg::Bytes(b"/"),
                Arg::Bytes(&64u32.to_ne_bytes()),
                Arg::Bytes(&[0; 4]),
                Arg::Int(0),
            ],
        )
        .unwrap();
        assert_eq!(buffers.len(), 3);
        assert_ne!(buffers[1][..8], 64u64.to_ne_bytes(), "no handle");
    }
}
