//! What happens to tasks, told to containerd.
//!
//! containerd learns of exits from `Wait`; it needs events for out-of-memory kills, and
//! `ctr` and `nerdctl` show them all. Publishing never holds up a pod: events wait in a
//! bounded queue, and are dropped with a warning when containerd does not take them.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskStart,
};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::EventsClient;
use containerd_shim_protos::topics;
use protobuf::well_known_types::any::Any;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{MessageDyn, MessageField};
use tokio::sync::mpsc;
use tracing::warn;
use ttrpc::asynchronous::Client;

use crate::pod::Exit;

/// Events that may wait for containerd.
const BACKLOG: usize = 1024;

/// How long containerd may take for one event.
const LIMIT: Duration = Duration::from_secs(5);

/// Something that happened to a task.
#[derive(Clone, Debug)]
pub struct TaskEvent {
    /// containerd's namespace of the container.
    pub namespace: String,
    /// The container.
    pub container_id: String,
    /// What happened.
    pub kind: TaskEventKind,
}

/// What happened to a task.
#[derive(Clone, Debug)]
pub enum TaskEventKind {
    /// It was created.
    Create {
        /// Folder with its `config.json`.
        bundle: PathBuf,
        /// Pid of its init process.
        pid: u32,
    },
    /// Its init process was started.
    Start {
        /// Pid of its init process.
        pid: u32,
    },
    /// A process was added.
    ExecAdded {
        /// Names the process.
        exec_id: String,
    },
    /// An added process was started.
    ExecStarted {
        /// Names the process.
        exec_id: String,
        /// Its pid.
        pid: u32,
    },
    /// A process ended.
    Exit {
        /// Empty for the init process.
        exec_id: String,
        /// Its pid.
        pid: u32,
        /// How it ended.
        exit: Exit,
    },
    /// It was deleted.
    Delete {
        /// Pid of its init process.
        pid: u32,
        /// How that ended.
        exit: Exit,
    },
    /// The kernel killed one of its processes for want of memory.
    Oom,
}

/// Takes events.
#[derive(Clone, Debug, Default)]
pub struct EventSink(Option<mpsc::Sender<TaskEvent>>);

impl EventSink {
    /// Publishes to containerd's ttrpc socket `socket`; must be called in a runtime.
    #[must_use]
    pub fn to_containerd(socket: &Path) -> Self {
        let (sender, events) = mpsc::channel(BACKLOG);
        tokio::spawn(publish(socket.to_owned(), events));
        Self(Some(sender))
    }

    /// Takes an event; never waits.
    pub fn send(&self, event: TaskEvent) {
        if let Some(sender) = &self.0
            && sender.try_send(event).is_err()
        {
            warn!("an event for containerd is dropped: too many are waiting");
        }
    }
}

/// Sends events in order until no sink is left. A connection is made when there is
/// something to send.
async fn publish(socket: PathBuf, mut events: mpsc::Receiver<TaskEvent>) {
    let address = format!("unix://{}", socket.display());
    let mut connected: Option<EventsClient> = None;
    while let Some(event) = events.recv().await {
        let sent = async {
            let request = forward_request(&event)?;
            let client = match connected.take() {
                Some(client) => client,
                None => EventsClient::new(Client::connect(&address).await?),
            };
            let context = ttrpc::context::with_duration(LIMIT);
            client.forward(context, &request).await?;
            Ok::<_, ttrpc::Error>(client)
        };
        match tokio::time::timeout(LIMIT, sent).await {
            Ok(Ok(client)) => connected = Some(client),
            Ok(Err(e)) => warn!("containerd did not take an event on {address}: {e}"),
            Err(_) => warn!("containerd did not take an event on {address} in {LIMIT:?}"),
        }
    }
}

fn forward_request(event: &TaskEvent) -> ttrpc::Result<ForwardRequest> {
    let (topic, message) = encode(event);
    let value = message
        .write_to_bytes_dyn()
        .map_err(|e| ttrpc::Error::Others(e.to_string()))?;
    Ok(ForwardRequest {
        envelope: MessageField::some(Envelope {
            timestamp: MessageField::some(timestamp(SystemTime::now())),
            namespace: event.namespace.clone(),
            topic: topic.to_owned(),
            event: MessageField::some(Any {
                type_url: message.descriptor_dyn().full_name().to_owned(),
                value,
                ..Default::default()
            }),
            ..Default::default()
        }),
        ..Default::default()
    })
}

fn encode(event: &TaskEvent) -> (&'static str, Box<dyn MessageDyn>) {
    let container_id = event.container_id.clone();
    match event.kind.clone() {
        TaskEventKind::Create { bundle, pid } => (
            topics::TASK_CREATE_EVENT_TOPIC,
            Box::new(TaskCreate {
                container_id,
                bundle: bundle.to_string_lossy().into_owned(),
                pid,
                ..Default::default()
            }),
        ),
        TaskEventKind::Start { pid } => (
            topics::TASK_START_EVENT_TOPIC,
            Box::new(TaskStart {
                container_id,
                pid,
                ..Default::default()
            }),
        ),
        TaskEventKind::ExecAdded { exec_id } => (
            topics::TASK_EXEC_ADDED_EVENT_TOPIC,
            Box::new(TaskExecAdded {
                container_id,
                exec_id,
                ..Default::default()
            }),
        ),
        TaskEventKind::ExecStarted { exec_id, pid } => (
            topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            Box::new(TaskExecStarted {
                container_id,
                exec_id,
                pid,
                ..Default::default()
            }),
        ),
        TaskEventKind::Exit { exec_id, pid, exit } => {
            // containerd names the init process by its container.
            let id = if exec_id.is_empty() {
                container_id.clone()
            } else {
                exec_id
            };
            let exit_event = TaskExit {
                container_id,
                id,
                pid,
                exit_status: exit.code,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            };
            (topics::TASK_EXIT_EVENT_TOPIC, Box::new(exit_event))
        }
        TaskEventKind::Delete { pid, exit } => (
            topics::TASK_DELETE_EVENT_TOPIC,
            Box::new(TaskDelete {
                container_id,
                pid,
                exit_status: exit.code,
                exited_at: MessageField::some(timestamp(exit.at)),
                ..Default::default()
            }),
        ),
        TaskEventKind::Oom => (
            topics::TASK_OOM_EVENT_TOPIC,
            Box::new(TaskOOM {
                container_id,
                ..Default::default()
            }),
        ),
    }
}

/// The time as ttrpc messages carry it.
pub(crate) fn timestamp(time: SystemTime) -> Timestamp {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use async_trait::async_trait;
    use containerd_shim_protos::api::Empty;
    use containerd_shim_protos::shim_async::{Events, create_events};
    use protobuf::Message;
    use std::sync::Arc;
    use ttrpc::asynchronous::{Server, TtrpcContext};

    use super::*;

    struct Containerd(mpsc::UnboundedSender<Envelope>);

    #[async_trait]
    impl Events for Containerd {
        async fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
            self.0.send(request.envelope.unwrap()).unwrap();
            Ok(Empty::new())
        }
    }

    fn event(kind: TaskEventKind) -> TaskEvent {
        TaskEvent {
            namespace: "k8s.io".to_owned(),
            container_id: "c1".to_owned(),
            kind,
        }
    }

    #[tokio::test]
    async fn events_reach_containerd_in_order_and_survive_its_absence() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("containerd.sock.ttrpc");
        let sink = EventSink::to_containerd(&socket);
        // Nobody listens yet: this one is lost, the daemon goes on.
        sink.send(event(TaskEventKind::Start { pid: 1 }));
        while sink.0.as_ref().unwrap().capacity() < BACKLOG {
            tokio::task::yield_now().await;
        }
        let (sender, mut received) = mpsc::unbounded_channel();
        let mut server = Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .unwrap()
            .register_service(create_events(Arc::new(Containerd(sender))));
        server.start().await.unwrap();
        sink.send(event(TaskEventKind::Oom));
        sink.send(event(TaskEventKind::Exit {
            exec_id: String::new(),
            pid: 7,
            exit: Exit::now(137),
        }));
        let mut envelopes = Vec::new();
        while envelopes.len() < 2 {
            let envelope = tokio::time::timeout(LIMIT, received.recv()).await;
            let envelope = envelope.unwrap().unwrap();
            if envelope.topic != "/tasks/start" {
                envelopes.push(envelope);
            }
        }
        assert_eq!(envelopes[0].topic, "/tasks/oom");
        assert_eq!(envelopes[0].namespace, "k8s.io");
        assert_eq!(envelopes[0].event.type_url, "containerd.events.TaskOOM");
        assert_eq!(envelopes[1].topic, "/tasks/exit");
        let exit = TaskExit::parse_from_bytes(&envelopes[1].event.value).unwrap();
        assert_eq!((exit.id.as_str(), exit.exit_status), ("c1", 137));
    }
}
