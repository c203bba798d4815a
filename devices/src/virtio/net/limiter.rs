//! Token buckets: how much may pass, and when there is more.

use std::time::{Duration, Instant};

/// Tokens are counted in billionths, so that nothing is lost between refills.
const SCALE: i128 = 1_000_000_000;

/// A refill rate with an allowance for bursts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Tokens added per second; zero is taken for one.
    pub per_second: u64,
    /// Most tokens that can be saved up; zero is taken for one.
    pub burst: u64,
}

/// Limits of one direction. A frame passes when both buckets hold something, and may leave
/// them in debt: the rate holds on average, for frames of any size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimit {
    /// Bytes of frames.
    pub bytes: Option<Rate>,
    /// Frames, as the driver hands them over: a large segment counts once.
    pub frames: Option<Rate>,
}

impl RateLimit {
    pub(super) fn is_none(&self) -> bool {
        self.bytes.is_none() && self.frames.is_none()
    }
}

#[derive(Debug)]
struct Bucket {
    per_second: i128,
    burst: i128,
    level: i128,
    refilled: Instant,
}

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Self {
        let burst = i128::from(rate.burst.max(1)).saturating_mul(SCALE);
        Self {
            per_second: i128::from(rate.per_second.max(1)),
            burst,
            level: burst,
            refilled: now,
        }
    }

    fn refill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.refilled).as_nanos();
        let added = i128::try_from(passed)
            .unwrap_or(i128::MAX)
            .saturating_mul(self.per_second);
        self.level = self.level.saturating_add(added).min(self.burst);
        self.refilled = now;
    }

    fn spend(&mut self, tokens: u64) {
        let tokens = i128::from(tokens).saturating_mul(SCALE);
        self.level = self.level.saturating_sub(tokens);
    }

    /// Until the level is positive.
    fn wait(&self) -> Option<Duration> {
        if self.level > 0 {
            return None;
        }
        let missing = self.level.saturating_neg().saturating_add(1);
        let nanos = missing
            .checked_div(self.per_second)
            .map_or(i128::MAX, |nanos| nanos.saturating_add(1));
        Some(Duration::from_nanos(
            u64::try_from(nanos).unwrap_or(u64::MAX),
        ))
    }
}

/// The buckets of one queue direction.
#[derive(Debug)]
pub(super) struct Limiter {
    bytes: Option<Bucket>,
    frames: Option<Bucket>,
}

impl Limiter {
    pub(super) fn new(limit: RateLimit, now: Instant) -> Self {
        let bucket = |rate| Bucket::new(rate, now);
        Self {
            bytes: limit.bytes.map(bucket),
            frames: limit.frames.map(bucket),
        }
    }

    fn buckets(&mut self) -> impl Iterator<Item = &mut Bucket> {
        self.bytes.iter_mut().chain(&mut self.frames)
    }

    /// How long to wait before the next frame; `None` when it may pass now.
    pub(super) fn wait(&mut self, now: impl FnOnce() -> Instant) -> Option<Duration> {
        if self.bytes.is_none() && self.frames.is_none() {
            return None;
        }
        let now = now();
        self.buckets()
            .filter_map(|bucket| {
                bucket.refill(now);
                bucket.wait()
            })
            .max()
    }

    /// Pays for a frame that passed.
    pub(super) fn spend(&mut self, frame_bytes: usize) {
        if let Some(bytes) = &mut self.bytes {
            bytes.spend(u64::try_from(frame_bytes).unwrap_or(u64::MAX));
        }
        if let Some(frames) = &mut self.frames {
            frames.spend(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limit(bytes: Option<(u64, u64)>, frames: Option<(u64, u64)>) -> RateLimit {
        let rate = |(per_second, burst)| Rate { per_second, burst };
        RateLimit {
            bytes: bytes.map(rate),
            frames: frames.map(rate),
        }
    }

    #[test]
    fn a_burst_passes_then_the_rate_holds() {
        let start = Instant::now();
        let mut limiter = Limiter::new(limit(None, Some((10, 3))), start);
        for _ in 0..3 {
            assert_eq!(limiter.wait(|| start), None);
            limiter.spend(1000);
        }
        let wait = limiter.wait(|| start).unwrap();
        assert!(wait <= Duration::from_millis(1), "{wait:?}");
        // A tenth of a second is one token.
        let later = start + Duration::from_millis(50);
        assert_eq!(limiter.wait(|| later), None);
        limiter.spend(1000);
        let wait = limiter.wait(|| later).unwrap();
        assert!(wait >= Duration::from_millis(49), "{wait:?}");
        assert!(wait <= Duration::from_millis(51), "{wait:?}");
    }

    #[test]
    fn the_scarcer_bucket_decides() {
        let start = Instant::now();
        let mut limiter = Limiter::new(limit(Some((100, 100)), Some((1000, 1000))), start);
        limiter.spend(1100);
        let wait = limiter.wait(|| start).unwrap();
        assert!(wait >= Duration::from_secs(10), "{wait:?}");
        assert!(limiter.wait(|| start + wait).is_none());
    }

    #[test]
    fn without_limits_the_clock_is_not_read() {
        let mut limiter = Limiter::new(RateLimit::default(), Instant::now());
        limiter.spend(usize::MAX);
        assert_eq!(limiter.wait(|| panic!("not needed")), None);
    }

    proptest! {
        /// Over any time, no more passes than the burst, the rate and one frame of debt.
        #[test]
        fn the_rate_holds(
            per_second in 1_u64..1_000_000,
            burst in 1_u64..1_000_000,
            frames in proptest::collection::vec((0_u64..10_000_000, 1_usize..70_000), 1..200),
        ) {
            let start = Instant::now();
            let mut now = start;
            let mut limiter = Limiter::new(limit(Some((per_second, burst)), None), start);
            let mut passed = 0_u128;
            for (nanos, bytes) in frames {
                now += Duration::from_nanos(nanos);
                if limiter.wait(|| now).is_none() {
                    limiter.spend(bytes);
                    passed += bytes as u128;
                }
            }
            let earned = now.duration_since(start).as_nanos() * u128::from(per_second) / 1_000_000_000;
            prop_assert!(passed <= u128::from(burst) + earned + 70_000);
        }
    }
}
