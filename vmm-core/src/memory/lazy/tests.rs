use std::fs::File;
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress};

use super::super::chunks::{ChunkList, ChunkWriter};
use super::super::{GuestRam, MemoryImage, RamSize};
use super::*;
use crate::exit::ExitNotice;
use crate::vm::ExitReason;

const BYTES: u64 = 4 << 20;
const CHUNK: u64 = CHUNK_BYTES as u64;

/// Whose last part begins within a chunk.
fn size() -> RamSize {
    let hotplug_bytes = (1 << 20) - 8192;
    RamSize {
        boot_bytes: BYTES - hotplug_bytes,
        hotplug_bytes,
    }
}

/// A file with a chunk of ones, a hole, and a chunk of threes whose digest may be wrong.
fn file() -> (File, ChunkList) {
    let file = tempfile::tempfile().unwrap();
    let mut writer = ChunkWriter::new(&file, None);
    for (at, byte) in [(0, 1), (2 * CHUNK, 3)] {
        writer.add(at, &vec![byte; CHUNK_BYTES]).unwrap();
    }
    let list = writer.finish(BYTES).unwrap();
    (file, list)
}

/// Lazy memory, through which its machine's end is told, and the file.
fn ram() -> (GuestRam, ExitNotice, File) {
    let (file, list) = file();
    let stored = StoredMemory::new(file.try_clone().unwrap(), size(), list, None).unwrap();
    let exit = ExitNotice::new();
    let threads = VmThreads::new("lazy", exit.clone()).unwrap();
    let ram = MemoryImage::open(stored).clone_memory(&threads).unwrap();
    (ram, exit, file)
}

fn byte(ram: &GuestRam, at: u64) -> u8 {
    ram.guest_memory().read_obj(GuestAddress(at)).unwrap()
}

#[test]
fn memory_comes_when_it_is_touched() {
    let (ram, _, file) = ram();
    assert_eq!(ram.resident_bytes().unwrap(), 0);
    assert_eq!(byte(&ram, 2 * CHUNK + 4097), 3);
    assert_eq!(ram.resident_bytes().unwrap(), CHUNK, "one chunk");
    assert_eq!(byte(&ram, CHUNK), 0);
    // Written by this thread, by the kernel for it, and read by several threads at once.
    ram.guest_memory()
        .write_slice(&[7; 10], GuestAddress(5))
        .unwrap();
    assert_eq!((byte(&ram, 4), byte(&ram, 5)), (1, 7));
    let mut nines: &[u8] = &[9; 8192];
    let at = GuestAddress(3 * CHUNK + 100);
    let memory = ram.guest_memory();
    memory
        .read_exact_volatile_from(at, &mut nines, 8192)
        .unwrap();
    // By the kernel: from a file.
    let mut zeroes = File::open("/dev/zero").unwrap();
    let at = GuestAddress(5 * CHUNK + 100);
    memory
        .read_exact_volatile_from(at, &mut zeroes, 8192)
        .unwrap();
    assert_eq!(byte(&ram, 3 * CHUNK + 100), 9);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let size = size();
                let plugged = size.hotplug_start()..size.hotplug_start() + size.hotplug_bytes;
                for at in (0..size.boot_bytes).chain(plugged).step_by(4096) {
                    byte(&ram, at);
                }
            });
        }
    });
    assert_eq!(ram.resident_bytes().unwrap(), BYTES);
    assert_eq!(file.metadata().unwrap().len(), BYTES);
}

#[test]
fn what_is_written_again_is_what_was_read_and_changed() {
    let (ram, _, _file) = ram();
    ram.guest_memory()
        .write_slice(&[7], GuestAddress(2 * CHUNK))
        .unwrap();
    let all = tempfile::tempfile().unwrap();
    let list = ram.write_to(&all, None).unwrap();
    assert_eq!(list.len(), 2);
    let mut found = [0; 2];
    all.read_exact_at(&mut found, 2 * CHUNK).unwrap();
    assert_eq!(found, [7, 3]);
    let diff = tempfile::tempfile().unwrap();
    let (_, base) = file();
    let list = ram.write_to(&diff, Some(&base)).unwrap();
    let in_base: Vec<_> = list.iter().map(|chunk| chunk.in_base).collect();
    assert_eq!(in_base, [true, false]);
}

#[test]
fn damage_before_the_machine_is_whole_is_an_error() {
    let (ram, exit, file) = ram();
    file.write_all_at(&[2], 100).unwrap();
    assert_eq!(byte(&ram, 50), 0, "nobody is kept waiting");
    let err = ram.in_use().unwrap_err();
    assert!(err.to_string().contains("digest"), "{err}");
    assert_eq!(exit.get(), None);
}

#[test]
fn damage_ends_the_machine_and_whoever_waits_goes_on_when_it_is_over() {
    let (ram, exit, file) = ram();
    ram.in_use().unwrap();
    assert_eq!(byte(&ram, 50), 1);
    file.set_len(CHUNK).unwrap();
    let waiting = {
        let ram = ram.clone();
        std::thread::spawn(move || byte(&ram, 2 * CHUNK))
    };
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    let mut seen = exit.subscribe();
    let reason = runtime.unwrap().block_on(seen.wait_for(Option::is_some));
    let reason = reason.unwrap().clone();
    let Some(ExitReason::Device(why)) = reason else {
        panic!("{reason:?}");
    };
    assert!(why.contains("snapshot"), "{why}");
    assert!(!waiting.is_finished());
    ram.give_up();
    assert_eq!(waiting.join().unwrap(), 0);
}
