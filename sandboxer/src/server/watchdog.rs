//! systemd's watchdog, answered only while the daemon answers.

use std::path::Path;
use std::time::Duration;

use tonic::Status;
use tonic::transport::Endpoint;
use tracing::warn;

use crate::rpc::controller::ControllerPlatformRequest;
use crate::rpc::controller::controller_client::ControllerClient;

/// If systemd watches this process, asks the daemon on `address` for its platform twice in each
/// interval, as containerd would, and tells systemd each time it answers. Never returns then.
pub async fn answer_watchdog(address: &Path) {
    let Some(interval) = sd_notify::watchdog_enabled() else {
        return;
    };
    let mut ticks = tokio::time::interval(interval / 2);
    loop {
        ticks.tick().await;
        match ask(address, interval / 4).await {
            Ok(()) => {
                if let Err(e) = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]) {
                    warn!("cannot tell systemd that the daemon is well: {e}");
                }
            }
            Err(status) => warn!("the daemon does not answer itself: {}", status.message()),
        }
    }
}

/// Over a new connection each time: taking one is part of what has to work.
async fn ask(address: &Path, limit: Duration) -> Result<(), Status> {
    let asked = async {
        let channel = Endpoint::from_shared(format!("unix://{}", address.display()))
            .map_err(|e| Status::internal(e.to_string()))?
            .connect_lazy();
        let request = ControllerPlatformRequest::default();
        ControllerClient::new(channel).platform(request).await
    };
    tokio::time::timeout(limit, asked)
        .await
        .unwrap_or_else(|_| Err(Status::deadline_exceeded(format!("over {limit:?}"))))
        .map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_daemon_that_is_not_there_is_not_well() {
        let nowhere = Path::new("/nonexistent/socket");
        ask(nowhere, Duration::from_secs(5)).await.unwrap_err();
    }
}
