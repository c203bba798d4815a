//! Who has how much linear memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use wasmtime::ResourceLimiter;

use super::Stats;
use crate::config::Limits;

/// A limit that means none.
const NO_LIMIT: u64 = u64::MAX;

/// The memory that all containers of a host share.
#[derive(Debug)]
pub(crate) struct Budget {
    used: AtomicU64,
    limit: u64,
}

impl Budget {
    pub(crate) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self {
            used: AtomicU64::new(0),
            limit,
        })
    }

    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }
}

/// Takes `bytes` of what `limit` allows; the new sum if that was possible.
fn take(used: &AtomicU64, bytes: u64, limit: u64) -> Option<u64> {
    let sum = |used: u64| used.checked_add(bytes).filter(|&sum| sum <= limit);
    used.fetch_update(Ordering::AcqRel, Ordering::Acquire, sum)
        .ok()
        .map(|before| before.saturating_add(bytes))
}

/// The memory of one container.
#[derive(Debug)]
pub(crate) struct Account {
    budget: Arc<Budget>,
    used: AtomicU64,
    peak: AtomicU64,
    limit: AtomicU64,
    out_of_memory: AtomicU64,
}

impl Account {
    pub(super) fn new(budget: &Arc<Budget>, limit: Option<u64>) -> Arc<Self> {
        Arc::new(Self {
            budget: Arc::clone(budget),
            used: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            limit: AtomicU64::new(limit.unwrap_or(NO_LIMIT)),
            out_of_memory: AtomicU64::new(0),
        })
    }

    pub(super) fn limit(&self) -> Option<u64> {
        let limit = self.limit.load(Ordering::Acquire);
        (limit != NO_LIMIT).then_some(limit)
    }

    pub(super) fn set_limit(&self, limit: Option<u64>) {
        self.limit
            .store(limit.unwrap_or(NO_LIMIT), Ordering::Release);
    }

    pub(super) fn ended_for_memory(&self) {
        self.out_of_memory.fetch_add(1, Ordering::AcqRel);
    }

    pub(super) fn describe(&self, stats: &mut Stats) {
        stats.memory_bytes = self.used.load(Ordering::Acquire);
        stats.memory_peak_bytes = self.peak.load(Ordering::Acquire);
        stats.memory_limit_bytes = self.limit().unwrap_or(0);
        stats.out_of_memory = self.out_of_memory.load(Ordering::Acquire);
    }

    fn take(&self, bytes: u64) -> bool {
        let Some(sum) = take(&self.used, bytes, self.limit.load(Ordering::Acquire)) else {
            return false;
        };
        if take(&self.budget.used, bytes, self.budget.limit).is_none() {
            self.used.fetch_sub(bytes, Ordering::AcqRel);
            return false;
        }
        self.peak.fetch_max(sum, Ordering::AcqRel);
        true
    }

    fn give_back(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
        self.budget.used.fetch_sub(bytes, Ordering::AcqRel);
    }
}

/// Asks for memory on behalf of one guest, and gives all of it back when it is dropped.
#[derive(Debug)]
pub(crate) struct Limiter {
    account: Option<Arc<Account>>,
    taken: u64,
    /// What the last growth took, should it fail afterwards.
    last: u64,
    /// Whether it was refused memory.
    pub(super) refused: bool,
    limits: Limits,
}

impl Limiter {
    pub(super) fn new(account: &Arc<Account>, limits: &Limits) -> Self {
        Self {
            account: Some(Arc::clone(account)),
            taken: 0,
            last: 0,
            refused: false,
            limits: limits.clone(),
        }
    }

    /// Grants nothing.
    pub(super) fn closed() -> Self {
        Self {
            account: None,
            taken: 0,
            last: 0,
            refused: false,
            limits: Limits::default(),
        }
    }
}

impl Drop for Limiter {
    fn drop(&mut self) {
        if let Some(account) = &self.account {
            account.give_back(self.taken);
        }
    }
}

impl ResourceLimiter for Limiter {
    fn memory_growing(
        &mut self,
        current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        if maximum.is_some_and(|maximum| desired > maximum) {
            return Ok(false);
        }
        let more = desired.saturating_sub(current) as u64;
        let granted = self
            .account
            .as_ref()
            .is_some_and(|account| account.take(more));
        if granted {
            self.last = more;
            self.taken = self.taken.saturating_add(more);
        } else {
            self.last = 0;
            self.refused = true;
        }
        Ok(granted)
    }

    fn memory_grow_failed(&mut self, _error: wasmtime::Error) -> wasmtime::Result<()> {
        let last = std::mem::take(&mut self.last);
        self.taken = self.taken.saturating_sub(last);
        if let Some(account) = &self.account {
            account.give_back(last);
        }
        Ok(())
    }

    fn table_growing(
        &mut self,
        _current: usize,
        desired: usize,
        maximum: Option<usize>,
    ) -> wasmtime::Result<bool> {
        Ok(desired <= self.limits.table_elements
            && maximum.is_none_or(|maximum| desired <= maximum))
    }

    fn instances(&self) -> usize {
        self.limits.instances
    }

    fn tables(&self) -> usize {
        self.limits.tables
    }

    fn memories(&self) -> usize {
        self.limits.memories
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_counted_once_and_given_back() {
        let budget = Budget::new(100);
        let limits = Limits::default();
        let small = Account::new(&budget, Some(60));
        let other = Account::new(&budget, None);
        let mut one = Limiter::new(&small, &limits);
        let mut two = Limiter::new(&small, &limits);
        let mut three = Limiter::new(&other, &limits);
        assert!(one.memory_growing(0, 40, None).unwrap());
        assert!(
            !two.memory_growing(0, 30, None).unwrap(),
            "beyond its container's limit"
        );
        assert!(two.refused && !one.refused);
        assert!(two.memory_growing(0, 20, None).unwrap());
        assert!(
            !three.memory_growing(0, 50, None).unwrap(),
            "beyond what the host has"
        );
        assert!(three.memory_growing(0, 40, None).unwrap());
        assert_eq!(budget.used(), 100);
        three
            .memory_grow_failed(wasmtime::Error::msg("no pages"))
            .unwrap();
        assert_eq!(budget.used(), 60);
        drop((one, two, three));
        assert_eq!(budget.used(), 0);
        let mut stats = Stats::default();
        small.describe(&mut stats);
        assert_eq!((stats.memory_bytes, stats.memory_peak_bytes), (0, 60));
    }

    #[test]
    fn a_maximum_of_the_program_is_no_want_of_memory() {
        let account = Account::new(&Budget::new(1000), None);
        let mut limiter = Limiter::new(&account, &Limits::default());
        assert!(!limiter.memory_growing(0, 20, Some(10)).unwrap());
        assert!(!limiter.refused);
        assert!(!limiter.table_growing(0, usize::MAX, None).unwrap());
    }
}
