//! Sequences in a snapshot that cannot be longer than a machine has them.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

/// At most `MAX` elements, for `deserialize_with`. KVM's structures may be cut short in a
/// file, to one byte each, and take kilobytes in memory: a file that says it has millions
/// would take gigabytes.
pub(crate) fn at_most<'de, const MAX: usize, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    deserializer.deserialize_seq(AtMost::<MAX, T>(PhantomData))
}

struct AtMost<const MAX: usize, T>(PhantomData<T>);

impl<'de, const MAX: usize, T: Deserialize<'de>> Visitor<'de> for AtMost<MAX, T> {
    type Value = Vec<T>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "at most {MAX} elements")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<Vec<T>, A::Error> {
        let mut elements = Vec::new();
        while let Some(element) = sequence.next_element()? {
            if elements.len() == MAX {
                return Err(A::Error::invalid_length(MAX.saturating_add(1), &self));
            }
            elements.push(element);
        }
        Ok(elements)
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::at_most;

    #[derive(Debug, Deserialize)]
    struct Few(#[serde(deserialize_with = "at_most::<3, _, _>")] Vec<u8>);

    #[test]
    fn longer_sequences_are_refused() {
        for len in 0..=3 {
            let bytes = postcard::to_stdvec(&vec![7_u8; len]).unwrap();
            let Few(read) = postcard::from_bytes(&bytes).unwrap();
            assert_eq!(read, vec![7; len]);
        }
        for len in [4, 5, 100_000] {
            let bytes = postcard::to_stdvec(&vec![7_u8; len]).unwrap();
            postcard::from_bytes::<Few>(&bytes).unwrap_err();
        }
    }
}
