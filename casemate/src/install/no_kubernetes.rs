//! In place of `kubernetes` in a build without that feature.

use std::path::Path;

use serde_json::Value;

use super::cluster::Known;
use crate::error::RunError;

/// There is no way to ask.
pub enum Kubernetes {}

impl Kubernetes {
    /// Says so.
    pub fn open(_kubeconfig: Option<&Path>) -> Result<Self, RunError> {
        Err(RunError::Refused(
            "this casemate was built without Kubernetes (cargo's feature kubernetes, which make \
             dist has): label the node by kubectl"
                .to_owned(),
        ))
    }

    /// Never called.
    pub fn node(&self, _name: &str) -> Result<Option<Known>, RunError> {
        match *self {}
    }

    /// Never called.
    pub fn patch(&self, _name: &str, _patch: &Value) -> Result<(), RunError> {
        match *self {}
    }
}
