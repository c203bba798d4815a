//! The format of the file `state`: magic, version, length, content, digest.

use std::fs::File;
use std::io::{self, Read};

use super::{MachineState, Stored};

const MAGIC: [u8; 8] = *b"KUASARVM";
/// Counts changes of anything in the content.
const VERSION: u32 = 3;
const HEADER_BYTES: usize = 20;
const DIGEST_BYTES: usize = 32;
/// 32 vCPUs take a tenth of this.
const MAX_BYTES: u64 = 4 << 20;

/// The file of `stored`.
pub(super) fn to_bytes(stored: &Stored<&MachineState>) -> io::Result<Vec<u8>> {
    let content = postcard::to_stdvec(stored).map_err(io::Error::other)?;
    Ok(seal(&content))
}

/// The file around `content`.
pub(super) fn seal(content: &[u8]) -> Vec<u8> {
    let len = content.len() as u64;
    let mut bytes = [
        &MAGIC[..],
        &VERSION.to_le_bytes(),
        &len.to_le_bytes(),
        content,
    ]
    .concat();
    let digest = blake3::hash(&bytes);
    bytes.extend(digest.as_bytes());
    bytes
}

pub(super) fn read(file: &File) -> io::Result<Stored> {
    let mut bytes = Vec::new();
    file.take(MAX_BYTES.saturating_add(1))
        .read_to_end(&mut bytes)?;
    parse(&bytes)
}

pub(super) fn parse(bytes: &[u8]) -> io::Result<Stored> {
    let (magic, rest) = bytes.split_first_chunk().unwrap_or((&[0; 8], &[]));
    if *magic != MAGIC {
        return Err(invalid("this is not the state of a VM"));
    }
    let truncated = || invalid("the file was cut short");
    let (version, rest) = rest.split_first_chunk().ok_or_else(truncated)?;
    let version = u32::from_le_bytes(*version);
    if version != VERSION {
        return Err(invalid(&format!(
            "the file has version {version}, this release reads version {VERSION}"
        )));
    }
    let (len, rest) = rest.split_first_chunk().ok_or_else(truncated)?;
    let len = usize::try_from(u64::from_le_bytes(*len)).unwrap_or(usize::MAX);
    let (content, digest) = rest.split_at_checked(len).ok_or_else(truncated)?;
    if digest.len() < DIGEST_BYTES {
        return Err(truncated());
    }
    let signed = bytes
        .get(..HEADER_BYTES.saturating_add(len))
        .unwrap_or_default();
    if digest != blake3::hash(signed).as_bytes() {
        return Err(invalid("the content does not have its digest"));
    }
    match postcard::take_from_bytes(content) {
        Ok((stored, [])) => Ok(stored),
        Ok(_) => Err(invalid("damaged content: more than a machine")),
        Err(err) => Err(invalid(&format!("damaged content: {err}"))),
    }
}

pub(super) fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine whose structures of KVM are all cut to nothing, which counts as zero.
    fn content(vcpus: usize, chips: usize, msrs: usize) -> Vec<u8> {
        let len = |len: usize| postcard::to_stdvec(&len).unwrap();
        // Lists of CPUID entries and MSRs, eight structures.
        let vcpu = [vec![0; 8], len(msrs), vec![0; msrs], vec![0]].concat();
        [
            // Label, digest, no base, command line, sizes of memory.
            vec![0; 37],
            len(vcpus),
            vcpu.repeat(vcpus),
            len(chips),
            vec![0; chips],
            // Timer, clock, serial port, CMOS, devices, disks.
            vec![0; 15],
        ]
        .concat()
    }

    #[test]
    fn no_state_has_more_than_a_machine() {
        let stored = parse(&seal(&content(32, 3, 256))).unwrap();
        assert_eq!(stored.machine.vcpus.len(), 32);
        for content in [
            content(33, 3, 0),
            content(100_000, 3, 0),
            content(1, 4, 0),
            content(1, 4_000_000, 0),
            content(1, 3, 257),
            [content(1, 3, 1), vec![0]].concat(),
        ] {
            let err = parse(&seal(&content)).unwrap_err();
            assert_eq!(err.kind(), io::ErrorKind::InvalidData, "{err}");
        }
    }

    #[test]
    fn damage_is_refused() {
        let file = seal(&content(1, 3, 2));
        parse(&file).unwrap();
        for len in 0..file.len() {
            parse(&file[..len]).unwrap_err();
        }
        for at in 0..file.len() {
            let mut damaged = file.clone();
            damaged[at] ^= 1;
            parse(&damaged).unwrap_err();
        }
        parse(&[&file[..], &[0]].concat()).unwrap_err();
    }
}
