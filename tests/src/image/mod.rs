//! Images made without a registry: layers as tar streams, an OCI layout around
//! them (image-spec `image-layout.md`), for `ctr image import`.

pub mod catalog;
pub mod installer;
pub mod layer;
pub mod oci;

pub use layer::Layer;
pub use oci::Image;
