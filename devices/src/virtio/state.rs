//! What a snapshot keeps of a device, as bytes: a version, a check sum and the fields.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{ActivateError, DeviceType};

/// Version and check sum.
const HEADER_BYTES: usize = 10;

/// A device cannot be saved, or not made again from what was saved.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Saved by a release with another layout.
    #[error("the saved {device} device has version {found}, this release reads {known}")]
    Version {
        /// Which device.
        device: &'static str,
        /// In the state.
        found: u16,
        /// The one version that is read.
        known: u16,
    },
    /// Not what was saved: cut short or changed since.
    #[error("the saved {device} device is damaged")]
    Damaged {
        /// Which device.
        device: &'static str,
    },
    /// A value that no device can have saved.
    #[error("the saved {device} device is invalid: {what}")]
    Invalid {
        /// Which device.
        device: &'static str,
        /// The value.
        what: String,
    },
    /// Saved from a device that was configured otherwise.
    #[error("the saved {device} device differs from this one: {what}")]
    Mismatch {
        /// Which device.
        device: &'static str,
        /// The difference.
        what: String,
    },
    /// Its driver has started already: only a fresh device is restored.
    #[error("the {0} device is in use")]
    InUse(&'static str),
    /// The device cannot be described.
    #[error("cannot save the {device} device: {what}")]
    Save {
        /// Which device.
        device: &'static str,
        /// Why.
        what: String,
    },
    /// A system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The device cannot go on.
    #[error("cannot activate the device: {0}")]
    Activate(#[from] ActivateError),
}

impl StateError {
    pub(crate) fn invalid(device: DeviceType, what: impl Into<String>) -> Self {
        Self::Invalid {
            device: device.name(),
            what: what.into(),
        }
    }

    pub(crate) fn mismatch(device: DeviceType, what: impl Into<String>) -> Self {
        Self::Mismatch {
            device: device.name(),
            what: what.into(),
        }
    }
}

/// `fields` as the state of `device`.
///
/// # Errors
/// [`StateError::Save`].
pub(crate) fn encode(
    device: DeviceType,
    version: u16,
    fields: &impl Serialize,
) -> Result<Vec<u8>, StateError> {
    let mut bytes = vec![0; HEADER_BYTES];
    bytes = postcard::to_extend(fields, bytes).map_err(|err| StateError::Save {
        device: device.name(),
        what: err.to_string(),
    })?;
    if let Some((header, body)) = bytes.split_at_mut_checked(HEADER_BYTES) {
        let sum = checksum(version, body).to_le_bytes();
        for (to, from) in header
            .iter_mut()
            .zip(version.to_le_bytes().iter().chain(&sum))
        {
            *to = *from;
        }
    }
    Ok(bytes)
}

/// What [`encode`] made of the fields. Sequences in them grow as they are read, so that no
/// length in `bytes` leads to an allocation larger than a few times `bytes` itself.
///
/// # Errors
/// [`StateError::Version`], [`StateError::Damaged`].
pub(crate) fn decode<T: DeserializeOwned>(
    device: DeviceType,
    known: u16,
    bytes: &[u8],
) -> Result<T, StateError> {
    let device = device.name();
    let damaged = || StateError::Damaged { device };
    let ([v0, v1, sum @ ..], body) = bytes
        .split_first_chunk::<HEADER_BYTES>()
        .ok_or_else(damaged)?;
    let found = u16::from_le_bytes([*v0, *v1]);
    if u64::from_le_bytes(*sum) != checksum(found, body) {
        return Err(damaged());
    }
    if found != known {
        return Err(StateError::Version {
            device,
            found,
            known,
        });
    }
    match postcard::take_from_bytes(body) {
        Ok((fields, [])) => Ok(fields),
        _ => Err(damaged()),
    }
}

/// For devices that save nothing.
///
/// # Errors
/// [`StateError::Damaged`] when there is something.
pub(crate) fn expect_nothing(device: DeviceType, bytes: &[u8]) -> Result<(), StateError> {
    if bytes.is_empty() {
        return Ok(());
    }
    Err(StateError::Damaged {
        device: device.name(),
    })
}

/// FNV-1a: each step is a bijection, so that a change of any one byte always shows.
fn checksum(version: u16, body: &[u8]) -> u64 {
    version
        .to_le_bytes()
        .iter()
        .chain(body)
        .fold(0xcbf2_9ce4_8422_2325, |sum, byte| {
            (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        })
}

/// Bytes with a valid header around anything: what is left to the device to refuse.
#[cfg(any(test, feature = "fuzzing"))]
#[must_use]
pub fn seal(version: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = version.to_le_bytes().to_vec();
    bytes.extend(checksum(version, body).to_le_bytes());
    bytes.extend(body);
    bytes
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    pub(crate) use super::seal;
    use super::*;
    use crate::virtio::VirtioDevice;

    const RNG: DeviceType = DeviceType::Rng;

    /// No cut, no flipped bit and no other version of `state` is taken by a device that
    /// `fresh` makes, and nothing that looks like a state makes it panic.
    pub(crate) fn check_hostile<D: VirtioDevice>(state: &[u8], fresh: impl Fn() -> D) {
        fresh().restore(state).unwrap();
        if state.is_empty() {
            fresh().restore(&[0]).unwrap_err();
            return;
        }
        for len in 0..state.len().min(200) {
            fresh().restore(&state[..len]).unwrap_err();
        }
        for bit in 0..state.len().min(100) * 8 {
            let mut flipped = state.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let err = fresh().restore(&flipped).unwrap_err();
            assert!(matches!(err, StateError::Damaged { .. }), "{err}");
        }
        let longer = [state, &[0]].concat();
        fresh().restore(&longer).unwrap_err();
        let (version, body) = (
            u16::from_le_bytes([state[0], state[1]]),
            &state[HEADER_BYTES..],
        );
        let err = fresh().restore(&seal(version + 1, body)).unwrap_err();
        assert!(matches!(err, StateError::Version { .. }), "{err}");
        for len in 0..body.len().min(100) {
            // A field may be missing without notice only if it is none.
            fresh().restore(&seal(version, &body[..len])).unwrap_err();
        }
        for bit in 0..body.len().min(100) * 8 {
            let mut flipped = body.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let _ = fresh().restore(&seal(version, &flipped));
        }
        let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig::with_cases(64));
        runner
            .run(&prop::collection::vec(any::<u8>(), 0..200), |bytes| {
                let _ = fresh().restore(&bytes);
                let _ = fresh().restore(&seal(version, &bytes));
                Ok(())
            })
            .unwrap();
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded(numbers: Vec<u64>, text: String) {
            let bytes = encode(RNG, 3, &(&numbers, &text)).unwrap();
            let back: (Vec<u64>, String) = decode(RNG, 3, &bytes).unwrap();
            prop_assert_eq!(back, (numbers, text));
        }
    }

    #[test]
    fn a_length_that_lies_is_refused_without_the_memory_for_it() {
        let huge = seal(1, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]);
        let err = decode::<Vec<u64>>(RNG, 1, &huge).unwrap_err();
        assert!(matches!(err, StateError::Damaged { .. }), "{err}");
        decode::<String>(RNG, 1, &huge).unwrap_err();
    }
}
