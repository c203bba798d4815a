//! `kuasar-ctl exec`: another process in a running container.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::args::{ExecArgs, Global, ProcessArgs};
use super::attend::Attended;
use super::client::{ProcessName, Task};
use super::error::{CliError, Doing, KILLED, Result};
use super::output::Steps;
use super::pods::{Found, find};
use super::root::resolve_user;
use super::run::{environment, new_id};
use super::signals::Signals;
use super::spec::ProcessSpec;
use super::stdio::{Fifos, fifo_dir};
use super::store::state_root;
use super::terminal;

/// Runs a process: the exit code for this process.
pub(super) async fn exec(global: &Global, args: ExecArgs) -> Result<u8> {
    terminal::check(args.process.interactive, args.process.tty)?;
    let mut signals = Signals::new()?;
    let found = find(global, &args.pod).await?;
    let task = found.task().await?;
    let name = ProcessName {
        container: found.container(args.container.as_deref())?,
        exec: new_id(),
    };
    let process = process(&args, &found, &task, &name.container).await?;
    let dir = fifo_dir(&state_root())?;
    let (interactive, tty) = (args.process.interactive, args.process.tty);
    let fifos = Fifos::create(dir.path(), interactive, tty)?;
    task.exec(&name, &process, fifos.names()).await?;
    let attended = Attended {
        task: &task,
        name: &name,
        program: args.command.first().map_or("", String::as_str),
        tty,
        interactive,
        timeout: args.process.timeout,
    };
    let ended = attended
        .run(fifos, &mut signals, &Steps::new(global.verbose))
        .await;
    let deleted = task.delete(&name).await;
    match ended {
        // A process that was killed, or one whose pod ended under it.
        Ok(KILLED) => match Found::load(found.pod.clone()).await?.failed() {
            Some(reason) => Err(pod_ended(&reason, &args.pod)),
            None => deleted.map(|()| KILLED),
        },
        Ok(code) => deleted.map(|()| code),
        Err(e) => Err(e),
    }
}

/// The pod, not the process, is why there is no exit code.
fn pod_ended(reason: &str, pod: &str) -> CliError {
    CliError::new(format!("the pod ended meanwhile: {reason}"))
        .next(format!("`kuasar-ctl logs --console {pod}` shows why"))
}

/// The container's own first process, changed where the user says so.
async fn process(args: &ExecArgs, found: &Found, task: &Task, container: &str) -> Result<Value> {
    let first = ProcessName {
        container: container.to_owned(),
        exec: String::new(),
    };
    let state = task.state(&first).await?;
    let config = Path::new(&state.bundle).join("config.json");
    let text = fs::read(&config).doing(|| format!("read {}", config.display()))?;
    let spec: Value =
        serde_json::from_slice(&text).doing(|| format!("understand {}", config.display()))?;
    let base = spec.get("process").cloned().unwrap_or_else(|| json!({}));
    change(base, &args.process, &args.command, &found.layers())
}

fn change(
    mut base: Value,
    args: &ProcessArgs,
    command: &[String],
    layers: &[PathBuf],
) -> Result<Value> {
    let env = base
        .get("env")
        .and_then(Value::as_array)
        .into_iter()
        .flatten();
    let env = env.filter_map(|e| e.as_str().map(str::to_owned)).collect();
    let mut wanted = ProcessSpec {
        args: command.to_vec(),
        env: environment(args, env)?,
        tty: args.tty,
        ..ProcessSpec::default()
    };
    if let Some(user) = &args.user {
        wanted.user = resolve_user(user, layers)?;
        // The home folder belongs to the user, not to the container.
        if !args.env.iter().any(|e| e.split('=').next() == Some("HOME")) {
            wanted.env.retain(|e| !e.starts_with("HOME="));
        }
    }
    let wanted = wanted.to_json();
    let Some(process) = base.as_object_mut() else {
        return Err(CliError::new("the container's config.json has no process"));
    };
    let mut keys = vec!["args", "env", "terminal"];
    if args.user.is_some() {
        keys.push("user");
    }
    for key in keys {
        if let Some(value) = wanted.get(key) {
            process.insert(key.to_owned(), value.clone());
        }
    }
    if args.user.is_some() {
        limit_capabilities(process);
    }
    if let Some(cwd) = &args.workdir {
        process.insert("cwd".to_owned(), json!(cwd));
    }
    Ok(base)
}

/// A user other than root has what the bounding set allows only to gain, not to begin with.
fn limit_capabilities(process: &mut serde_json::Map<String, Value>) {
    let uid = process
        .get("user")
        .and_then(|u| u.get("uid"))
        .and_then(Value::as_u64);
    let Some(capabilities) = process
        .get_mut("capabilities")
        .and_then(Value::as_object_mut)
    else {
        return;
    };
    let held = match uid {
        Some(0) => capabilities
            .get("bounding")
            .cloned()
            .unwrap_or_else(|| json!([])),
        _ => json!([]),
    };
    for set in ["effective", "permitted"] {
        capabilities.insert(set.to_owned(), held.clone());
    }
    for set in ["inheritable", "ambient"] {
        capabilities.insert(set.to_owned(), json!([]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Value {
        json!({
            "args": ["/old"], "env": ["A=1", "HOME=/root"], "cwd": "/old", "terminal": true,
            "user": {"uid": 0, "gid": 0}, "noNewPrivileges": true, "rlimits": [{"type": "X"}],
            "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"]},
        })
    }

    fn changed(args: &ProcessArgs) -> Value {
        change(base(), args, &["/new".to_owned()], &[]).unwrap()
    }

    #[test]
    fn only_what_is_asked_for_changes() {
        let process = changed(&ProcessArgs::default());
        assert_eq!(process["args"], json!(["/new"]));
        assert_eq!(process["cwd"], "/old");
        assert_eq!(process["terminal"], false);
        assert_eq!(process["user"], base()["user"]);
        assert_eq!(process["rlimits"], base()["rlimits"]);
        assert_eq!(process["capabilities"], base()["capabilities"]);
        assert_eq!(process["noNewPrivileges"], true);
        assert_eq!(process["env"][0], "A=1");
    }

    #[test]
    fn another_user_has_no_capabilities_and_another_home() {
        let process = changed(&ProcessArgs {
            user: Some("1000:1000".parse().unwrap()),
            env: vec!["A=2".to_owned()],
            workdir: Some("/tmp".to_owned()),
            ..ProcessArgs::default()
        });
        assert_eq!(process["user"]["uid"], 1000);
        assert_eq!(process["cwd"], "/tmp");
        assert_eq!(process["capabilities"]["effective"], json!([]));
        assert_eq!(process["capabilities"]["bounding"], json!(["CAP_KILL"]));
        let env: Vec<&str> = process["env"]
            .as_array()
            .unwrap()
            .iter()
            .map(|e| e.as_str().unwrap())
            .collect();
        assert!(env.contains(&"A=2") && env.contains(&"HOME=/"), "{env:?}");
        assert!(!env.contains(&"HOME=/root"));
    }
}
