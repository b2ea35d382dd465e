//! Questions to Kubernetes, by the crate that its clients in Rust use. It is heavy to
//! build, so it comes with the feature `kubernetes` alone, which `make dist` has.

use std::path::Path;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::Value;
use tokio::runtime::Runtime;

use super::cluster::Known;
use crate::error::{RunError, one_line};

/// For one question and its answer.
const ANSWER: Duration = Duration::from_secs(10);

/// A way to ask.
pub struct Kubernetes {
    runtime: Runtime,
    client: Client,
}

impl Kubernetes {
    /// By this file, or by the account of the pod that this runs in. All that is needed
    /// is read at once: it may be out of sight later.
    pub fn open(kubeconfig: Option<&Path>) -> Result<Self, RunError> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| RunError::Refused(format!("make an event loop: {error}")))?;
        let mut config = match kubeconfig {
            Some(path) => runtime.block_on(by_file(path))?,
            None => by_account()?,
        };
        // It has been read.
        config.root_cert_file = None;
        config.connect_timeout = Some(ANSWER);
        config.read_timeout = Some(ANSWER);
        config.write_timeout = Some(ANSWER);
        config.default_retry = false;
        let client = {
            let _inside = runtime.enter();
            Client::try_from(config).map_err(|error| RunError::Refused(told(&error)))?
        };
        Ok(Self { runtime, client })
    }

    /// The node of that name, if there is one.
    pub fn node(&self, name: &str) -> Result<Option<Known>, RunError> {
        let api: Api<Node> = Api::all(self.client.clone());
        let node = match self.runtime.block_on(api.get(name)) {
            Ok(node) => node,
            Err(kube::Error::Api(status)) if status.code == 404 => return Ok(None),
            Err(error) => return Err(RunError::Refused(told(&error))),
        };
        let info = node.status.and_then(|status| status.node_info);
        Ok(Some(Known {
            machine: info.map_or_else(String::new, |info| info.machine_id.trim().to_owned()),
            labels: node.metadata.labels.unwrap_or_default(),
            annotations: node.metadata.annotations.unwrap_or_default(),
        }))
    }

    /// Merges this into the node (RFC 7396).
    pub fn patch(&self, name: &str, patch: &Value) -> Result<(), RunError> {
        let api: Api<Node> = Api::all(self.client.clone());
        let (params, patch) = (PatchParams::default(), Patch::Merge(patch));
        let patched = api.patch_metadata(name, &params, &patch);
        match self.runtime.block_on(patched) {
            Ok(_) => Ok(()),
            Err(error) => Err(RunError::Refused(told(&error))),
        }
    }
}

fn by_account() -> Result<Config, RunError> {
    let mut config = Config::incluster().map_err(|error| {
        RunError::Refused(format!(
            "this is no pod with an account ({}): name a file with --kubeconfig",
            one_line(&error.to_string())
        ))
    })?;
    if let Some(file) = config.auth_info.token_file.take() {
        let token = std::fs::read_to_string(&file)
            .map_err(|error| RunError::Refused(format!("read {file}: {error}")))?;
        config.auth_info.token = Some(token.trim().to_owned().into());
    }
    Ok(config)
}

async fn by_file(path: &Path) -> Result<Config, RunError> {
    let wrong = |error: kube::config::KubeconfigError| {
        RunError::Refused(format!(
            "--kubeconfig {}: {}",
            path.display(),
            one_line(&error.to_string())
        ))
    };
    let file = Kubeconfig::read_from(path).map_err(wrong)?;
    Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
        .await
        .map_err(wrong)
}

/// One line, with the way out where there is one.
fn told(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => match status.code {
            401 => "Kubernetes doesn't take the token: it is old, or of another cluster".to_owned(),
            403 => format!(
                "Kubernetes refuses: {}: runtimeclass/installer/rbac.yaml has the rights",
                one_line(&status.message)
            ),
            code => format!("Kubernetes answers {code}: {}", one_line(&status.message)),
        },
        other => {
            // What is below says why.
            let mut text = one_line(&other.to_string());
            let mut below = std::error::Error::source(other);
            while let Some(error) = below {
                let more = one_line(&error.to_string());
                if !text.contains(&more) {
                    text = format!("{text}: {more}");
                }
                below = error.source();
            }
            format!("Kubernetes can't be asked: {text}")
        }
    }
}
