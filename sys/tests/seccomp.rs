//! The shipped filters in the running kernel: each call is made in a forked
//! child that has just installed the filter.

// Outside #[test] functions clippy does not see that this is a test.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::io;
use std::time::{Duration, Instant};

use casemate_sys::seccomp::{FLAG_NEW_LISTENER, install_filter};

/// What the call came to.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Returned,
    Errno(i32),
    Killed(i32),
}

/// Runs `child` in a forked process; it returns 0 or an error number. It must
/// not allocate: other threads of the test may have held locks at the fork.
fn forked(child: impl FnOnce() -> i32) -> Outcome {
    // SAFETY: the child only makes system calls and leaves with _exit.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "{}", io::Error::last_os_error());
    if pid == 0 {
        let code = child();
        // SAFETY: ends this process without running anything of the parent's.
        unsafe { libc::_exit(code) }
    }
    let mut status = 0;
    // SAFETY: `pid` is our child, `status` is ours.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    if libc::WIFSIGNALED(status) {
        return Outcome::Killed(libc::WTERMSIG(status));
    }
    match libc::WEXITSTATUS(status) {
        0 => Outcome::Returned,
        errno => Outcome::Errno(errno),
    }
}

/// `no_new_privs`, so that the tests need no privilege, then the filter.
fn install(profile: &[u8]) {
    // SAFETY: prctl with integers.
    let ret = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    if ret != 0 || install_filter(profile, 0).is_err() {
        // SAFETY: as in `forked`; 250 is no error number.
        unsafe { libc::_exit(250) }
    }
}

/// The outcome of one call under the shipped profile `name`.
fn under(name: &str, number: libc::c_long, args: [u64; 4]) -> Outcome {
    let program = seccomp_profiles::shipped_program(name).unwrap();
    forked(|| {
        install(program);
        // SAFETY: the callers pass integers, or pointers that are null.
        let ret = unsafe { libc::syscall(number, args[0], args[1], args[2], args[3]) };
        if ret == -1 {
            io::Error::last_os_error().raw_os_error().unwrap_or(251)
        } else {
            0
        }
    })
}

#[test]
fn default_in_the_kernel() {
    let ask = |number, args| under("default", number, args);
    assert_eq!(ask(libc::SYS_getpid, [0; 4]), Outcome::Returned);
    assert_eq!(
        ask(libc::SYS_unshare, [libc::CLONE_NEWUSER as u64, 0, 0, 0]),
        Outcome::Errno(libc::EPERM)
    );
    assert_eq!(ask(libc::SYS_clone3, [0; 4]), Outcome::Errno(libc::ENOSYS));
    assert_eq!(
        ask(libc::SYS_socket, [libc::AF_VSOCK as u64, 1, 0, 0]),
        Outcome::Errno(libc::EAFNOSUPPORT)
    );
    assert_eq!(
        ask(libc::SYS_socket, [libc::AF_UNIX as u64, 1, 0, 0]),
        Outcome::Returned
    );
    assert_eq!(
        ask(
            libc::SYS_clone,
            [(libc::CLONE_NEWNS | libc::SIGCHLD) as u64, 0, 0, 0]
        ),
        Outcome::Errno(libc::EPERM)
    );
    // A number that no kernel has.
    assert_eq!(ask(1000, [0; 4]), Outcome::Errno(libc::ENOSYS));
    // getpid of the x32 ABI.
    assert_eq!(ask(0x4000_0000 + 39, [0; 4]), Outcome::Errno(libc::ENOSYS));
}

#[test]
fn a_high_word_does_not_pass_tiocsti() {
    // On no descriptor the kernel itself would answer EBADF.
    let ask = |request| under("default", libc::SYS_ioctl, [u64::MAX, request, 0, 0]);
    assert_eq!(ask(0x5401), Outcome::Errno(libc::EBADF));
    assert_eq!(ask(0x5412), Outcome::Errno(libc::EPERM));
    assert_eq!(ask(0x5412 | 1 << 32), Outcome::Errno(libc::EPERM));
    assert_eq!(ask(0x5412 | 1 << 63), Outcome::Errno(libc::EPERM));
}

#[test]
fn every_shipped_filter_is_accepted_and_lets_getpid_run() {
    for name in seccomp_profiles::shipped_names() {
        // The pause is content with less, and so is who writes calls down; which ones
        // asks a listener, of which there is none.
        let getpid = match name {
            "pause" | "learner" => Outcome::Errno(libc::EPERM),
            "learn" => Outcome::Errno(libc::ENOSYS),
            _ => Outcome::Returned,
        };
        assert_eq!(under(name, libc::SYS_getpid, [0; 4]), getpid, "{name}");
        // Without a tracer, which is what the agent's answers are.
        let mount = match name {
            "agent" | "learn" => libc::ENOSYS,
            _ => libc::EPERM,
        };
        assert_eq!(
            under(name, libc::SYS_mount, [0; 4]),
            Outcome::Errno(mount),
            "{name}"
        );
    }
}

/// getpid through the i386 ABI (number 20).
#[cfg(target_arch = "x86_64")]
fn getpid_i386() -> i32 {
    let ret: i32;
    // SAFETY: int 0x80 with a call that touches no memory; the kernel keeps all
    // registers but eax, and r8 to r11.
    unsafe {
        std::arch::asm!("int 0x80", inlateout("eax") 20 => ret,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _);
    }
    ret
}

#[test]
#[cfg(target_arch = "x86_64")]
fn the_i386_abi_kills() {
    let program = seccomp_profiles::shipped_program("default").unwrap();
    let outcome = forked(|| {
        install(program);
        i32::from(getpid_i386() <= 0)
    });
    let free = forked(|| i32::from(getpid_i386() <= 0));
    match free {
        Outcome::Returned => assert_eq!(outcome, Outcome::Killed(libc::SIGSYS)),
        // A kernel without the i386 ABI kills with SIGSEGV, filter or not.
        other => assert_eq!(outcome, other),
    }
}

#[test]
fn a_listener_is_a_close_on_exec_descriptor() {
    let program = seccomp_profiles::shipped_program("agent").unwrap();
    let outcome = forked(|| {
        install(program);
        match install_filter(program, FLAG_NEW_LISTENER) {
            Ok(Some(fd)) => {
                let flags = rustix::io::fcntl_getfd(&fd);
                i32::from(!flags.is_ok_and(|f| f.contains(rustix::io::FdFlags::CLOEXEC)))
            }
            _ => 2,
        }
    });
    assert_eq!(outcome, Outcome::Returned);
}

/// What the listener of a workload's filter is asked about, on top of the agent's.
#[test]
fn the_agents_filter_does_not_silence_a_listener_above_it() {
    let agent = seccomp_profiles::shipped_program("agent").unwrap();
    let notify = seccomp_profiles::Form::Notify;
    let above = seccomp_profiles::shipped_program_as("default", notify).unwrap();
    let outcome = forked(|| {
        install(agent);
        let Ok(Some(listener)) = install_filter(above, FLAG_NEW_LISTENER) else {
            return 2;
        };
        // SAFETY: ends nothing but a child that shares no memory with anyone.
        match unsafe { libc::fork() } {
            0 => {
                // SAFETY: mount with null pointers, which changes nothing; then
                // the end of the child, without running anything else of it.
                unsafe {
                    libc::syscall(libc::SYS_mount, 0, 0, 0, 0, 0);
                    libc::_exit(0)
                }
            }
            child => {
                let mut polled = [rustix::event::PollFd::new(
                    &listener,
                    rustix::event::PollFlags::IN,
                )];
                let wait = rustix::event::Timespec {
                    tv_sec: 5,
                    tv_nsec: 0,
                };
                let heard = rustix::event::poll(&mut polled, Some(&wait)) == Ok(1);
                // SAFETY: the child is this process' own and not yet waited for.
                unsafe { libc::kill(child, libc::SIGKILL) };
                i32::from(!heard)
            }
        }
    });
    assert_eq!(outcome, Outcome::Returned);
}

#[test]
fn what_is_no_program_is_refused() {
    for bytes in [&[][..], &[0; 7], &[0; 9], &[0; 8 * 65536]] {
        let error = install_filter(bytes, 0).unwrap_err();
        assert_eq!(
            error.raw_os_error(),
            Some(libc::EINVAL),
            "{} bytes",
            bytes.len()
        );
    }
}

/// The filter that runc installs for containerd's default profile, as the kernel
/// gave it back: one instruction a line, code, jt, jf, k.
fn runcs() -> Vec<u8> {
    let text = include_str!("../../seccomp-profiles/tests/data/runc-default.txt");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    let instruction = |line: &str| {
        let [code, jt, jf, k] = line.split(' ').collect::<Vec<_>>().try_into().unwrap();
        let code = u16::from_str_radix(code, 16).unwrap().to_ne_bytes();
        let k = u32::from_str_radix(k, 16).unwrap().to_ne_bytes();
        let jumps = [jt.parse().unwrap(), jf.parse().unwrap()];
        [&code[..], &jumps, &k].concat()
    };
    lines.flat_map(instruction).collect()
}

/// At most 0.15 ms, in the quickest of many: what neighbours do only adds. The
/// median is printed, and beside it that of runc's filter.
#[test]
fn installation_is_quick() {
    let runcs = runcs();
    // Under these nothing could be told.
    let ours =
        seccomp_profiles::shipped_names().filter(|name| !["pause", "learner"].contains(name));
    let ours = ours.map(|name| (name, seccomp_profiles::shipped_program(name).unwrap()));
    for (name, program) in ours.chain([("runc", runcs.as_slice())]) {
        let mut times = Vec::new();
        for _ in 0..101 {
            let (reader, writer) = rustix::pipe::pipe().unwrap();
            let outcome = forked(|| {
                // SAFETY: prctl with integers.
                unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
                let start = Instant::now();
                if install_filter(program, 0).is_err() {
                    return 250;
                }
                let nanos = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
                i32::from(rustix::io::write(&writer, &nanos.to_ne_bytes()) != Ok(8))
            });
            assert_eq!(outcome, Outcome::Returned);
            let mut nanos = [0; 8];
            assert_eq!(rustix::io::read(&reader, &mut nanos), Ok(8));
            times.push(Duration::from_nanos(u64::from_ne_bytes(nanos)));
        }
        times.sort_unstable();
        let (best, median) = (times[0], times[times.len() / 2]);
        println!(
            "{name}: {} instructions, installed in {median:?}, {best:?} at best",
            program.len() / 8
        );
        assert!(
            name == "runc" || best <= Duration::from_micros(150),
            "{name}: {best:?}"
        );
    }
}
