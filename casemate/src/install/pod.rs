//! The proof by a pod: as the kubelet would have it, from CRI through the handler, with
//! the node's network and its image of pods.
//!
//! It needs what a node has that has run pods: a network that is ready, and that image,
//! which is not pulled for this. Where that is missing, or fails by itself, it is said,
//! and what was proven by a container without CRI stands: a runtime is often installed
//! before the network is. A kubelet ends pods that it doesn't know, every two seconds
//! (`HandlePodCleanups`): so what fails is tried again.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use casemate_posture::Depth;
use casemate_spec::Class;
use tonic::{Code, Status};

use super::cri::{
    Condition, ContainerConfig, ContainerSecurity, ContainerStatusRequest, ContainerStatusResponse,
    CreateContainerOfPod, Image, ImageSpec, ImageStatusRequest, ImageStatusResponse, Labels,
    LinuxContainer, LinuxPod, ListPods, ListPodsResponse, Metadata, NamespaceOption, PodConfig,
    PodMetadata, PodSecurity, RunPod, StatusRequest, StatusResponse,
};
use super::grpc::{Client, Empty, Named, wrong};
use super::layout::Layout;
use crate::error::{RunError, Step, one_line};
use crate::{operator, posture};

/// containerd's namespace of CRI; it doesn't look at the one that is sent.
const NAMESPACE: &str = "k8s.io";
/// Of pods of the proof.
const LABEL: (&str, &str) = ("casemate.io/proof", "yes");
const NAME: &str = "casemate-proof";
/// In a specification of CRI's.
const NAMESPACE_OF_POD: &str = "/annotations/io.kubernetes.cri.sandbox-namespace";
const LIMIT: Duration = Duration::from_secs(30);
/// How often it is tried.
const TRIES: u32 = 5;
/// Where the directory of a container's log is made: never on a disk.
const LOGS: &str = "/run";
/// Not in step with whoever ends pods.
const PAUSE: Duration = Duration::from_millis(700);
/// `CONTAINER_RUNNING`
const RUNNING: i32 = 1;
/// The pid namespace of a pod's container is its own (`NamespaceMode`).
const OWN: i32 = 1;

/// What came of it.
pub enum Told {
    /// It ran, and was as promised.
    Ran,
    /// It can't be tried on this node, as it is now.
    NotTried(String),
}

/// Why one try failed.
enum Failed {
    /// By what isn't casemate's.
    Elsewhere(String),
    /// By casemate, or by somebody who has ended it.
    Here(RunError),
}

/// Runs a pod with one container by the handler of that class. `image`: the one that
/// containerd begins pods with, if its configuration says one.
///
/// # Errors
/// It ran in none of some tries, or not as promised.
pub fn pod(layout: &Layout, class: Class, image: Option<&str>) -> Result<Told, RunError> {
    let mut client = Client::new(&layout.address, NAMESPACE)?;
    if let Some(reason) = lacks(&mut client, image) {
        return Ok(Told::NotTried(reason));
    }
    let (handler, image) = (layout.handler(class), image.unwrap_or_default());
    // A kubelet that finds the ended container first removes it, and what is at its log's
    // path and `*`: with no path that is what is in its working directory, /bin first
    // where that is /.
    let logs = tempfile::Builder::new()
        .prefix(&format!("{NAME}-{}-", std::process::id()))
        .tempdir_in(LOGS)
        .step("make a directory in", LOGS)?;
    let mut tried = 1;
    loop {
        let reason = match once(&mut client, &handler, image, logs.path(), tried) {
            Ok(()) => return Ok(Told::Ran),
            Err(Failed::Elsewhere(reason)) => return Ok(Told::NotTried(reason)),
            Err(Failed::Here(error)) => error,
        };
        if tried == TRIES {
            return Err(RunError::Refused(format!(
                "{reason}; {TRIES} pods of handler {handler} were tried"
            )));
        }
        tried += 1;
        std::thread::sleep(PAUSE);
    }
}

/// What is missing for a pod of any runtime.
fn lacks(client: &mut Client, image: Option<&str>) -> Option<String> {
    let path = "/runtime.v1.RuntimeService/Status";
    let status: Result<StatusResponse, Status> =
        client.call(path, StatusRequest { verbose: false }, LIMIT);
    let conditions = match status {
        Ok(status) => status.status.unwrap_or_default().conditions,
        Err(status) => return Some(one_line(status.message())),
    };
    // Others are advice, as of what a later containerd will no longer know.
    let isnt = |c: &&Condition| c.kind.ends_with("Ready") && !c.status;
    if let Some(not) = conditions.iter().find(isnt) {
        return Some(format!("{} isn't so: {}", not.kind, one_line(&not.message)));
    }
    let Some(image) = image else {
        return Some("containerd's configuration names no image for pods".to_owned());
    };
    let request = ImageStatusRequest {
        image: Some(spec(image)),
    };
    let path = "/runtime.v1.ImageService/ImageStatus";
    match client.call::<_, ImageStatusResponse>(path, request, LIMIT) {
        Ok(ImageStatusResponse {
            image: Some(Image { id }),
        }) if !id.is_empty() => None,
        Ok(_) => Some(format!("{image} isn't here yet")),
        Err(status) => Some(one_line(status.message())),
    }
}

fn spec(image: &str) -> ImageSpec {
    ImageSpec {
        image: image.to_owned(),
    }
}

fn namespaces() -> NamespaceOption {
    NamespaceOption { pid: OWN }
}

fn config(logs: &Path, number: u32) -> PodConfig {
    PodConfig {
        metadata: Some(PodMetadata {
            name: NAME.to_owned(),
            uid: format!("{NAME}-{}", std::process::id()),
            namespace: NAME.to_owned(),
            attempt: number,
        }),
        hostname: NAME.to_owned(),
        log_directory: logs.display().to_string(),
        labels: HashMap::from([(LABEL.0.to_owned(), LABEL.1.to_owned())]),
        linux: Some(LinuxPod {
            security_context: Some(PodSecurity {
                namespace_options: Some(namespaces()),
            }),
        }),
    }
}

fn once(
    client: &mut Client,
    handler: &str,
    image: &str,
    logs: &Path,
    number: u32,
) -> Result<(), Failed> {
    let config = config(logs, number);
    let request = RunPod {
        config: Some(config.clone()),
        runtime_handler: handler.to_owned(),
    };
    let path = "/runtime.v1.RuntimeService/RunPodSandbox";
    let id = match client.call::<_, Named>(path, request, LIMIT) {
        Ok(answer) => answer.name,
        Err(status) => {
            let text = one_line(status.message());
            return Err(match of_the_node(&text) {
                true => Failed::Elsewhere(text),
                false => Failed::Here(wrong("prove: make a pod")(status)),
            });
        }
    };
    let seen = container(client, &id, config, image)
        .and_then(|()| posture::compared(&operator::find(&id)?, Depth::Whole));
    remove(client, &id);
    let (_, found) = seen.map_err(Failed::Here)?;
    match found.deviations.as_slice() {
        [] => Ok(()),
        [first, more @ ..] => Err(Failed::Here(RunError::Refused(format!(
            "prove: the pod of the proof isn't held as promised: {first} (and {} more)",
            more.len()
        )))),
    }
}

/// What a pod of any runtime would have failed by.
fn of_the_node(text: &str) -> bool {
    ["setup network", "set up network", "sandbox image"]
        .iter()
        .any(|part| text.contains(part))
}

/// A container in it, of the pods' own image: there is no other of which the node has
/// one for sure. It must run.
fn container(
    client: &mut Client,
    pod: &str,
    config: PodConfig,
    image: &str,
) -> Result<(), RunError> {
    let request = CreateContainerOfPod {
        pod: pod.to_owned(),
        config: Some(ContainerConfig {
            metadata: Some(Metadata {
                name: NAME.to_owned(),
            }),
            image: Some(spec(image)),
            log_path: "log".to_owned(),
            linux: Some(LinuxContainer {
                security_context: Some(ContainerSecurity {
                    namespace_options: Some(namespaces()),
                }),
            }),
        }),
        pod_config: Some(config),
    };
    let path = "/runtime.v1.RuntimeService/CreateContainer";
    let made = client.call::<_, Named>(path, request, LIMIT);
    let id = made.map_err(wrong("prove: make a pod's container"))?;
    let path = "/runtime.v1.RuntimeService/StartContainer";
    client
        .call::<_, Empty>(path, id.clone(), LIMIT)
        .map_err(wrong("prove: start a pod's container"))?;
    let request = ContainerStatusRequest { id: id.name };
    let path = "/runtime.v1.RuntimeService/ContainerStatus";
    let said: ContainerStatusResponse = client
        .call(path, request, LIMIT)
        .map_err(wrong("prove: look at a pod's container"))?;
    let now = said.status.unwrap_or_default();
    match now.state {
        RUNNING => Ok(()),
        _ => Err(RunError::Refused(format!(
            "prove: a pod's container of {image} has ended at once: exit status {} {}",
            now.exit_code,
            one_line(&now.message)
        ))),
    }
}

fn remove(client: &mut Client, id: &str) {
    let named = Named {
        name: id.to_owned(),
    };
    // Both say yes where there is nothing.
    let path = "/runtime.v1.RuntimeService/StopPodSandbox";
    let _stopped = client.call::<_, Empty>(path, named.clone(), LIMIT);
    let path = "/runtime.v1.RuntimeService/RemovePodSandbox";
    let _removed = client.call::<_, Empty>(path, named, LIMIT);
}

/// Whether that shim is, or was, of a pod of the proof that CRI doesn't list: what containerd
/// has written into the directory that the shim runs in says so, or it is gone.
pub fn may_be_of_proof(shim: u32) -> bool {
    let bundle = format!("/proc/{shim}/cwd");
    // That of a pod that was given up before it was one: its shim goes by itself.
    let is_gone = std::fs::metadata(&bundle).is_ok_and(|seen| seen.nlink() == 0);
    is_gone
        || std::fs::read(format!("{bundle}/config.json"))
            .ok()
            .and_then(|spec| serde_json::from_slice::<serde_json::Value>(&spec).ok())
            .is_some_and(|spec| spec.pointer(NAMESPACE_OF_POD).is_some_and(|of| of == NAME))
}

/// Takes away directories of logs whose installer is gone; whether there was one, and so
/// a pod may be on its way.
pub fn tidy_logs() -> bool {
    let mut found = false;
    for entry in std::fs::read_dir(LOGS).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let of = name
            .strip_prefix(NAME)
            .and_then(|name| name.split('-').nth(1));
        let gone = |pid: &str| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists();
        if of.is_some_and(gone) {
            let _next_time = std::fs::remove_dir_all(entry.path());
            found = true;
        }
    }
    found
}

/// Takes away pods of a proof that was cut short; whether CRI knows no more of them.
pub fn tidy(client: &mut Client) -> bool {
    let request = ListPods {
        filter: Some(Labels {
            labels: HashMap::from([(LABEL.0.to_owned(), LABEL.1.to_owned())]),
        }),
    };
    let path = "/runtime.v1.RuntimeService/ListPodSandbox";
    match client.call::<_, ListPodsResponse>(path, request, LIMIT) {
        Ok(answer) => {
            for pod in &answer.pods {
                remove(client, &pod.name);
            }
            answer.pods.is_empty()
        }
        // Without CRI there are none.
        Err(status) => status.code() == Code::Unimplemented,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_the_nodes_own_is_told_from_ours() {
        for text in [
            "failed to setup network for sandbox \"x\": plugin type=\"bridge\" failed (add): …",
            "failed to get sandbox image \"registry.k8s.io/pause:3.9\": failed to pull image …",
        ] {
            assert!(of_the_node(text), "{text}");
        }
        for text in [
            "failed to create containerd task: failed to start shim: start failed: …",
            "failed to get sandbox runtime: no runtime for \"casemate\" is configured",
        ] {
            assert!(!of_the_node(text), "{text}");
        }
    }
}
