//! Configuration space: virtio 1.2, 5.11.4.

use super::config::FsError;

/// The share's name as the guest reads it: padded with NUL, not terminated.
#[derive(Clone, Copy, Debug)]
pub struct Tag([u8; Tag::MAX]);

impl Tag {
    /// Bytes of the field.
    pub const MAX: usize = 36;

    /// Checks a tag.
    ///
    /// # Errors
    /// When it is empty, too long, or has a NUL.
    pub fn new(tag: &str) -> Result<Self, FsError> {
        let mut bytes = [0; Self::MAX];
        match bytes.get_mut(..tag.len()) {
            Some(start) if !tag.is_empty() && !tag.contains('\0') => {
                start.copy_from_slice(tag.as_bytes());
                Ok(Self(bytes))
            }
            _ => Err(FsError::Tag(tag.to_owned())),
        }
    }

    /// The configuration space: this tag, then the number of request queues.
    #[must_use]
    pub fn config(&self, request_queues: u16) -> [u8; Self::MAX + 4] {
        let mut config = [0; Self::MAX + 4];
        let queues = u32::from(request_queues).to_le_bytes();
        for (to, from) in config.iter_mut().zip(self.0.into_iter().chain(queues)) {
            *to = from;
        }
        config
    }
}
