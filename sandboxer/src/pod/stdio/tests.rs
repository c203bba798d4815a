use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::stat::Mode;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::net::unix::pipe;
use tokio::time::timeout;

use super::*;

fn no_streams() -> Arc<Streams> {
    Arc::new(Streams::default())
}

/// Longer than anything here takes, shorter than a hanging test would be.
const SOON: Duration = Duration::from_secs(10);

/// A drain that must never be waited out.
const LONG_DRAIN: Duration = Duration::from_secs(600);

fn fifo(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600)).unwrap();
    path
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Opens `paths` and connects them to the returned guest ends of stdin and stdout.
async fn connect(paths: &StdioPaths, drain: Duration) -> (Stdio, DuplexStream, DuplexStream) {
    let host = HostStdio::open(paths, &LogOwner::default(), &no_streams())
        .await
        .unwrap();
    let (stdin, guest_stdin) = duplex(1 << 20);
    let (stdout, guest_stdout) = duplex(1 << 20);
    let guest = GuestStdio {
        stdin: (!paths.stdin.is_empty()).then(|| Box::new(stdin) as _),
        stdout: (!paths.stdout.is_empty()).then(|| Box::new(stdout) as _),
        stderr: None,
    };
    (
        host.connect(guest, drain, async {}),
        guest_stdin,
        guest_stdout,
    )
}

async fn read_all(reader: &mut pipe::Receiver) -> String {
    let mut all = String::new();
    timeout(SOON, reader.read_to_string(&mut all))
        .await
        .expect("end of file")
        .unwrap();
    all
}

#[tokio::test]
async fn output_reaches_a_reader_that_comes_and_goes() {
    let dir = tempfile::tempdir().unwrap();
    let stdout = fifo(dir.path(), "stdout");
    let paths = StdioPaths {
        stdout: text(&stdout),
        ..Default::default()
    };
    // Opening does not wait for a reader.
    let (stdio, _stdin, mut guest) = connect(&paths, LONG_DRAIN).await;
    guest.write_all(b"first ").await.unwrap();
    let mut reader = pipe::OpenOptions::new().open_receiver(&stdout).unwrap();
    let mut bytes = [0; 6];
    timeout(SOON, reader.read_exact(&mut bytes))
        .await
        .unwrap()
        .unwrap();
    // The reader restarts; nothing is lost and nobody gets EPIPE.
    drop(reader);
    guest.write_all(b"second ").await.unwrap();
    guest.write_all(b"third").await.unwrap();
    drop(guest);
    stdio.process_exited();
    timeout(SOON, stdio.drained()).await.unwrap();
    let mut reader = pipe::OpenOptions::new().open_receiver(&stdout).unwrap();
    let mut bytes = [0; 12];
    timeout(SOON, reader.read_exact(&mut bytes))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&bytes, b"second third");
}

#[tokio::test]
async fn the_write_end_closes_when_the_process_ends_not_when_it_is_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let stdout = fifo(dir.path(), "stdout");
    let paths = StdioPaths {
        stdout: text(&stdout),
        ..Default::default()
    };
    let mut reader = pipe::OpenOptions::new().open_receiver(&stdout).unwrap();
    let (stdio, _stdin, mut guest) = connect(&paths, LONG_DRAIN).await;
    guest.write_all(b"bye").await.unwrap();
    drop(guest);
    stdio.process_exited();
    assert_eq!(read_all(&mut reader).await, "bye");
    drop(stdio);
}

#[tokio::test]
async fn a_child_that_keeps_the_stream_does_not_hold_up_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let stdout = fifo(dir.path(), "stdout");
    let paths = StdioPaths {
        stdout: text(&stdout),
        ..Default::default()
    };
    let mut reader = pipe::OpenOptions::new().open_receiver(&stdout).unwrap();
    let (stdio, _stdin, mut guest) = connect(&paths, Duration::from_millis(50)).await;
    guest.write_all(b"out").await.unwrap();
    stdio.process_exited();
    assert_eq!(read_all(&mut reader).await, "out");
    drop(guest);
}

#[tokio::test]
async fn stdin_ends_when_the_api_and_the_writers_have_closed_it() {
    let dir = tempfile::tempdir().unwrap();
    let stdin = fifo(dir.path(), "stdin");
    let paths = StdioPaths {
        stdin: text(&stdin),
        ..Default::default()
    };
    let (stdio, mut guest, _stdout) = connect(&paths, LONG_DRAIN).await;
    let open_writer = || pipe::OpenOptions::new().open_sender(&stdin).unwrap();
    let mut writer = open_writer();
    writer.write_all(b"one ").await.unwrap();
    drop(writer);
    // A client that closes its end may come back.
    let mut writer = open_writer();
    writer.write_all(b"two").await.unwrap();
    stdio.close_stdin();
    drop(writer);
    let mut all = String::new();
    timeout(SOON, guest.read_to_string(&mut all))
        .await
        .expect("end of file")
        .unwrap();
    assert_eq!(all, "one two");
}

#[tokio::test]
async fn stdin_without_a_writer_ends_with_close_io() {
    let dir = tempfile::tempdir().unwrap();
    let stdin = fifo(dir.path(), "stdin");
    let paths = StdioPaths {
        stdin: text(&stdin),
        ..Default::default()
    };
    let (stdio, mut guest, _stdout) = connect(&paths, LONG_DRAIN).await;
    stdio.close_stdin();
    let mut all = Vec::new();
    timeout(SOON, guest.read_to_end(&mut all))
        .await
        .expect("end of file")
        .unwrap();
    assert_eq!(all, b"");
}

#[tokio::test]
async fn files_are_appended_to() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    std::fs::write(&log, "before ").unwrap();
    let paths = StdioPaths {
        stdout: format!("file://{}", log.display()),
        ..Default::default()
    };
    let (stdio, _stdin, mut guest) = connect(&paths, LONG_DRAIN).await;
    guest.write_all(b"after").await.unwrap();
    drop(guest);
    stdio.process_exited();
    timeout(SOON, stdio.drained()).await.unwrap();
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "before after");
}

#[tokio::test]
async fn a_logging_program_gets_the_output_and_the_container_id() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("logger");
    let log = dir.path().join("log");
    let script = format!(
        "#!/bin/sh\nexec 5>&-\n{{ echo \"$CONTAINER_NAMESPACE/$CONTAINER_ID $*\"; cat <&3; }} \
         > {log}.tmp\nmkdir -p {dir}/done && mv {log}.tmp {dir}/done/log\n",
        log = log.display(),
        dir = dir.path().display(),
    );
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o700)
        .open(&program)
        .unwrap();
    file.write_all(script.as_bytes()).unwrap();
    drop(file);
    let paths = StdioPaths {
        stdout: format!("binary://{}?tag=a%20b&flag=", program.display()),
        ..Default::default()
    };
    let owner = LogOwner {
        namespace: "k8s.io".to_owned(),
        container_id: "c1".to_owned(),
    };
    let host = HostStdio::open(&paths, &owner, &no_streams())
        .await
        .unwrap();
    let (stdout, mut guest) = duplex(1 << 20);
    let streams = GuestStdio {
        stdout: Some(Box::new(stdout)),
        ..Default::default()
    };
    let mut stdio = host.connect(streams, LONG_DRAIN, async {});
    guest.write_all(b"hello").await.unwrap();
    drop(guest);
    stdio.process_exited();
    timeout(SOON, stdio.drained()).await.unwrap();
    let logger = stdio.logger.as_mut().unwrap();
    timeout(SOON, logger.wait()).await.unwrap().unwrap();
    let mut text = String::new();
    std::fs::File::open(dir.path().join("done/log"))
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(text, "k8s.io/c1 tag a b flag\nhello");
}

#[tokio::test]
async fn what_cannot_be_opened_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let missing = text(&dir.path().join("missing"));
    for (paths, part) in [
        (
            StdioPaths {
                stdin: missing.clone(),
                ..Default::default()
            },
            "stdin",
        ),
        (
            StdioPaths {
                stdout: missing.clone(),
                ..Default::default()
            },
            "stdout",
        ),
        (
            StdioPaths {
                stderr: "tcp://x".to_owned(),
                ..Default::default()
            },
            "stderr = \"tcp://x\"",
        ),
        (
            StdioPaths {
                stdout: "binary://relative".to_owned(),
                ..Default::default()
            },
            "absolute",
        ),
    ] {
        let error = HostStdio::open(&paths, &LogOwner::default(), &no_streams())
            .await
            .unwrap_err()
            .to_string();
        assert!(error.contains(part), "{error}");
    }
}

#[tokio::test]
async fn a_terminal_has_no_stderr() {
    let dir = tempfile::tempdir().unwrap();
    let paths = StdioPaths {
        stderr: text(&dir.path().join("missing")),
        terminal: true,
        ..Default::default()
    };
    let host = HostStdio::open(&paths, &LogOwner::default(), &no_streams())
        .await
        .unwrap();
    assert!(host.stderr.is_none());
    assert!(!paths.to_rpc().stderr);
}
