//! The images of the test bed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::layer::{Layer, Meta, mode};
use super::oci::Image;
use crate::error::{Failure, Result, file};
use crate::run::run;

/// Local name of the plain busybox image.
pub const BASE: &str = "casemate.test/base:latest";
/// 40 layers.
pub const MANY: &str = "casemate.test/many-layers:latest";
/// Whiteouts and opaque directories.
pub const WHITEOUTS: &str = "casemate.test/whiteouts:latest";
/// Setuid bits, file capabilities, hard links, odd owners.
pub const PRIVILEGES: &str = "casemate.test/privileges:latest";
/// Symlinks where the runtime mounts.
pub const HOSTILE_LINKS: &str = "casemate.test/hostile-links:latest";
/// A huge /etc/passwd that is not text.
pub const HOSTILE_PASSWD: &str = "casemate.test/hostile-passwd:latest";

/// Its entry point; a name that no other program has.
pub const PAUSE_PROGRAM: &str = "/casemate-test-pause";

/// An image for pods to begin with. What it has is no program, and whoever
/// executes it fails; but a stock runtime does, and gets `program`.
pub fn pause(program: Option<&Path>) -> Result<Image> {
    let bytes = program.map_or_else(|| Ok(b"not a program\n".to_vec()), read)?;
    let mut layer = Layer::default();
    layer.file(PAUSE_PROGRAM.trim_start_matches('/'), mode(0o755), &bytes)?;
    Ok(Image {
        name: crate::generation::PAUSE.to_owned(),
        layers: vec![layer.finish()?],
        entrypoint: Vec::new(),
        cmd: vec![PAUSE_PROGRAM.to_owned(), "sleep".to_owned()],
    })
}

/// Debian's static busybox.
pub fn busybox() -> Result<PathBuf> {
    ["/bin/busybox", "/usr/bin/busybox"]
        .iter()
        .map(PathBuf::from)
        .find(|path| path.exists())
        .ok_or_else(|| {
            Failure::Unexpected("no /bin/busybox: install the package busybox-static".into())
        })
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(file("read", path))
}

/// The lowest layer of every image: busybox with its applets as hard links (so
/// that masking one path does not go through a link), the `probe` program,
/// users, and empty mount points.
pub fn base_layer(probe: Option<&Path>) -> Result<Vec<u8>> {
    let busybox = busybox()?;
    let list = run(
        Command::new(&busybox).arg("--list"),
        &[],
        Duration::from_secs(10),
    )?
    .ok()?;
    let mut layer = Layer::default();
    for dir in [
        "bin", "dev", "etc", "proc", "root", "run", "sys", "usr", "var",
    ] {
        layer.dir(dir, mode(0o755))?;
    }
    layer.dir("tmp", mode(0o1777))?;
    layer.file("bin/busybox", mode(0o755), &read(&busybox)?)?;
    for applet in list.out().lines().filter(|name| *name != "busybox") {
        layer.hard_link(&format!("bin/{applet}"), "bin/busybox")?;
    }
    if let Some(probe) = probe {
        layer.file("bin/probe", mode(0o755), &read(probe)?)?;
    }
    layer
        .file(
            "etc/passwd",
            mode(0o644),
            b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n\
              app:x:1000:1000:app:/tmp:/bin/sh\n",
        )?
        .file(
            "etc/group",
            mode(0o644),
            b"root:x:0:\nnogroup:x:65534:\napp:x:1000:\nextra:x:2000:app\n",
        )?;
    layer.finish()
}

fn image(name: &str, layers: Vec<Vec<u8>>) -> Image {
    Image {
        name: name.to_owned(),
        layers,
        entrypoint: Vec::new(),
        cmd: vec!["/bin/sh".to_owned()],
    }
}

/// busybox and nothing else.
pub fn base(probe: Option<&Path>) -> Result<Image> {
    Ok(image(BASE, vec![base_layer(probe)?]))
}

/// 40 layers: each adds a file, changes a shared one and touches a directory.
pub fn many_layers(probe: &Path) -> Result<Image> {
    let mut layers = vec![base_layer(Some(probe))?];
    for n in 1..40u32 {
        let mut layer = Layer::default();
        layer
            .dir("data", mode(0o755))?
            .dir(&format!("data/d{}", n % 7), mode(0o750 | (n % 8)))?
            .file(
                &format!("data/d{}/f{n}", n % 7),
                mode(0o640),
                &vec![b'x'; n as usize * 100],
            )?
            .file(
                "data/shared",
                mode(0o644),
                format!("layer {n}\n").as_bytes(),
            )?;
        if n % 5 == 0 {
            layer.symlink(&format!("data/link{n}"), &format!("d{}/f{n}", n % 7))?;
        }
        layers.push(layer.finish()?);
    }
    Ok(image(MANY, layers))
}

/// Files, trees and whole directories that upper layers delete or replace.
pub fn whiteouts(probe: &Path) -> Result<Image> {
    let mut lower = Layer::default();
    lower
        .dir("w", mode(0o755))?
        .file("w/gone", mode(0o644), b"deleted above")?
        .file("w/kept", mode(0o644), b"kept")?
        .dir("w/tree", mode(0o755))?
        .file("w/tree/below", mode(0o644), b"deleted with its directory")?
        .dir("w/opaque", mode(0o755))?
        .file("w/opaque/old", mode(0o644), b"hidden")?
        .dir("w/opaque/olddir", mode(0o755))?
        .file("w/swap", mode(0o644), b"a file that becomes a directory")?;
    let mut upper = Layer::default();
    upper
        .dir("w", mode(0o755))?
        .whiteout("w", "gone")?
        .whiteout("w", "tree")?
        .dir("w/opaque", mode(0o700))?
        .opaque("w/opaque")?
        .file("w/opaque/new", mode(0o600), b"seen")?
        .whiteout("w", "swap")?;
    let mut top = Layer::default();
    top.dir("w", mode(0o755))?
        .dir("w/swap", mode(0o711))?
        .file("w/swap/inside", mode(0o644), b"now a directory")?;
    let layers = vec![
        base_layer(Some(probe))?,
        lower.finish()?,
        upper.finish()?,
        top.finish()?,
    ];
    Ok(image(WHITEOUTS, layers))
}

/// `cap_net_raw=ep` as `struct vfs_cap_data` revision 2 (capabilities(7)).
fn net_raw() -> Vec<u8> {
    let words: [u32; 5] = [0x0200_0001, 1 << 13, 0, 0, 0];
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Setuid, setgid, sticky, file capabilities, user attributes, hard links across
/// directories, and owners up to the end of the usual range.
pub fn privileges(probe: &Path) -> Result<Image> {
    let tool = read(probe)?;
    let capable = BTreeMap::from([("security.capability", net_raw())]);
    let owned = |mode, uid, gid| Meta { mode, uid, gid };
    let mut layer = Layer::default();
    layer
        .dir("p", mode(0o755))?
        .file("p/setuid", mode(0o4755), &tool)?
        .file("p/setuid-app", owned(0o4755, 1000, 1000), &tool)?
        .file("p/setgid", owned(0o2755, 0, 2000), &tool)?
        .dir("p/setgid-dir", owned(0o2775, 0, 2000))?
        .dir("p/sticky", mode(0o1777))?
        .file_with_xattrs("p/capable", mode(0o755), &tool, &capable)?
        .hard_link("p/setuid-again", "p/setuid")?
        .file("p/nobody", owned(0o600, 65534, 65534), b"nobody's")?
        .file("p/unreadable", owned(0, 1000, 1000), b"no bits")?
        .dir("p/other", mode(0o755))?
        .hard_link("p/other/nobody", "p/nobody")?;
    Ok(image(
        PRIVILEGES,
        vec![base_layer(Some(probe))?, layer.finish()?],
    ))
}

/// Symlinks that point out of the rootfs at every place the runtime mounts on.
/// `victim` is a directory of the host that must stay as it is.
pub fn hostile_links(probe: &Path, victim: &str) -> Result<Image> {
    let mut layer = Layer::default();
    for dir in ["proc", "sys", "dev", "run"] {
        layer.whiteout(".", dir)?;
    }
    let mut top = Layer::default();
    for dir in ["proc", "sys", "dev", "run"] {
        top.symlink(dir, victim)?;
    }
    let layers = vec![base_layer(Some(probe))?, layer.finish()?, top.finish()?];
    Ok(image(HOSTILE_LINKS, layers))
}

/// 16 MiB of binary /etc/passwd and /etc/group.
pub fn hostile_passwd(probe: &Path) -> Result<Image> {
    let junk: Vec<u8> = (0..16u32 << 20)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let mut layer = Layer::default();
    layer
        .dir("etc", mode(0o755))?
        .file("etc/passwd", mode(0o644), &junk)?
        .file("etc/group", mode(0o644), &junk)?;
    Ok(image(
        HOSTILE_PASSWD,
        vec![base_layer(Some(probe))?, layer.finish()?],
    ))
}
