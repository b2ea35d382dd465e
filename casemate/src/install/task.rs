//! Containers by containerd's own services, a call for each step.

use std::path::Path;
use std::time::Duration;

use tonic::Status;

use super::grpc::{
    Any, Client, Container, CreateContainer, CreateTask, CreateTaskResponse, Empty, ExecProcess,
    KillTask, Mount, Named, OfProcess, OfTask, Runtime, VersionResponse, WaitResponse, wrong,
};
use crate::Run;
use crate::bundle;
use crate::error::RunError;

/// Of the specification of a container (containerd's typeurl).
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
const LIMIT: Duration = Duration::from_secs(30);

/// containerd, in a namespace of its own.
pub struct Daemon {
    client: Client,
    namespace: String,
}

/// A process to run in a container.
pub struct Exec<'a> {
    /// Whose.
    pub container: &'a str,
    /// Its id.
    pub id: &'a str,
    /// What the container was made with.
    pub options: &'a Run,
    /// Its arguments.
    pub args: &'a [&'a str],
}

fn of(id: &str) -> OfTask {
    OfTask {
        container_id: id.to_owned(),
    }
}

impl Daemon {
    /// Connects.
    pub fn connect(address: &Path, namespace: &str) -> Result<Self, RunError> {
        Ok(Self {
            client: Client::new(address, namespace)?,
            namespace: namespace.to_owned(),
        })
    }

    /// Which release answers.
    pub fn version(&mut self) -> Result<String, RunError> {
        let path = "/containerd.services.version.v1.Version/Version";
        let said: Result<VersionResponse, Status> = self.client.call(path, Empty {}, LIMIT);
        said.map(|said| said.version)
            .map_err(wrong("ask containerd for its version"))
    }

    /// Writes a container down.
    pub fn container(&mut self, id: &str, runtime: &str, options: &Run) -> Result<(), RunError> {
        let request = CreateContainer {
            container: Some(Container {
                id: id.to_owned(),
                runtime: Some(Runtime {
                    name: runtime.to_owned(),
                }),
                spec: Some(Any {
                    type_url: SPEC.to_owned(),
                    value: bundle::spec(options, id).to_string().into_bytes(),
                }),
            }),
        };
        let path = "/containerd.services.containers.v1.Containers/Create";
        self.client
            .call::<_, Empty>(path, request, LIMIT)
            .map(drop)
            .map_err(wrong("make a container"))
    }

    /// Has it made, its root read-only; the pid of its first process.
    pub fn create(&mut self, id: &str, root: &Path) -> Result<u32, RunError> {
        let request = CreateTask {
            container_id: id.to_owned(),
            rootfs: vec![Mount {
                kind: "bind".to_owned(),
                source: root.display().to_string(),
                options: vec!["rbind".to_owned(), "ro".to_owned()],
                ..Mount::default()
            }],
        };
        let path = "/containerd.services.tasks.v1.Tasks/Create";
        self.client
            .call::<_, CreateTaskResponse>(path, request, LIMIT)
            .map(|made| made.pid)
            .map_err(wrong("make a task"))
    }

    /// Starts it.
    pub fn start(&mut self, id: &str) -> Result<(), RunError> {
        let path = "/containerd.services.tasks.v1.Tasks/Start";
        self.client
            .call::<_, Empty>(path, of(id), LIMIT)
            .map(drop)
            .map_err(wrong("start a task"))
    }

    /// Runs a process in it to the end, which must be a good one.
    pub fn exec(&mut self, exec: &Exec<'_>) -> Result<(), RunError> {
        let mut process = bundle::spec(exec.options, exec.container)["process"].clone();
        process["args"] = exec.args.into();
        let request = ExecProcess {
            container_id: exec.container.to_owned(),
            spec: Some(Any {
                type_url: PROCESS.to_owned(),
                value: process.to_string().into_bytes(),
            }),
            exec_id: exec.id.to_owned(),
        };
        let path = "/containerd.services.tasks.v1.Tasks/Exec";
        self.client
            .call::<_, Empty>(path, request, LIMIT)
            .map_err(wrong("make an exec"))?;
        let of = OfProcess {
            container_id: exec.container.to_owned(),
            exec_id: exec.id.to_owned(),
        };
        let path = "/containerd.services.tasks.v1.Tasks/Start";
        self.client
            .call::<_, Empty>(path, of.clone(), LIMIT)
            .map_err(wrong("start an exec"))?;
        let path = "/containerd.services.tasks.v1.Tasks/Wait";
        let ended: WaitResponse = self
            .client
            .call(path, of.clone(), LIMIT)
            .map_err(wrong("wait for an exec"))?;
        let path = "/containerd.services.tasks.v1.Tasks/DeleteProcess";
        self.client
            .call::<_, Empty>(path, of, LIMIT)
            .map_err(wrong("delete an exec"))?;
        match ended.exit_status {
            0 => Ok(()),
            status => Err(RunError::Refused(format!(
                "exec {:?}: exit status {status}",
                exec.args
            ))),
        }
    }

    /// Kills it, and takes its task away.
    pub fn end(&mut self, id: &str) -> Result<(), RunError> {
        let kill = KillTask {
            container_id: id.to_owned(),
            signal: 9,
            all: true,
        };
        let path = "/containerd.services.tasks.v1.Tasks/Kill";
        self.client
            .call::<_, Empty>(path, kill, LIMIT)
            .map_err(wrong("kill a task"))?;
        let path = "/containerd.services.tasks.v1.Tasks/Wait";
        self.client
            .call::<_, WaitResponse>(path, of(id), LIMIT)
            .map_err(wrong("wait for a task"))?;
        let path = "/containerd.services.tasks.v1.Tasks/Delete";
        self.client
            .call::<_, Empty>(path, of(id), LIMIT)
            .map(drop)
            .map_err(wrong("delete a task"))
    }

    /// Takes away what is there of it, from wherever it got to.
    pub fn clean(&mut self, id: &str) {
        let path = "/containerd.services.tasks.v1.Tasks/Delete";
        if self.client.call::<_, Empty>(path, of(id), LIMIT).is_err() {
            // As where there is no task.
            let _gone = self.end(id);
        }
        let path = "/containerd.services.containers.v1.Containers/Delete";
        let named = Named {
            name: id.to_owned(),
        };
        let _gone = self.client.call::<_, Empty>(path, named, LIMIT);
    }

    /// The namespace goes, if nothing is in it.
    pub fn forget_namespace(&mut self) {
        let path = "/containerd.services.namespaces.v1.Namespaces/Delete";
        let named = Named {
            name: self.namespace.clone(),
        };
        let _kept = self.client.call::<_, Empty>(path, named, LIMIT);
    }
}
