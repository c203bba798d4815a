//! The format of the file `state`: magic, version, length, content, digest.

use std::fs::File;
use std::io::{self, Read, Write};

use super::{MachineState, Stored};

const MAGIC: [u8; 8] = *b"KUASARVM";
/// Counts changes of anything in the content.
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 20;
const DIGEST_BYTES: usize = 32;
/// 32 vCPUs take a tenth of this.
const MAX_BYTES: u64 = 4 << 20;

pub(super) fn write(mut file: &File, stored: &Stored<&MachineState>) -> io::Result<()> {
    let content = postcard::to_stdvec(stored).map_err(io::Error::other)?;
    let len = content.len() as u64;
    let bytes = [
        &MAGIC[..],
        &VERSION.to_le_bytes(),
        &len.to_le_bytes(),
        &content,
    ]
    .concat();
    file.write_all(&bytes)?;
    file.write_all(blake3::hash(&bytes).as_bytes())?;
    file.sync_all()
}

pub(super) fn read(file: &File) -> io::Result<Stored> {
    let mut bytes = Vec::new();
    file.take(MAX_BYTES.saturating_add(1))
        .read_to_end(&mut bytes)?;
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> io::Result<Stored> {
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
    postcard::from_bytes(content).map_err(|err| invalid(&format!("damaged content: {err}")))
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
