//! Calls that a filter refuses, many times.

use std::io;
use std::time::Instant;

use casemate_sys::attempt;

/// Makes each call so many times; prints its name and the last error.
pub fn each(count: u32, names: &[&str]) -> io::Result<()> {
    for name in names {
        let mut last = Ok(());
        for _ in 0..count {
            last = attempt::call(name);
        }
        match last {
            Ok(()) => println!("{name} done"),
            Err(error) => println!("{name} {}", error.raw_os_error().unwrap_or(0)),
        }
    }
    Ok(())
}

/// Makes each call of these numbers, without arguments; prints number and error.
pub fn numbers(numbers: &[&str]) -> io::Result<()> {
    for text in numbers {
        let number = text.parse().map_err(io::Error::other)?;
        let error = match attempt::number(number, [0; 3]) {
            Ok(()) => 0,
            Err(error) => error.raw_os_error().unwrap_or(-1),
        };
        println!("{number} {error}");
    }
    Ok(())
}

/// Nanoseconds of one refused call: median, and at the 99th percentile.
pub fn time(count: u32) -> io::Result<()> {
    let mut times = Vec::new();
    for _ in 0..count {
        let begun = Instant::now();
        let refused = attempt::call("mount").is_err();
        times.push(begun.elapsed().as_nanos());
        if !refused {
            return Err(io::Error::other("mount was let through"));
        }
    }
    times.sort_unstable();
    let at = |percent: usize| times.get(times.len() * percent / 100).copied().unwrap_or(0);
    println!("{} {}", at(50), at(99));
    Ok(())
}

/// Asks for sockets of so many kinds that nobody gets.
pub fn sorts(count: u32) -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketType, socket};
    for n in 0..count {
        // AF_PACKET; the type is nonsense, and each another class.
        let made = socket(AddressFamily::from_raw(17), SocketType::from_raw(n), None);
        if made.is_ok() {
            return Err(io::Error::other("a packet socket was let through"));
        }
    }
    Ok(())
}

/// Makes the calls that a forker makes, from this place on, with this in the sixth
/// register: one, or all. Prints place and error of each.
pub fn forkers(first: usize, all: bool, mark: u64) -> io::Result<()> {
    let last = if all {
        attempt::forkers::COUNT
    } else {
        first + 1
    };
    for place in first..last {
        let error = match attempt::forkers::make(place, mark) {
            Ok(()) => 0,
            Err(error) => error.raw_os_error().unwrap_or(-1),
        };
        println!("{place} {error}");
    }
    Ok(())
}
