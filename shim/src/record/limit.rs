//! How many records of a kind a pod may make at a time: so many at once, and
//! then so many a second.

use std::time::{Duration, Instant};

/// At once.
const BURST: u32 = 64;
/// Time for one more.
const EACH: Duration = Duration::from_millis(100);

/// A limit for each of `N` kinds.
#[derive(Debug)]
pub struct Limits<const N: usize> {
    left: [u32; N],
    since: [Instant; N],
}

impl<const N: usize> Limits<N> {
    /// All untouched.
    pub fn new(now: Instant) -> Limits<N> {
        Limits {
            left: [BURST; N],
            since: [now; N],
        }
    }

    /// Takes one of kind `kind`, if there is one left.
    pub fn admit(&mut self, kind: usize, now: Instant) -> bool {
        let (Some(left), Some(since)) = (self.left.get_mut(kind), self.since.get_mut(kind)) else {
            return false;
        };
        let more = now.saturating_duration_since(*since).as_millis() / EACH.as_millis();
        let more = u32::try_from(more).unwrap_or(u32::MAX);
        if more > 0 {
            *left = left.saturating_add(more).min(BURST);
            *since = if *left == BURST {
                now
            } else {
                *since + EACH * more
            };
        }
        if *left == 0 {
            return false;
        }
        *left -= 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_admitted_then_one_for_each_interval() {
        let begun = Instant::now();
        let mut limits = Limits::<2>::new(begun);
        let admitted = (0..1000).filter(|_| limits.admit(0, begun)).count();
        assert_eq!(admitted, 64);
        let later = begun + EACH * 3 + EACH / 2;
        let admitted = (0..1000).filter(|_| limits.admit(0, later)).count();
        assert_eq!(admitted, 3);
        // The half that was left over isn't lost.
        assert!(limits.admit(0, begun + EACH * 4));
        assert!(!limits.admit(0, begun + EACH * 4));
        assert!(limits.admit(1, begun), "the other kind has its own");
    }

    #[test]
    fn a_long_rest_gives_one_burst_and_not_more() {
        let begun = Instant::now();
        let mut limits = Limits::<1>::new(begun);
        while limits.admit(0, begun) {}
        let later = begun + Duration::from_secs(3600);
        let admitted = (0..1000).filter(|_| limits.admit(0, later)).count();
        assert_eq!(admitted, 64);
    }
}
