//! Frames of ttrpc: ten bytes of header (length of the content and id of the stream, four
//! bytes each, big endian; type; flags), then the content.

use std::io::{Error, ErrorKind, Result};

use prost::Message;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tonic::Status;

use crate::rpc::ttrpc;

const HEADER_BYTES: usize = 10;

/// Longest content of a frame, as containerd has it.
const MAX_CONTENT_BYTES: usize = 4 << 20;

/// A frame that opens a stream.
const REQUEST: u8 = 1;
/// A frame that answers and ends it.
const RESPONSE: u8 = 2;

/// A frame as it was read, header and all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame(Vec<u8>);

impl Frame {
    /// Reads one; `None` at the end of the connection.
    ///
    /// # Errors
    /// The connection broke, or what comes over it is no frame.
    pub(crate) async fn read(from: &mut (impl AsyncRead + Unpin)) -> Result<Option<Self>> {
        let mut bytes = vec![0; HEADER_BYTES];
        match from.read_exact(&mut bytes).await {
            Ok(_) => {}
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => return Ok(None),
            Err(e) => return Err(e),
        }
        let length = field(&bytes, 0);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length > MAX_CONTENT_BYTES {
            let message = format!("a frame of {length} bytes: {MAX_CONTENT_BYTES} are the most");
            return Err(Error::new(ErrorKind::InvalidData, message));
        }
        bytes.resize(HEADER_BYTES + length, 0);
        let content = bytes.get_mut(HEADER_BYTES..).unwrap_or_default();
        from.read_exact(content).await?;
        Ok(Some(Self(bytes)))
    }

    /// Writes it as it was read.
    ///
    /// # Errors
    /// The connection broke.
    pub(crate) async fn write(&self, to: &mut (impl AsyncWrite + Unpin)) -> Result<()> {
        to.write_all(&self.0).await
    }

    /// The answer that ends a stream.
    pub(crate) fn response(stream: u32, answer: std::result::Result<Vec<u8>, Status>) -> Self {
        let response = match answer {
            Ok(payload) => ttrpc::Response {
                status: None,
                payload,
            },
            Err(status) => ttrpc::Response {
                status: Some(ttrpc::Status {
                    code: status.code().into(),
                    message: status.message().to_owned(),
                    details: Vec::new(),
                }),
                payload: Vec::new(),
            },
        };
        let content = response.encode_to_vec();
        let length = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let mut bytes = Vec::with_capacity(HEADER_BYTES + content.len());
        bytes.extend(length.to_be_bytes());
        bytes.extend(stream.to_be_bytes());
        bytes.extend([RESPONSE, 0]);
        bytes.extend(content);
        Self(bytes)
    }

    pub(crate) fn stream(&self) -> u32 {
        field(&self.0, 4)
    }

    pub(crate) fn is_request(&self) -> bool {
        self.kind() == REQUEST
    }

    pub(crate) fn is_response(&self) -> bool {
        self.kind() == RESPONSE
    }

    fn kind(&self) -> u8 {
        self.0.get(8).copied().unwrap_or_default()
    }

    /// What a request asks.
    ///
    /// # Errors
    /// It is damaged.
    pub(crate) fn request(&self) -> std::result::Result<ttrpc::Request, Status> {
        let content = self.0.get(HEADER_BYTES..).unwrap_or_default();
        ttrpc::Request::decode(content).map_err(|e| Status::invalid_argument(e.to_string()))
    }
}

fn field(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map_or(0, u32::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn read(bytes: &[u8]) -> Result<Option<Frame>> {
        let mut bytes = bytes;
        Frame::read(&mut bytes).await
    }

    #[tokio::test]
    async fn frames_pass_unchanged() {
        let bytes = [0, 0, 0, 3, 0, 0, 1, 1, 3, 5, b'a', b'b', b'c'];
        let frame = read(&bytes).await.unwrap().unwrap();
        assert_eq!(frame.stream(), 257);
        assert!(!frame.is_request() && !frame.is_response());
        let mut written = Vec::new();
        frame.write(&mut written).await.unwrap();
        assert_eq!(written, bytes);
    }

    #[tokio::test]
    async fn what_is_no_frame_is_refused() {
        assert!(read(&[]).await.unwrap().is_none());
        let mut huge = vec![0xff; 4];
        huge.extend([0; 6]);
        let why = read(&huge).await.unwrap_err();
        assert_eq!(why.kind(), ErrorKind::InvalidData);
        let cut = read(&[0, 0, 0, 9, 0, 0, 0, 1, 1, 0, 7]).await.unwrap_err();
        assert_eq!(cut.kind(), ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn an_answer_is_a_frame() {
        let refused = Frame::response(7, Err(Status::not_found("no pod")));
        let mut written = Vec::new();
        refused.write(&mut written).await.unwrap();
        let frame = read(&written).await.unwrap().unwrap();
        assert_eq!((frame.stream(), frame.is_response()), (7, true));
        let content = written.get(HEADER_BYTES..).unwrap();
        let status = ttrpc::Response::decode(content).unwrap().status.unwrap();
        assert_eq!((status.code, status.message.as_str()), (5, "no pod"));
    }
}
