//! A registry of images, which is what a node has them from: the reading half of OCI's
//! distribution-spec, over HTTP, in the node's network.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use casemate_tests::image::Image;
use casemate_tests::skip::{Outcome, fail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde_json::Value;

/// Where nodes that it serves find it.
pub const ADDRESS: &str = "127.0.0.1:5000";
/// Its port, for others.
pub const PORT: u16 = 5000;

/// What it has: manifests by `REPOSITORY:TAG` or digest, blobs by digest.
#[derive(Default)]
struct Shelf {
    tags: BTreeMap<String, String>,
    blobs: BTreeMap<String, Vec<u8>>,
}

/// The registry; it serves until the process ends.
#[derive(Clone, Default)]
pub struct Registry(Arc<Mutex<Shelf>>);

impl Registry {
    /// Begins to serve in that network namespace, as in others maybe.
    pub fn serve(&self, netns: &Path) -> Outcome {
        let netns = File::open(netns)?;
        let listen = move || -> std::io::Result<TcpListener> {
            move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))?;
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))
        };
        // In a thread of its own, which ends in that namespace.
        let listener = match std::thread::spawn(listen).join() {
            Ok(listener) => listener?,
            Err(_) => return fail("listening panicked"),
        };
        let served = self.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let served = served.clone();
                std::thread::spawn(move || served.answer(stream));
            }
        });
        Ok(())
    }

    /// Takes an image in, by its name without the registry's.
    pub fn push(&self, image: &Image) -> Outcome {
        let files = image.layout()?;
        let index = files.get("index.json").map_or(&[][..], Vec::as_slice);
        let index: Value = serde_json::from_slice(index)?;
        let digest = index["manifests"][0]["digest"].as_str().unwrap_or_default();
        let name = image.name.split_once('/').map_or("", |(_, name)| name);
        let mut shelf = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        shelf.tags.insert(name.to_owned(), digest.to_owned());
        for (path, data) in files {
            if let Some(digest) = path.strip_prefix("blobs/sha256/") {
                shelf.blobs.insert(format!("sha256:{digest}"), data);
            }
        }
        Ok(())
    }

    /// What is at `/v2/…`, and of which type.
    fn find(&self, path: &str) -> Option<(String, &'static str, Vec<u8>)> {
        let shelf = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (digest, kind) = match path.rsplit_once("/manifests/") {
            Some((name, tag)) => {
                let named = shelf.tags.get(&format!("{name}:{tag}")).cloned();
                let kind = "application/vnd.oci.image.manifest.v1+json";
                (named.unwrap_or_else(|| tag.to_owned()), kind)
            }
            None => {
                let (_, digest) = path.rsplit_once("/blobs/")?;
                (digest.to_owned(), "application/octet-stream")
            }
        };
        let data = shelf.blobs.get(&digest)?.clone();
        Some((digest, kind, data))
    }

    /// One request, one connection.
    fn answer(&self, mut stream: TcpStream) {
        let mut reader = BufReader::new(&stream);
        let mut first = String::new();
        let mut line = String::new();
        let _ = reader.read_line(&mut first);
        while reader.read_line(&mut line).is_ok_and(|n| n > 2) {
            line.clear();
        }
        let mut words = first.split_whitespace();
        let (verb, target) = (words.next(), words.next().unwrap_or_default());
        let path = target.split('?').next().unwrap_or_default();
        let found = match path.strip_prefix("/v2/") {
            Some("") => Some((String::new(), "application/json", b"{}".to_vec())),
            Some(path) => self.find(path),
            None => None,
        };
        let (status, (digest, kind, data)) = match found {
            Some(found) => ("200 OK", found),
            None => ("404 Not Found", <(String, &str, Vec<u8>)>::default()),
        };
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\n\
             Docker-Content-Digest: {digest}\r\nConnection: close\r\n\r\n",
            data.len()
        );
        let _ = stream.write_all(head.as_bytes());
        if verb == Some("GET") {
            let _ = stream.write_all(&data);
        }
    }
}
