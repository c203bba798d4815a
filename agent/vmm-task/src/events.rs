//! Events for the host: one subscriber, the latest.

use agent_api::rpc::{Event, Exit, ExitStatus, Oom, ProcessRef, event};
use tokio::sync::mpsc;
use tracing::warn;

use crate::stdio::ProcessName;

/// Events a subscriber may leave unread before it is dropped.
const BACKLOG: usize = 1024;

/// Where events go.
#[derive(Debug, Default)]
pub struct Events {
    subscriber: Option<mpsc::Sender<Event>>,
}

impl Events {
    /// A new subscriber, first told `replay`; the one before it ends.
    pub fn subscribe(&mut self, replay: Vec<Event>) -> mpsc::Receiver<Event> {
        let (sender, receiver) = mpsc::channel(BACKLOG.saturating_add(replay.len()));
        for event in replay {
            // There is room for every one.
            let _ = sender.try_send(event);
        }
        self.subscriber = Some(sender);
        receiver
    }

    /// Tells the subscriber, if there is one that keeps up.
    pub fn publish(&mut self, event: Event) {
        let Some(subscriber) = &self.subscriber else {
            return;
        };
        if let Err(e) = subscriber.try_send(event) {
            if matches!(e, mpsc::error::TrySendError::Full(_)) {
                warn!("the host leaves {BACKLOG} events unread: it has to subscribe again");
            }
            self.subscriber = None;
        }
    }
}

/// The reference of a process in messages.
pub fn process_ref(name: &ProcessName) -> ProcessRef {
    ProcessRef {
        container_id: name.container.clone(),
        exec_id: name.exec.clone(),
        ..Default::default()
    }
}

/// An exit event.
pub fn exit(name: &ProcessName, status: ExitStatus) -> Event {
    wrap(event::Kind::Exit(Exit {
        process: Some(process_ref(name)).into(),
        status: Some(status).into(),
        ..Default::default()
    }))
}

/// An out-of-memory event.
pub fn oom(container: &str) -> Event {
    wrap(event::Kind::Oom(Oom {
        container_id: container.to_owned(),
        ..Default::default()
    }))
}

/// An event of any kind.
pub fn wrap(kind: event::Kind) -> Event {
    Event {
        kind: Some(kind),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replay_comes_first_and_a_new_subscriber_replaces_the_old() {
        let mut events = Events::default();
        events.publish(oom("lost"));
        let mut first = events.subscribe(vec![oom("a")]);
        events.publish(oom("b"));
        assert_eq!(first.try_recv().unwrap(), oom("a"));
        assert_eq!(first.try_recv().unwrap(), oom("b"));
        let mut second = events.subscribe(Vec::new());
        events.publish(oom("c"));
        first.try_recv().unwrap_err();
        assert_eq!(second.try_recv().unwrap(), oom("c"));
    }

    #[test]
    fn a_subscriber_that_does_not_read_is_dropped() {
        let mut events = Events::default();
        let mut unread = events.subscribe(Vec::new());
        for _ in 0..=BACKLOG {
            events.publish(oom("x"));
        }
        let mut got = 0;
        while unread.try_recv().is_ok() {
            got += 1;
        }
        assert_eq!(got, BACKLOG);
        assert!(matches!(
            unread.try_recv(),
            Err(mpsc::error::TryRecvError::Disconnected)
        ));
    }
}
