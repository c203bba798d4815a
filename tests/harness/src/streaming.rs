//! Exec, attach and port forwarding as the API server does them: channels over a WebSocket to
//! the address that CRI answers (`v4.channel.k8s.io`).

use std::net::TcpStream;
use std::time::{Duration, Instant};

use tungstenite::client::IntoClientRequest;
use tungstenite::http::HeaderValue;
use tungstenite::{Error, Message, WebSocket};

/// To the process.
pub const STDIN: u8 = 0;
/// From the process; all that a terminal shows.
pub const STDOUT: u8 = 1;
/// From the process.
pub const STDERR: u8 = 2;
/// How the process ended, as a `Status` of Kubernetes in JSON.
pub const STATUS: u8 = 3;
/// The size of the terminal, in JSON.
pub const RESIZE: u8 = 4;

/// Longest wait for an answer.
const LIMIT: Duration = Duration::from_secs(120);

/// What goes on over one connection; the connection ends with it.
#[derive(Debug)]
pub struct Session(WebSocket<TcpStream>);

/// Host and port of an address that CRI answered.
///
/// # Panics
/// When it is not `http://host:port/path`.
#[must_use]
pub fn authority(url: &str) -> &str {
    let rest = url.strip_prefix("http://").expect("an http URL");
    rest.split('/').next().expect("a host")
}

impl Session {
    /// Begins what `url` stands for over `stream`.
    ///
    /// # Panics
    /// When the server does not agree.
    #[must_use]
    pub fn new(stream: TcpStream, url: &str) -> Self {
        stream
            .set_read_timeout(Some(LIMIT))
            .expect("set a deadline");
        let url = url.replacen("http://", "ws://", 1);
        let mut request = url.into_client_request().expect("a request");
        let protocol = HeaderValue::from_static("v4.channel.k8s.io");
        request
            .headers_mut()
            .insert("Sec-WebSocket-Protocol", protocol);
        let (socket, _) = tungstenite::client(request, stream).expect("a WebSocket");
        Self(socket)
    }

    /// Sends bytes on a channel.
    ///
    /// # Panics
    /// When the connection is broken.
    pub fn send(&mut self, channel: u8, bytes: &[u8]) {
        let mut message = vec![channel];
        message.extend_from_slice(bytes);
        self.0.send(Message::binary(message)).expect("send");
    }

    /// The next bytes and their channel; `None` at the end.
    ///
    /// # Panics
    /// When nothing comes in time.
    pub fn receive(&mut self) -> Option<(u8, Vec<u8>)> {
        loop {
            match self.0.read() {
                Ok(Message::Binary(bytes)) => {
                    let (channel, bytes) = bytes.split_first().expect("a channel");
                    return Some((*channel, bytes.to_vec()));
                }
                Ok(Message::Close(_)) => return None,
                Ok(_) => {}
                Err(Error::Io(e)) if e.kind() == std::io::ErrorKind::WouldBlock => {
                    panic!("nothing came in {LIMIT:?}");
                }
                // The server may just hang up.
                Err(_) => return None,
            }
        }
    }

    /// Reads a channel until it has shown `text`; returns all it has shown.
    ///
    /// # Panics
    /// When it does not.
    #[track_caller]
    pub fn expect(&mut self, channel: u8, text: &str) -> String {
        let (mut seen, begun) = (Vec::new(), Instant::now());
        while begun.elapsed() < LIMIT {
            match self.receive() {
                Some((found, bytes)) if found == channel => seen.extend(bytes),
                Some(_) => {}
                None => break,
            }
            let shown = String::from_utf8_lossy(&seen);
            if shown.contains(text) {
                return shown.into_owned();
            }
        }
        let shown = String::from_utf8_lossy(&seen);
        panic!("{text:?} is not in what channel {channel} showed: {shown:?}");
    }

    /// Reads to the end: stdout, stderr and how the process ended.
    ///
    /// # Panics
    /// When it does not end.
    #[must_use]
    pub fn finish(mut self) -> (String, String, String) {
        let mut seen = [(); 3].map(|()| Vec::new());
        while let Some((channel, bytes)) = self.receive() {
            let slot = usize::from(channel.saturating_sub(STDOUT));
            if let Some(seen) = seen.get_mut(slot) {
                seen.extend(bytes);
            }
        }
        let [stdout, stderr, status] = seen.map(|bytes| String::from_utf8_lossy(&bytes).into());
        (stdout, stderr, status)
    }
}
