//! Keeps targets that write files away from the host's.

use std::fs;
use std::io;
use std::os::unix::fs::chroot;
use std::path::Path;
use std::sync::mpsc;
use std::sync::{Mutex, OnceLock};
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::signal::{SigHandler, Signal, signal};

/// A folder beside the fuzzed one that nobody may touch.
const CANARY: &str = "canary";
/// Where the host's is mounted.
const PROC: &str = "proc";
const CANARY_CONTENT: &[u8] = b"outside";

/// Largest file: a guest may ask for any size, and sparse or not, the disk is not its own.
const MAX_FILE_BYTES: u64 = 64 << 20;

type Work = Box<dyn FnOnce() + Send>;

/// Runs `work` on a thread whose root folder is a fresh temporary one, and checks
/// afterwards that nothing but `inside` changed there. When the process may not change its
/// root (it is not root), it runs in the temporary folder itself.
///
/// `work` gets the root as a path that works on that thread.
pub fn confined(inside: &'static str, work: impl FnOnce(&Path) + Send) {
    static THREAD: OnceLock<Mutex<(mpsc::Sender<Work>, mpsc::Receiver<()>)>> = OnceLock::new();
    let thread = THREAD.get_or_init(|| Mutex::new(start()));
    let thread = thread.lock().unwrap();
    let (sender, done) = &*thread;
    let work: Box<dyn FnOnce() + Send + '_> = Box::new(move || {
        let root = ROOT.get().unwrap();
        work(root);
        check(root, inside);
    });
    // SAFETY: extends the lifetime of what `work` borrows; the work is over when `recv`
    // returns, and a panic in it ends the process.
    let work = unsafe { std::mem::transmute::<Box<dyn FnOnce() + Send + '_>, Work>(work) };
    sender.send(work).unwrap();
    done.recv().unwrap();
}

static ROOT: OnceLock<std::path::PathBuf> = OnceLock::new();

fn start() -> (mpsc::Sender<Work>, mpsc::Receiver<()>) {
    setrlimit(Resource::RLIMIT_FSIZE, MAX_FILE_BYTES, MAX_FILE_BYTES).unwrap();
    // SAFETY: no handler. Too large a file is then an error and not the end.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }.unwrap();
    let (sender, inbox) = mpsc::channel::<Work>();
    let (finished, done) = mpsc::channel();
    thread::spawn(move || {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join(CANARY)).unwrap();
        fs::write(folder.path().join(CANARY).join("file"), CANARY_CONTENT).unwrap();
        let root = enter(folder.path()).map_or_else(|_| folder.path().to_owned(), |()| "/".into());
        let _ = ROOT.set(root);
        for work in inbox {
            work();
            let _ = finished.send(());
        }
    });
    (sender, done)
}

/// Makes `folder` the root of this thread and those it starts, not of the fuzzer.
fn enter(folder: &Path) -> io::Result<()> {
    unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS)?;
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
    // Files are reached through /proc/self/fd; nothing in it can be written.
    let proc = folder.join(PROC);
    fs::create_dir(&proc)?;
    mount(Some("/proc"), &proc, none, MsFlags::MS_BIND, none)?;
    let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(none, &proc, none, read_only, none)?;
    chroot(folder)?;
    std::env::set_current_dir("/")
}

fn check(root: &Path, inside: &str) {
    let mut names: Vec<_> = fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .filter(|name| name != inside && name != PROC)
        .collect();
    names.sort();
    assert_eq!(names, [CANARY], "files appeared outside");
    let file = root.join(CANARY).join("file");
    assert_eq!(
        fs::read(&file).unwrap(),
        CANARY_CONTENT,
        "a file outside was changed"
    );
    let count = fs::read_dir(root.join(CANARY)).unwrap().count();
    assert_eq!(count, 1, "files appeared outside");
}

/// An empty folder `name` in `root`, whatever was there before.
pub fn fresh_dir(root: &Path, name: &str) -> std::path::PathBuf {
    let path = root.join(name);
    if path.exists() {
        fs::remove_dir_all(&path).unwrap();
    }
    fs::create_dir(&path).unwrap();
    path
}
