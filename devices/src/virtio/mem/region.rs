//! The rules: which blocks are plugged, what each request does (virtio 1.2, 5.15.6).

use std::ops::Range;

use super::blocks::Blocks;
use super::request::{BlockState, Request, Response, Span};
use crate::virtio::release::{PageRange, PageReleaser};

/// Most blocks of one region: bounds the bitmap, 128 KiB.
pub const MAX_BLOCKS: u64 = 1 << 20;

/// The region of one device. Sizes in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Region {
    /// First address, a multiple of the block size.
    pub(super) address: u64,
    /// Of a block; a power of two.
    pub(super) block_bytes: u64,
    /// What the guest should have plugged.
    pub(super) requested_bytes: u64,
    pub(super) blocks: Blocks,
    plugged: usize,
}

impl Region {
    /// A region with nothing plugged and nothing requested. The caller has checked the
    /// geometry.
    pub(super) fn new(address: u64, block_bytes: u64, count: usize) -> Self {
        Self {
            address,
            block_bytes,
            requested_bytes: 0,
            blocks: Blocks::new(count),
            plugged: 0,
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes_of(self.blocks.count())
    }

    pub(super) fn plugged_bytes(&self) -> u64 {
        self.bytes_of(self.plugged)
    }

    /// Does what the driver wants, if it may want it.
    pub(super) fn handle(&mut self, request: Request, releaser: &dyn PageReleaser) -> Response {
        match request {
            Request::Plug(span) => self.plug(span),
            Request::Unplug(span) => self.unplug(span, releaser),
            Request::UnplugAll => self.unplug_all(releaser),
            Request::State(span) => self.state(span),
            Request::Unknown(_) => Response::Error,
        }
    }

    /// Marks `blocks` as plugged, as a snapshot says; false when they are not all there.
    pub(super) fn restore(&mut self, blocks: Range<usize>) -> bool {
        let fits = blocks.start < blocks.end && blocks.end <= self.blocks.count();
        if fits && self.blocks.plugged_in(blocks.clone()) == 0 {
            self.mark(blocks, true);
            return true;
        }
        false
    }

    /// 5.15.6.3
    fn plug(&mut self, span: Span) -> Response {
        let Some(blocks) = self.find(span) else {
            return Response::Error;
        };
        if self.blocks.plugged_in(blocks.clone()) > 0 {
            return Response::Error;
        }
        let after = self.plugged.saturating_add(blocks.len());
        if self.bytes_of(after) > self.requested_bytes {
            return Response::Nack;
        }
        self.mark(blocks, true);
        Response::DONE
    }

    /// 5.15.6.4
    fn unplug(&mut self, span: Span, releaser: &dyn PageReleaser) -> Response {
        let Some(blocks) = self.find(span) else {
            return Response::Error;
        };
        if self.blocks.plugged_in(blocks.clone()) < blocks.len() {
            return Response::Error;
        }
        self.release(blocks, releaser)
    }

    /// 5.15.6.5. In one piece, whatever holes the driver has left.
    fn unplug_all(&mut self, releaser: &dyn PageReleaser) -> Response {
        if self.plugged == 0 {
            return Response::DONE;
        }
        self.release(0..self.blocks.count(), releaser)
    }

    /// 5.15.6.6
    fn state(&self, span: Span) -> Response {
        let Some(blocks) = self.find(span) else {
            return Response::Error;
        };
        let plugged = self.blocks.plugged_in(blocks.clone());
        Response::Ack(if plugged == blocks.len() {
            BlockState::Plugged
        } else if plugged == 0 {
            BlockState::Unplugged
        } else {
            BlockState::Mixed
        })
    }

    /// Unplugs `blocks`, unless the host cannot take their memory back now.
    fn release(&mut self, blocks: Range<usize>, releaser: &dyn PageReleaser) -> Response {
        let start = self.address.saturating_add(self.bytes_of(blocks.start));
        let range = PageRange::new(start, self.bytes_of(blocks.len()));
        if let Err(err) = releaser.release(range.as_slice()) {
            tracing::debug!(%err, "the host kept unplugged memory");
            return Response::Busy;
        }
        self.mark(blocks, false);
        Response::DONE
    }

    fn mark(&mut self, blocks: Range<usize>, plugged: bool) {
        let (before, all) = (self.blocks.plugged_in(blocks.clone()), blocks.len());
        self.blocks.set(blocks, plugged);
        let after = if plugged { all } else { 0 };
        self.plugged = self.plugged.saturating_sub(before).saturating_add(after);
    }

    /// The blocks of `span`, when it is whole blocks inside the region.
    fn find(&self, span: Span) -> Option<Range<usize>> {
        let offset = span.address.checked_sub(self.address)?;
        if offset.checked_rem(self.block_bytes)? != 0 || span.blocks == 0 {
            return None;
        }
        let start = usize::try_from(offset.checked_div(self.block_bytes)?).ok()?;
        let end = start.checked_add(span.blocks.into())?;
        (end <= self.blocks.count()).then_some(start..end)
    }

    fn bytes_of(&self, blocks: usize) -> u64 {
        u64::try_from(blocks)
            .unwrap_or(u64::MAX)
            .saturating_mul(self.block_bytes)
    }
}
