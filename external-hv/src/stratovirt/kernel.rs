//! Kernels as StratoVirt takes them: a bzImage, or what an ELF kernel is in memory.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use linux_loader::loader::{Elf, KernelLoader};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

/// Where StratoVirt puts what is no bzImage, and enters it.
const START: u64 = 0x100_0000;
/// No kernel is larger.
const MOST: usize = 512 << 20;
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";

/// The kernel that was used last, once for all pods.
#[derive(Debug, Default)]
pub(super) struct Kernels(Mutex<Option<Image>>);

#[derive(Debug)]
struct Image {
    path: PathBuf,
    modified: SystemTime,
    /// `None` when the file can be used as it is.
    flat: Option<File>,
}

impl Kernels {
    /// The kernel at `path` as memory, unless the file can be used as it is.
    pub(super) fn flat(&self, path: &Path) -> io::Result<Option<OwnedFd>> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let modified = path.metadata()?.modified()?;
        let image = match last.take() {
            Some(image) if image.path == path && image.modified == modified => image,
            _ => Image {
                path: path.to_owned(),
                modified,
                flat: flatten(path)?,
            },
        };
        let flat = image.flat.as_ref().map(File::try_clone).transpose()?;
        *last = Some(image);
        Ok(flat.map(OwnedFd::from))
    }
}

fn flatten(path: &Path) -> io::Result<Option<File>> {
    let mut kernel = File::open(path)?;
    let mut magic = [0; 4];
    kernel.read_exact(&mut magic)?;
    if magic != ELF_MAGIC {
        return Ok(None);
    }
    kernel.rewind()?;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let flat = File::from(memfd_create("kernel", flags)?);
    flat.set_len(MOST as u64)?;
    let place = Some(FileOffset::new(flat.try_clone()?, 0));
    let memory: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges_with_files([(GuestAddress(START), MOST, place)])
            .map_err(io::Error::other)?;
    let loaded = Elf::load(&memory, None, &mut kernel, None).map_err(io::Error::other)?;
    drop(memory);
    if loaded.kernel_load.0 != START {
        let why = format!(
            "its entry point is {:#x}, and StratoVirt enters ELF kernels at {START:#x}; use a \
             bzImage",
            loaded.kernel_load.0
        );
        return Err(io::Error::new(io::ErrorKind::Unsupported, why));
    }
    flat.set_len(loaded.kernel_end.saturating_sub(START))?;
    // One VMM must not change it for the others.
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    fcntl_add_seals(&flat, seals)?;
    Ok(Some(flat))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Write;

    use super::*;

    /// An ELF file with one segment: `code` at `address`, which is also its entry point.
    fn elf(address: u64, code: &[u8]) -> Vec<u8> {
        let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        file.extend(2_u16.to_le_bytes());
        file.extend(62_u16.to_le_bytes());
        file.extend(1_u32.to_le_bytes());
        file.extend(address.to_le_bytes());
        file.extend(64_u64.to_le_bytes());
        file.extend([0; 12]);
        for half in [64_u16, 56, 1, 0, 0, 0] {
            file.extend(half.to_le_bytes());
        }
        file.extend(1_u32.to_le_bytes());
        file.extend(5_u32.to_le_bytes());
        let bytes = code.len() as u64;
        for word in [120, address, address, bytes, bytes + 8, 4096] {
            file.extend(word.to_le_bytes());
        }
        file.extend(code);
        file
    }

    fn kernel(content: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(content).unwrap();
        file
    }

    #[test]
    fn an_elf_kernel_becomes_what_it_is_in_memory() {
        let file = kernel(&elf(START, b"code"));
        let kernels = Kernels::default();
        for _ in 0..2 {
            let flat = kernels.flat(file.path()).unwrap().unwrap();
            let mut flat = File::from(flat);
            flat.rewind().unwrap();
            let mut bytes = Vec::new();
            flat.read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes, b"code\0\0\0\0\0\0\0\0");
            flat.write_all(b"x").unwrap_err();
        }
        // Another one in its place.
        fs::write(file.path(), b"MZ no ELF").unwrap();
        let later = SystemTime::now() + std::time::Duration::from_secs(1);
        file.as_file().set_modified(later).unwrap();
        assert!(kernels.flat(file.path()).unwrap().is_none());
    }

    #[test]
    fn an_elf_kernel_with_another_entry_is_refused() {
        let file = kernel(&elf(START + 0x1000, b"code"));
        let why = Kernels::default().flat(file.path()).unwrap_err();
        assert!(why.to_string().contains("use a bzImage"), "{why}");
    }
}
