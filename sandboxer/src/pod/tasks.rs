//! The task list that iSulad keeps up to date through the Controller's `Update`.
//!
//! iSulad sends neither rootfs nor spec with Task.Create; they are in this list, which is
//! sent as a whole before each change. It also never deletes an exec: one that leaves the
//! list is forgotten here.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;

use super::error::{PodError, Result};
use super::storage::RootfsMount;
use super::{Pod, lock};

/// Name of the extension, and of the field in an update.
pub const TASKS_EXTENSION: &str = "tasks";

/// Tasks by id.
#[derive(Debug, Default)]
pub(super) struct TaskList {
    tasks: HashMap<String, Task>,
}

#[derive(Debug, Deserialize)]
struct Document {
    #[serde(default)]
    tasks: Vec<Task>,
}

/// A container as iSulad announces it.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Task {
    task_id: String,
    /// OCI spec; absent where the bundle has it.
    #[serde(default)]
    pub(super) spec: Option<Value>,
    #[serde(default)]
    rootfs: Vec<Mount>,
    #[serde(default)]
    processes: Vec<TaskProcess>,
}

#[derive(Clone, Debug, Deserialize)]
struct TaskProcess {
    exec_id: String,
}

#[derive(Clone, Debug, Deserialize)]
struct Mount {
    #[serde(default, rename = "type")]
    fstype: String,
    #[serde(default)]
    source: String,
    #[serde(default)]
    options: Vec<String>,
}

impl Task {
    pub(super) fn rootfs(&self) -> Vec<RootfsMount> {
        self.rootfs
            .iter()
            .map(|mount| RootfsMount {
                fstype: mount.fstype.clone(),
                source: mount.source.clone(),
                target: String::new(),
                options: mount.options.clone(),
            })
            .collect()
    }
}

impl Pod {
    /// Takes over a new task list, JSON as iSulad writes it.
    ///
    /// # Errors
    /// It is not such a document.
    pub async fn update_tasks(&self, json: &[u8]) -> Result<()> {
        let document: Document = serde_json::from_slice(json).map_err(|e| {
            PodError::invalid(
                "sandbox.extensions.tasks",
                e.to_string(),
                "must be a JSON document with a list `tasks`",
            )
        })?;
        let new: HashMap<String, Task> = document
            .tasks
            .into_iter()
            .map(|task| (task.task_id.clone(), task))
            .collect();
        let purged = purged_execs(&lock(&self.tasks).tasks, &new);
        lock(&self.tasks).tasks = new;
        for (container, exec) in purged {
            // An exec that still runs is iSulad's to end; one that is gone is no error.
            let _ = self.delete(&container, &exec).await;
        }
        Ok(())
    }

    pub(super) fn announced_task(&self, id: &str) -> Option<Task> {
        lock(&self.tasks).tasks.get(id).cloned()
    }
}

/// Execs that were in the old list and are not in the new one.
fn purged_execs(old: &HashMap<String, Task>, new: &HashMap<String, Task>) -> Vec<(String, String)> {
    let mut purged = Vec::new();
    for (id, task) in old {
        let kept = new.get(id);
        for process in &task.processes {
            let stays = kept
                .is_some_and(|task| task.processes.iter().any(|p| p.exec_id == process.exec_id));
            if !stays {
                purged.push((id.clone(), process.exec_id.clone()));
            }
        }
    }
    purged
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(json: &str) -> HashMap<String, Task> {
        let document: Document = serde_json::from_str(json).unwrap();
        document
            .tasks
            .into_iter()
            .map(|task| (task.task_id.clone(), task))
            .collect()
    }

    #[test]
    fn execs_that_leave_the_list_are_purged() {
        let old = list(
            r#"{"tasks":[{"task_id":"c1","processes":[{"exec_id":"a"},{"exec_id":"b"}]},
                {"task_id":"c2","processes":[{"exec_id":"x"}]}]}"#,
        );
        let new = list(r#"{"tasks":[{"task_id":"c1","processes":[{"exec_id":"b"}]}]}"#);
        let mut purged = purged_execs(&old, &new);
        purged.sort();
        let names = |c: &str, e: &str| (c.to_owned(), e.to_owned());
        assert_eq!(purged, [names("c1", "a"), names("c2", "x")]);
    }

    #[test]
    fn a_task_brings_rootfs_and_spec() {
        let tasks = list(
            r#"{"tasks":[{"task_id":"c1","spec":{"ociVersion":"1.0"},
                "rootfs":[{"type":"bind","source":"/merged"}]}]}"#,
        );
        let task = tasks.get("c1").unwrap();
        assert_eq!(task.rootfs()[0].source, "/merged");
        assert_eq!(task.spec.as_ref().unwrap()["ociVersion"], "1.0");
    }
}
