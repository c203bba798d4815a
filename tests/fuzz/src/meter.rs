//! How much memory a parser takes for what it is given.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The global allocator of a target that wants to know.
#[derive(Debug)]
pub struct Meter;

thread_local! {
    /// Bytes held now, and the most since the last start. Const: no allocation of its own.
    static HELD: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

/// What a parser may take besides a multiple of its input.
const FREE_BYTES: usize = 2 << 20;
/// Bytes per byte of input.
const FACTOR: usize = 64;

impl Meter {
    /// Runs `parse`, which reads `len` bytes on this thread, and checks that it never takes
    /// much more memory than that.
    ///
    /// # Panics
    /// When it does.
    pub fn check<R>(len: usize, parse: impl FnOnce() -> R) -> R {
        let before = HELD.with(|held| {
            let (now, _) = held.get();
            held.set((now, now));
            now
        });
        let result = parse();
        let (_, most) = HELD.with(Cell::get);
        let taken = most.saturating_sub(before);
        assert!(
            taken <= FREE_BYTES + FACTOR * len,
            "{taken} bytes of memory for {len} bytes"
        );
        result
    }

    fn count(added: usize, removed: usize) {
        // Gone while the thread ends.
        let _ = HELD.try_with(|held| {
            let (now, most) = held.get();
            let now = now.saturating_add(added);
            held.set((now.saturating_sub(removed), most.max(now)));
        });
    }
}

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Meter {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::count(layout.size(), 0);
        // SAFETY: as the caller's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::count(layout.size(), 0);
        // SAFETY: as the caller's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both exist while it copies.
        Self::count(size, layout.size());
        // SAFETY: as the caller's.
        unsafe { System.realloc(old, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        Self::count(0, layout.size());
        // SAFETY: as the caller's.
        unsafe { System.dealloc(memory, layout) }
    }
}
