//! containerd's streaming service: the standard streams of processes over ttrpc.
//!
//! The first message names the stream and is acknowledged. Then bytes go one way and leave
//! to send some more the other way.

use std::sync::{Arc, Weak};

use async_trait::async_trait;
use prost::Message;
use protobuf::well_known_types::any::Any;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tracing::debug;
use ttrpc::asynchronous::{ServerStream, Service, StreamHandler, StreamInner, TtrpcContext};

use super::convert::into_ttrpc;
use crate::pod::{Outlet, Pod, PodError, StreamEnd};

/// Name of the service.
pub(crate) const SERVICE: &str = "containerd.services.streaming.v1.Streaming";
/// Its one method.
pub(crate) const METHOD: &str = "Stream";

/// Bytes that containerd may send ahead of what the process reads.
const WINDOW_BYTES: usize = 64 * 1024;
/// Bytes of one message, as containerd limits its own.
const CHUNK_BYTES: usize = 32 * 1024;

#[derive(Clone, PartialEq, Message)]
pub(crate) struct StreamInit {
    #[prost(string, tag = "1")]
    pub(crate) id: String,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct Data {
    #[prost(bytes = "vec", tag = "1")]
    pub(crate) data: Vec<u8>,
}

#[derive(Clone, PartialEq, Message)]
pub(crate) struct WindowUpdate {
    #[prost(int32, tag = "1")]
    pub(crate) update: i32,
}

pub(crate) const DATA: &str = "containerd.types.transfer.Data";
pub(crate) const WINDOW_UPDATE: &str = "containerd.types.transfer.WindowUpdate";

type Stream = ServerStream<Any, Any>;

/// The service for the streams of one pod, which it does not keep alive.
pub(super) fn service(pod: &Arc<Pod>) -> Service {
    let handler = Streaming {
        pod: Arc::downgrade(pod),
    };
    Service {
        methods: [].into(),
        streams: [(METHOD.to_owned(), Arc::new(handler) as _)].into(),
    }
}

struct Streaming {
    pod: Weak<Pod>,
}

#[async_trait]
impl StreamHandler for Streaming {
    async fn handler(
        &self,
        _: TtrpcContext,
        inner: StreamInner,
    ) -> ttrpc::Result<Option<ttrpc::Response>> {
        let mut stream = Stream::new(inner);
        let id = loop {
            match stream.recv().await? {
                // What opens a stream carries a message of its own, without content.
                Some(message) if message.type_url.is_empty() => {}
                Some(message) => break decode::<StreamInit>(&message)?.id,
                None => return Ok(None),
            }
        };
        // Any message will do.
        stream.send(&Any::new()).await?;
        let streams = self
            .pod
            .upgrade()
            .ok_or_else(|| into_ttrpc(PodError::not_found("stream", &id)))?
            .streams();
        let mut credit = 0;
        let end = loop {
            tokio::select! {
                end = streams.end(&id) => break end,
                // Leave to send comes early; an end of the connection ends this.
                message = stream.recv() => match message? {
                    Some(message) => credit += update(&message)?,
                    None => return Ok(None),
                },
            }
        };
        drop(streams);
        let served = match end {
            Some(StreamEnd::Output(outlet)) => {
                output(&mut stream, &mut *outlet.lock().await, credit).await
            }
            Some(StreamEnd::Input(inlet)) => {
                let mut inlet = inlet.lock().await;
                let ended = input(&mut stream, &mut inlet).await;
                if let Ok(()) = ended {
                    inlet.take();
                }
                ended
            }
            None => Ok(()),
        };
        if let Err(e) = &served {
            debug!(stream = id, "the connection ended: {e}");
        }
        served.map(|()| None)
    }
}

/// Sends what the process writes until it closes its end, or the other side wants no more.
async fn output(stream: &mut Stream, outlet: &mut Outlet, credit: usize) -> ttrpc::Result<()> {
    let mut credit = credit;
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        if !outlet.unsent.is_empty() && credit > 0 {
            let count = outlet.unsent.len().min(credit);
            let data = outlet.unsent.get(..count).unwrap_or_default().to_vec();
            stream.send(&encode(DATA, &Data { data })).await?;
            outlet.unsent.drain(..count);
            credit -= count;
            continue;
        }
        tokio::select! {
            message = stream.recv() => match message? {
                Some(message) => credit = credit.saturating_add(update(&message)?),
                None => return Ok(()),
            },
            read = outlet.pipe.read(&mut buffer), if outlet.unsent.is_empty() => match read {
                Ok(0) | Err(_) => return Ok(()),
                Ok(n) => outlet.unsent.extend(buffer.iter().take(n)),
            },
        }
    }
}

/// Hands what arrives to the process until the other side says that this was all.
async fn input(
    stream: &mut Stream,
    inlet: &mut Option<tokio::net::unix::pipe::Sender>,
) -> ttrpc::Result<()> {
    let Some(pipe) = inlet.as_mut() else {
        return Ok(());
    };
    let mut room = WINDOW_BYTES;
    loop {
        if room > 0 {
            let update = i32::try_from(room).unwrap_or(i32::MAX);
            let message = encode(WINDOW_UPDATE, &WindowUpdate { update });
            stream.send(&message).await?;
        }
        let Some(message) = stream.recv().await? else {
            return Ok(());
        };
        let data = decode::<Data>(&message)?.data;
        room = data.len();
        if let Err(e) = pipe.write_all(&data).await {
            // The process reads no more.
            debug!("input is dropped: {e}");
            return Ok(());
        }
    }
}

/// How many more bytes may be sent.
fn update(message: &Any) -> ttrpc::Result<usize> {
    let update = decode::<WindowUpdate>(message)?.update;
    usize::try_from(update).map_err(|e| ttrpc::Error::Others(format!("a window of {update}: {e}")))
}

pub(crate) fn decode<T: Message + Default>(message: &Any) -> ttrpc::Result<T> {
    T::decode(message.value.as_slice()).map_err(|e| ttrpc::Error::Others(e.to_string()))
}

pub(crate) fn encode(type_url: &str, message: &impl Message) -> Any {
    Any {
        type_url: type_url.to_owned(),
        value: message.encode_to_vec(),
        ..Default::default()
    }
}
