//! Calls into libcontainer. They block: the agent has one thread and forks from it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use libcontainer::container::Container;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::hooks;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use tracing::warn;

use super::bundle::Bundle;
use super::executor::GuestExecutor;
use crate::error::AgentError;
use crate::stdio::ProcessEnds;
use crate::sys;

/// Runs `call`; neither an error nor a panic of the library gets past it.
fn guarded<T>(
    what: &str,
    call: impl FnOnce() -> Result<T, LibcontainerError>,
) -> Result<T, AgentError> {
    let why = match catch_unwind(AssertUnwindSafe(call)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(e)) => chain(&e),
        Err(_) => "the runtime panicked".to_owned(),
    };
    if let Err(e) = sys::close_packet_sockets() {
        warn!("descriptors of a failed call stay open: {e}");
    }
    Err(AgentError::Runtime(format!("{what}: {why}")))
}

/// An error with its causes; libcontainer's outer messages often say nothing.
fn chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(e) = cause {
        let inner = e.to_string();
        if !text.ends_with(&inner) {
            text.push_str(": ");
            text.push_str(&inner);
        }
        cause = e.source();
    }
    text
}

fn builder(
    id: &str,
    bundle: &Bundle,
    executor: GuestExecutor,
    ends: ProcessEnds,
) -> Result<(ContainerBuilder, Option<crate::stdio::ConsoleSocket>), LibcontainerError> {
    let builder = ContainerBuilder::new(id.to_owned(), SyscallType::Linux)
        .with_executor(executor)
        .with_root_path(bundle.state_root())?;
    Ok(match ends {
        ProcessEnds::Files {
            stdin,
            stdout,
            stderr,
        } => {
            let builder = builder
                .with_stdin(stdin)
                .with_stdout(stdout)
                .with_stderr(stderr);
            (builder, None)
        }
        ProcessEnds::Terminal(socket) => {
            let builder = builder.with_console_socket(Some(socket.path()));
            (builder, Some(socket))
        }
    })
}

/// Creates a container up to the point where it waits to be started.
pub fn create(
    id: &str,
    bundle: &Bundle,
    executor: GuestExecutor,
    ends: ProcessEnds,
) -> Result<(Container, i32, Option<crate::stdio::ConsoleSocket>), AgentError> {
    let (container, console) = guarded("creating the container", || {
        let (builder, console) = builder(id, bundle, executor, ends)?;
        let container = builder.as_init(bundle.path()).with_systemd(false).build()?;
        Ok((container, console))
    })?;
    let pid = container.pid().map(|p| p.as_raw()).filter(|p| *p > 0);
    let pid = pid.ok_or_else(|| AgentError::Runtime("the container has no pid".to_owned()))?;
    Ok((container, pid, console))
}

/// Lets a created container execute its program.
pub fn start(container: &mut Container) -> Result<(), AgentError> {
    guarded("starting the container", || container.start())
}

/// Runs another process in a container. It has executed its program on return.
pub fn exec(
    id: &str,
    bundle: &Bundle,
    process: &Path,
    executor: GuestExecutor,
    ends: ProcessEnds,
) -> Result<(i32, Option<crate::stdio::ConsoleSocket>), AgentError> {
    guarded("executing in the container", || {
        let (builder, console) = builder(id, bundle, executor, ends)?;
        let tenant = builder
            .as_tenant()
            .with_detach(true)
            .with_process(Some(process));
        Ok((tenant.build()?.as_raw(), console))
    })
}

/// Runs the hooks that follow a container's end. Failures do not stop its removal.
pub fn run_poststop(container: &Container, spec: &Spec) -> Result<(), AgentError> {
    let Some(hooks) = spec.hooks() else {
        return Ok(());
    };
    guarded("poststop hooks", || {
        let list = hooks.poststop().as_ref();
        hooks::run_hooks(list, Some(&container.state), None, None, None)?;
        Ok(())
    })
}
