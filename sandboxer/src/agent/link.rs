//! Keeps one pod's control connection: accepts the agent's dials and forwards its events.

use std::time::Duration;

use agent_api::{PROTOCOL_VERSION, rpc};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tracing::{debug, warn};
use ttrpc::asynchronous::transport::Socket;
use ttrpc::asynchronous::{Client, ClientStreamReceiver};
use ttrpc::context::Context;
use vmm_core::vm::{GuestListener, GuestStream};

use super::{AgentError, AgentEvent, ProcessId, Result};

/// Events that may wait for the pod before the guest has to.
pub(super) const EVENT_BACKLOG: usize = 64;

/// The name of the events call in errors.
const EVENTS: &str = "subscribe to events";

/// Owner of the control connection; runs until the VM is gone.
pub(super) struct Link {
    listener: Box<dyn GuestListener>,
    current: watch::Sender<Option<rpc::AgentClient>>,
    events: mpsc::Sender<AgentEvent>,
    first: Option<oneshot::Sender<Result<rpc::Ready>>>,
    limit: Duration,
}

impl Link {
    /// The link, and what will tell how the first connection went.
    pub(super) fn new(
        listener: Box<dyn GuestListener>,
        current: watch::Sender<Option<rpc::AgentClient>>,
        events: mpsc::Sender<AgentEvent>,
        limit: Duration,
    ) -> (Self, oneshot::Receiver<Result<rpc::Ready>>) {
        let (first, ready) = oneshot::channel();
        let link = Self {
            listener,
            current,
            events,
            first: Some(first),
            limit,
        };
        (link, ready)
    }

    pub(super) async fn run(mut self) {
        let mut next = self.listener.accept().await;
        while let Some(stream) = next.take() {
            next = match self.open(stream).await {
                Ok(stream) => self.forward(stream).await,
                Err(e @ AgentError::Version { .. }) => {
                    if let Some(first) = self.first.take() {
                        // The pod may have given up waiting.
                        let _ = first.send(Err(e));
                    }
                    return;
                }
                Err(e) => {
                    warn!("agent connection refused: {e}");
                    self.listener.accept().await
                }
            };
        }
    }

    /// Subscribes on a fresh stream and publishes its client once the agent is ready.
    async fn open(&mut self, stream: Box<dyn GuestStream>) -> Result<Events> {
        let client = rpc::AgentClient::new(Client::new(Socket::new(stream)));
        let request = rpc::EventsRequest {
            protocol_version: PROTOCOL_VERSION,
            ..Default::default()
        };
        let subscribe = async {
            let mut events = client.events(Context::default(), &request).await?;
            let ready = events.recv().await?;
            Ok((events, ready))
        };
        let (events, event) = timeout(self.limit, subscribe)
            .await
            .map_err(|_| AgentError::Deadline {
                call: EVENTS,
                limit: self.limit,
            })?
            .map_err(|e| AgentError::from_ttrpc(EVENTS, self.limit, e))?;
        let Some(rpc::event::Kind::Ready(ready)) = event.and_then(|e| e.kind) else {
            return Err(AgentError::Disconnected {
                call: EVENTS,
                reason: "the agent did not begin with Ready".to_owned(),
            });
        };
        if ready.protocol_version != PROTOCOL_VERSION {
            return Err(AgentError::Version {
                found: ready.protocol_version,
                expected: PROTOCOL_VERSION,
            });
        }
        self.current.send_replace(Some(client));
        if let Some(first) = self.first.take() {
            let _ = first.send(Ok(ready));
        }
        Ok(events)
    }

    /// Forwards events until the stream breaks or the agent dials again; returns the new
    /// stream, `None` once the VM is gone.
    async fn forward(&mut self, mut stream: Events) -> Option<Box<dyn GuestStream>> {
        loop {
            tokio::select! {
                next = self.listener.accept() => {
                    self.current.send_replace(None);
                    return next;
                }
                event = stream.recv() => match event {
                    Ok(Some(event)) => self.dispatch(event).await,
                    Ok(None) => break,
                    Err(e) => {
                        debug!("agent connection ended: {e}");
                        break;
                    }
                },
            }
        }
        self.current.send_replace(None);
        self.listener.accept().await
    }

    async fn dispatch(&self, event: rpc::Event) {
        let event = match event.kind {
            Some(rpc::event::Kind::Exit(exit)) => {
                let process = exit.process.unwrap_or_default();
                let status = exit.status.unwrap_or_default();
                AgentEvent::Exit {
                    process: ProcessId {
                        container_id: process.container_id,
                        exec_id: process.exec_id,
                    },
                    code: status.code,
                }
            }
            Some(rpc::event::Kind::Oom(oom)) => AgentEvent::Oom {
                container_id: oom.container_id,
            },
            _ => return,
        };
        // Nobody listens once the pod is being torn down.
        let _ = self.events.send(event).await;
    }
}

type Events = ClientStreamReceiver<rpc::Event>;
