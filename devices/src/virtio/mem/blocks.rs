//! One bit per block.

use std::ops::Range;

/// A fixed number of blocks, each plugged or not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Blocks {
    words: Vec<u64>,
    count: usize,
}

impl Blocks {
    /// `count` unplugged blocks.
    pub(super) fn new(count: usize) -> Self {
        Self {
            words: vec![0; count.div_ceil(64)],
            count,
        }
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    fn get(&self, block: usize) -> bool {
        let (word, bit) = place(block);
        self.words.get(word).is_some_and(|word| word & bit != 0)
    }

    /// Marks `blocks`; those past the end are left out.
    pub(super) fn set(&mut self, blocks: Range<usize>, plugged: bool) {
        for block in blocks.start..blocks.end.min(self.count) {
            let (word, bit) = place(block);
            if let Some(word) = self.words.get_mut(word) {
                if plugged {
                    *word |= bit;
                } else {
                    *word &= !bit;
                }
            }
        }
    }

    /// Plugged ones among `blocks`.
    pub(super) fn plugged_in(&self, blocks: Range<usize>) -> usize {
        blocks.filter(|block| self.get(*block)).count()
    }

    /// The longest runs of plugged blocks, in order.
    pub(super) fn runs(&self) -> impl Iterator<Item = Range<usize>> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let start = (from..self.count).find(|block| self.get(*block))?;
            let end = (start..self.count)
                .find(|block| !self.get(*block))
                .unwrap_or(self.count);
            from = end;
            Some(start..end)
        })
    }
}

fn place(block: usize) -> (usize, u64) {
    (block / 64, 1 << (block % 64))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The same as an array of bools.
        #[test]
        fn like_an_array(ops in proptest::collection::vec((0_usize..150, 0_usize..80, any::<bool>()), 0..20)) {
            let mut blocks = Blocks::new(130);
            let mut model = [false; 130];
            for (start, len, plugged) in ops {
                blocks.set(start..start + len, plugged);
                for block in model.iter_mut().skip(start).take(len) {
                    *block = plugged;
                }
                let count = model.iter().skip(start).take(len).filter(|block| **block).count();
                prop_assert_eq!(blocks.plugged_in(start..start + len), count);
            }
            let mut from_runs = [false; 130];
            let mut last = None;
            for run in blocks.runs() {
                prop_assert!(last.is_none_or(|last| run.start > last));
                last = Some(run.end);
                from_runs[run].fill(true);
            }
            prop_assert_eq!(from_runs, model);
        }
    }
}
