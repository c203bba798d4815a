//! When the host does not play along.

use super::*;

#[test]
fn a_file_that_shrinks_underneath_is_an_error() {
    each_engine(|engine| {
        let mut disk = Disk::new(config(engine), 64 << 10);
        disk.file().set_len(1024).unwrap();
        assert_eq!(disk.read(0, 1024), (OK, vec![0; 1024]));
        assert_eq!(disk.read(1, 1024).0, IOERR);
        assert_eq!(disk.read(100, 512).0, IOERR);
        disk.check();
    });
}

#[test]
fn the_tail_of_an_odd_file_is_out_of_reach() {
    each_engine(|engine| {
        let mut disk = Disk::new(config(engine), 10 * 512 + 300);
        disk.file().write_all_at(&[9; 300], 10 * 512).unwrap();
        assert_eq!(disk.capacity(), 10);
        assert_eq!(disk.read(9, 512).0, OK);
        assert_eq!(disk.read(9, 1024).0, IOERR);
        assert_eq!(disk.write(10, &[1; 512]), IOERR);
        assert_eq!(disk.content(10 * 512, 300), [9; 300]);
        assert_eq!(disk.file().metadata().unwrap().len(), 10 * 512 + 300);
    });
}

/// Runs the test `name` of this binary in a process of its own: fds are counted there.
fn alone(name: &str, test: impl Fn()) {
    if !process::elsewhere(&format!("virtio::block::tests::faults::{name}")) {
        test();
    }
}

fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn no_fd_outlives_reset_or_the_device() {
    alone("no_fd_outlives_reset_or_the_device", || {
        each_engine(|engine| {
            let outside = open_fds();
            let config = BlockConfig {
                queues: 4,
                ..config(engine)
            };
            let mut disk = Disk::inactive(config, 1 << 20);
            let inactive = open_fds();
            for _ in 0..20 {
                disk.start_over();
                disk.check();
                disk.driver.device.reset();
                assert_eq!(open_fds(), inactive);
            }
            drop(disk);
            assert_eq!(open_fds(), outside);
        });
    });
}

#[test]
fn without_fds_the_device_says_so() {
    alone("without_fds_the_device_says_so", || {
        use nix::sys::resource::{Resource, setrlimit};
        setrlimit(Resource::RLIMIT_NOFILE, 0, 0).unwrap();
        let err = Block::new(config(Engine::Uring)).unwrap_err();
        assert!(err.to_string().contains("io_uring_setup"), "{err}");
        let (_, handle) = Block::new(config(Engine::Auto)).unwrap();
        assert!(handle.engine().to_string().contains("io_uring_setup"));
    });
}
