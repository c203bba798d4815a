//! Flow control: virtio 1.2, 5.10.6.3.
//!
//! Each side tells the size of its receive buffer and how many bytes it has taken out of
//! it so far, modulo 2^32; the other side may have the difference in flight.

/// What the guest has room for.
#[derive(Clone, Copy, Debug, Default)]
pub struct Credit {
    /// The guest's receive buffer.
    buf_alloc: u32,
    /// What it says it has taken out of it.
    fwd_cnt: u32,
    /// Bytes sent to it.
    sent: u32,
}

impl Credit {
    /// The guest has told its state.
    pub fn note(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.buf_alloc = buf_alloc;
        self.fwd_cnt = fwd_cnt;
    }

    /// Bytes that may be sent. Whatever the guest claims, this only limits what it is
    /// sent: nonsense stalls its own connection.
    pub fn left(&self) -> u32 {
        let in_flight = self.sent.wrapping_sub(self.fwd_cnt);
        self.buf_alloc.saturating_sub(in_flight)
    }

    /// Bytes were sent.
    pub fn spend(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }
}

/// What the guest may send.
#[derive(Clone, Copy, Debug)]
pub struct Granted {
    /// Size of the buffer here.
    buf_alloc: u32,
    /// Bytes handed on to the host.
    fwd_cnt: u32,
    /// The `fwd_cnt` that the guest was last told.
    announced: u32,
}

impl Granted {
    /// All of a buffer of `buf_alloc` bytes.
    pub fn new(buf_alloc: u32) -> Self {
        Self {
            buf_alloc,
            fwd_cnt: 0,
            announced: 0,
        }
    }

    /// Bytes have left the buffer. True when the guest should be told: once a quarter of
    /// the buffer is free without its knowledge, so that it neither stalls nor hears of
    /// every byte.
    pub fn forwarded(&mut self, len: usize) -> bool {
        // Modulo 2^32 by definition; `len` is at most the buffer's size.
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        self.fwd_cnt = self.fwd_cnt.wrapping_add(len);
        self.fwd_cnt.wrapping_sub(self.announced) >= self.buf_alloc / 4
    }

    /// `buf_alloc` and `fwd_cnt` for a packet to the guest.
    pub fn announce(&mut self) -> (u32, u32) {
        self.announced = self.fwd_cnt;
        (self.buf_alloc, self.fwd_cnt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_wrap_around() {
        for start in [0, u32::MAX - 10, u32::MAX] {
            let mut credit = Credit {
                buf_alloc: 1000,
                fwd_cnt: start,
                sent: start,
            };
            credit.spend(990);
            assert_eq!(credit.left(), 10);
            credit.spend(10);
            assert_eq!(credit.left(), 0);
            credit.note(1000, start.wrapping_add(1000));
            assert_eq!(credit.left(), 1000);

            let mut granted = Granted {
                buf_alloc: 400,
                fwd_cnt: start,
                announced: start,
            };
            assert!(!granted.forwarded(99));
            assert!(granted.forwarded(1));
            assert_eq!(granted.announce(), (400, start.wrapping_add(100)));
            assert!(!granted.forwarded(99));
        }
    }

    #[test]
    fn claims_that_make_no_sense_give_no_credit() {
        let mut credit = Credit::default();
        assert_eq!(credit.left(), 0);
        credit.spend(100);
        // More taken than was sent.
        credit.note(1000, 101);
        assert_eq!(credit.left(), 0);
        // The buffer shrinks below what is in flight.
        credit.note(50, 0);
        assert_eq!(credit.left(), 0);
        credit.note(u32::MAX, 0);
        assert_eq!(credit.left(), u32::MAX - 100);
    }
}
