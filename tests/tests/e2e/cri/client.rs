//! The CRI client, and pods that take themselves away.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use casemate_tests::operator;
use casemate_tests::run::until;
use casemate_tests::skip::{Outcome, Stop, fail};
use casemate_tests::{Failure, leaks, world};
use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::*;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use super::{Cri, config};

/// The most that any call may take; the kubelet's own limit is two minutes.
const LIMIT: Duration = Duration::from_secs(60);

/// What a command in a container came to.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub out: String,
    pub err: String,
}

type Runtime = RuntimeServiceClient<Channel>;

/// One call on a connection of its own: a daemon's restart cuts none off.
pub fn connected<T>(
    socket: &Path,
    name: &str,
    call: impl AsyncFnOnce(Channel) -> Result<Response<T>, Status>,
) -> casemate_tests::Result<T> {
    let wrong = |why: String| Failure::Unexpected(format!("{name}: {why}"));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| wrong(e.to_string()))?;
    let socket = format!("unix://{}", socket.display());
    runtime.block_on(async {
        let work = async {
            let channel = Endpoint::from_shared(socket)
                .map_err(|e| wrong(e.to_string()))?
                .connect()
                .await
                .map_err(|e| wrong(format!("{e:?}")))?;
            call(channel)
                .await
                .map(Response::into_inner)
                .map_err(|s| wrong(format!("{:?}: {}", s.code(), s.message())))
        };
        tokio::time::timeout(LIMIT, work)
            .await
            .map_err(|_| wrong(format!("no answer in {} s", LIMIT.as_secs())))?
    })
}

impl Cri {
    fn connected<T>(
        &self,
        name: &str,
        call: impl AsyncFnOnce(Channel) -> Result<Response<T>, Status>,
    ) -> casemate_tests::Result<T> {
        connected(&self.node.daemon.address(), name, call)
    }

    /// A call of the runtime service.
    pub fn call<T>(
        &self,
        name: &str,
        call: impl AsyncFnOnce(Runtime) -> Result<Response<T>, Status>,
    ) -> casemate_tests::Result<T> {
        self.connected(name, async |channel| {
            call(Runtime::new(channel).max_decoding_message_size(16 << 20)).await
        })
    }

    /// Waits until CRI and its network are ready, as after a start.
    pub fn answers(&self) -> Outcome {
        let status = || {
            let request = StatusRequest { verbose: false };
            let call = async |mut c: Runtime| c.status(request).await;
            let mut conditions = self
                .call("Status", call)?
                .status
                .unwrap_or_default()
                .conditions;
            // Others are advice, as on cgroup v1.
            conditions.retain(|c| c.r#type.ends_with("Ready"));
            Ok::<_, Failure>(conditions)
        };
        let ready = until("CRI to be ready", Duration::from_secs(30), || {
            status().is_ok_and(|all| !all.is_empty() && all.iter().all(|c| c.status))
        });
        match ready {
            Ok(_) => Ok(()),
            Err(error) => fail(format!("{error}: {:?}", status())),
        }
    }

    /// What the image service knows of an image.
    pub fn image(&self, image: &str) -> casemate_tests::Result<Option<Image>> {
        let spec = ImageSpec {
            image: image.to_owned(),
            ..Default::default()
        };
        let request = ImageStatusRequest {
            image: Some(spec),
            verbose: false,
        };
        let reply = self.connected("ImageStatus", async |channel| {
            ImageServiceClient::new(channel).image_status(request).await
        })?;
        Ok(reply.image)
    }

    /// A pod as [`config::pod`] has it.
    pub fn pod(&self, name: &str) -> Result<Pod<'_>, Stop> {
        self.pod_with(config::pod(self, name))
    }

    /// A pod with this configuration.
    pub fn pod_with(&self, config: PodSandboxConfig) -> Result<Pod<'_>, Stop> {
        // The stock runtime, when the run compares with it.
        let stock = (!self.world.is_casemate()).then_some("runc");
        self.pod_of(stock.unwrap_or("casemate"), config)
    }

    /// A pod of this runtime class.
    pub fn pod_of(&self, handler: &str, config: PodSandboxConfig) -> Result<Pod<'_>, Stop> {
        let logs = PathBuf::from(&config.log_directory);
        fs::create_dir_all(&logs)?;
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: handler.to_owned(),
        };
        let reply = self.call("RunPodSandbox", async |mut c| {
            c.run_pod_sandbox(request).await
        })?;
        Ok(Pod {
            cri: self,
            id: reply.pod_sandbox_id,
            config,
            posture: handler != "runc",
            stopped: Cell::new(false),
            gone: false,
        })
    }

    /// The text with which a pod of this configuration is refused.
    pub fn refusal(&self, config: PodSandboxConfig) -> Result<String, Stop> {
        match self.pod_with(config) {
            Ok(pod) => {
                pod.remove()?;
                fail("the pod was accepted")
            }
            Err(Stop::Fail(why)) => Ok(why),
            Err(other) => Err(other),
        }
    }
}

/// A pod that runs; removed when dropped.
pub struct Pod<'a> {
    pub cri: &'a Cri,
    pub id: String,
    pub config: PodSandboxConfig,
    /// [`Pod::remove`] fails if the pod isn't as its shim promised. For tests that
    /// change it from outside, or end its shim: `false`.
    pub posture: bool,
    stopped: Cell<bool>,
    gone: bool,
}

impl Pod<'_> {
    /// Makes a container, not started.
    pub fn create(&self, config: ContainerConfig) -> casemate_tests::Result<String> {
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let call = async |mut c: Runtime| c.create_container(request).await;
        Ok(self.cri.call("CreateContainer", call)?.container_id)
    }

    /// Starts a container.
    pub fn start(&self, id: &str) -> casemate_tests::Result<()> {
        let request = StartContainerRequest {
            container_id: id.to_owned(),
        };
        let call = async |mut c: Runtime| c.start_container(request).await;
        self.cri.call("StartContainer", call).map(|_| ())
    }

    /// Makes and starts a container; its id.
    pub fn run(&self, config: ContainerConfig) -> Result<String, Stop> {
        let id = self.create(config)?;
        self.start(&id)?;
        Ok(id)
    }

    /// A container that sleeps.
    pub fn sleeper(&self, name: &str) -> Result<String, Stop> {
        self.run(config::container(name, &["/bin/probe", "sleep"]))
    }

    /// Runs a container to its end; exit code and standard output.
    pub fn to_end(&self, config: ContainerConfig) -> Result<Ran, Stop> {
        let id = self.create(config)?;
        self.start(&id)?;
        let status = self.ended(&id)?;
        Ok(Ran {
            code: status.exit_code,
            out: self.log(&status, "stdout"),
            err: self.log(&status, "stderr"),
        })
    }

    /// Runs a shell script in a fresh container, changed by `change`; its
    /// output. An exit code other than 0 fails the test.
    pub fn sh(
        &self,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut ContainerConfig),
    ) -> Result<String, Stop> {
        let mut config = config::container(name, &["/bin/sh", "-c", script]);
        change(&mut config);
        let ran = self.to_end(config)?;
        if ran.code != 0 {
            return fail(format!("{script}: {ran:?}"));
        }
        Ok(ran.out)
    }

    /// The text with which a container is refused, at creation or at start.
    pub fn refusal(&self, config: ContainerConfig) -> Result<String, Stop> {
        let id = match self.create(config) {
            Ok(id) => id,
            Err(error) => return Ok(error.to_string()),
        };
        match self.start(&id) {
            Ok(()) => fail("the container was accepted"),
            Err(error) => Ok(error.to_string()),
        }
    }

    /// A container's state.
    pub fn status(&self, id: &str) -> casemate_tests::Result<ContainerStatus> {
        let request = ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: false,
        };
        let call = async |mut c: Runtime| c.container_status(request).await;
        let reply = self.cri.call("ContainerStatus", call)?;
        reply
            .status
            .ok_or_else(|| Failure::Unexpected("ContainerStatus without one".to_owned()))
    }

    /// The host's pid of a container's first process.
    pub fn pid(&self, id: &str) -> Result<u32, Stop> {
        let request = ContainerStatusRequest {
            container_id: id.to_owned(),
            verbose: true,
        };
        let call = async |mut c: Runtime| c.container_status(request).await;
        let info = self.cri.call("ContainerStatus", call)?.info;
        let text = info.get("info").map(String::as_str).unwrap_or_default();
        let info: serde_json::Value = serde_json::from_str(text)?;
        match info["pid"].as_u64().map(u32::try_from) {
            Some(Ok(pid)) if pid > 0 => Ok(pid),
            _ => fail(format!("no pid in {info}")),
        }
    }

    /// Waits until a container has exited.
    pub fn ended(&self, id: &str) -> casemate_tests::Result<ContainerStatus> {
        let exited = ContainerState::ContainerExited as i32;
        until("a container to exit", LIMIT, || {
            self.status(id).is_ok_and(|s| s.state == exited)
        })?;
        self.status(id)
    }

    /// What a container wrote to `stream`, from the log file in CRI's form.
    pub fn log(&self, status: &ContainerStatus, stream: &str) -> String {
        let lines = || fs::read_to_string(&status.log_path).unwrap_or_default();
        let mut text = String::new();
        for line in lines().lines() {
            let mut parts = line.splitn(4, ' ').skip(1);
            if parts.next() == Some(stream) {
                let whole = parts.next() == Some("F");
                text.push_str(parts.next().unwrap_or_default());
                if whole {
                    text.push('\n');
                }
            }
        }
        text
    }

    /// Runs a command in a container and waits for it.
    pub fn exec(&self, id: &str, args: &[&str]) -> casemate_tests::Result<Ran> {
        let request = ExecSyncRequest {
            container_id: id.to_owned(),
            cmd: args.iter().map(|a| (*a).to_owned()).collect(),
            timeout: 30,
        };
        let reply = self
            .cri
            .call("ExecSync", async |mut c| c.exec_sync(request).await)?;
        Ok(Ran {
            code: reply.exit_code,
            out: String::from_utf8_lossy(&reply.stdout).into_owned(),
            err: String::from_utf8_lossy(&reply.stderr).into_owned(),
        })
    }

    /// The output of a shell script run in a container; it must succeed.
    pub fn exec_sh(&self, id: &str, script: &str) -> Result<String, Stop> {
        let ran = self.exec(id, &["/bin/sh", "-c", script])?;
        if ran.code != 0 {
            return fail(format!("exec {script}: {ran:?}"));
        }
        Ok(ran.out)
    }

    /// Ends a container, by SIGTERM and after `seconds` by SIGKILL.
    pub fn stop_container(&self, id: &str, seconds: i64) -> casemate_tests::Result<()> {
        let request = StopContainerRequest {
            container_id: id.to_owned(),
            timeout: seconds,
        };
        let call = async |mut c: Runtime| c.stop_container(request).await;
        self.cri.call("StopContainer", call).map(|_| ())
    }

    /// Removes a container.
    pub fn remove_container(&self, id: &str) -> casemate_tests::Result<()> {
        let request = RemoveContainerRequest {
            container_id: id.to_owned(),
        };
        let call = async |mut c: Runtime| c.remove_container(request).await;
        self.cri.call("RemoveContainer", call).map(|_| ())
    }

    /// The pod's state, and with `verbose` the daemon's own view of it.
    pub fn sandbox(&self, verbose: bool) -> casemate_tests::Result<PodSandboxStatusResponse> {
        let request = PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose,
        };
        let call = async |mut c: Runtime| c.pod_sandbox_status(request).await;
        self.cri.call("PodSandboxStatus", call)
    }

    /// The pod's address.
    pub fn ip(&self) -> Result<String, Stop> {
        let status = self.sandbox(false)?.status.unwrap_or_default();
        match status.network {
            Some(network) if !network.ip.is_empty() => Ok(network.ip),
            other => fail(format!("the pod's network: {other:?}")),
        }
    }

    /// Stops the pod with all in it, which must be as promised until then.
    pub fn stop(&self) -> casemate_tests::Result<()> {
        if self.posture && !self.stopped.get() {
            operator::expect_pod_as_promised(&self.id)?;
        }
        self.end()
    }

    fn end(&self) -> casemate_tests::Result<()> {
        self.stopped.set(true);
        let request = StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        let call = async |mut c: Runtime| c.stop_pod_sandbox(request).await;
        self.cri.call("StopPodSandbox", call).map(|_| ())
    }

    fn take_away(&mut self) -> casemate_tests::Result<()> {
        self.gone = true;
        self.end()?;
        let request = RemovePodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        let call = async |mut c: Runtime| c.remove_pod_sandbox(request).await;
        self.cri.call("RemovePodSandbox", call)?;
        config::remove_cgroups(&self.config);
        Ok(())
    }

    /// Stops and removes the pod, which must be as promised until then; nothing of it
    /// may be left on the host.
    pub fn remove(mut self) -> Outcome {
        if self.posture && !self.stopped.get() {
            operator::expect_pod_as_promised(&self.id)?;
        }
        self.take_away()?;
        let id = self.id.clone();
        let _ = until("a clean host", Duration::from_secs(5), || {
            leaks::with_mark(&id).is_empty()
        });
        let left = leaks::with_mark(&id);
        if left.is_empty() {
            return Ok(());
        }
        fail(format!("left of the pod: {}", left.join("; ")))
    }
}

impl Drop for Pod<'_> {
    fn drop(&mut self) {
        if !self.gone {
            let _ = self.take_away();
        }
    }
}

/// A directory of this test in the scratch directory, open to all.
pub fn directory(cri: &Cri, name: &str) -> Result<PathBuf, Stop> {
    let dir = cri.world.dir().join(cri.world.id(name));
    fs::create_dir_all(&dir)?;
    world::set_mode(&dir, 0o755)?;
    Ok(dir)
}
