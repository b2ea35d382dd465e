//! From the OCI's version 1 numbers to version 2's.

/// `cpu.shares` (2 to 262144, default 1024) to `cpu.weight` (1 to 10000,
/// default 100): the curve through (2, 1), (1024, 100) and (262144, 10000) on
/// logarithmic axes, as current runtimes have it, so that a container with the
/// default gets the default. A straight line would give it 39.
pub(crate) fn cpu_weight(shares: u64) -> u64 {
    let log = (shares.clamp(2, 262_144) as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    // Rounding noise must not lift the exact points.
    let weight = (10f64.powf(exponent) - 1e-6).ceil();
    (weight as u64).clamp(1, 10_000)
}

/// `blkio.weight` (10 to 1000) to `io.weight` (1 to 10000), linear.
pub(crate) fn io_weight(weight: u16) -> u64 {
    1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9999 / 990
}

/// A limit where -1 is none, as version 2 writes it.
pub(crate) fn or_max(limit: i64) -> String {
    if limit < 0 {
        "max".to_owned()
    } else {
        limit.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_shares_keep_their_fixed_points_and_their_order() {
        assert_eq!(cpu_weight(0), 1);
        assert_eq!(cpu_weight(2), 1);
        assert_eq!(cpu_weight(1024), 100);
        assert_eq!(cpu_weight(262_144), 10_000);
        assert_eq!(cpu_weight(u64::MAX), 10_000);
        assert!((2..262_144).all(|s| cpu_weight(s) <= cpu_weight(s + 1)));
    }

    #[test]
    fn block_weights_span_the_range() {
        assert_eq!(io_weight(0), 1);
        assert_eq!(io_weight(10), 1);
        assert_eq!(io_weight(1000), 10_000);
    }
}
