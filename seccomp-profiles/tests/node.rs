//! Profiles of a node: which files are taken, and that none allows more than the
//! shipped profile that it says it is within.

// Outside #[test] functions clippy does not see that this is a test.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt as _, chown, symlink};
use std::path::PathBuf;
use std::time::Instant;

use common::{nr, server};
use seccomp_profiles::interp::SeccompData;
use seccomp_profiles::node::{self, WORKLOADS};
use seccomp_profiles::{
    Action, Form, Observed, Prepared, Profile, Program, beyond, compile, export, minimal, shipped,
    shipped_program_as, table,
};

fn program(name: &str) -> Program {
    Program::from_bytes(shipped_program_as(name, Form::Enforce).unwrap()).unwrap()
}

/// All that a profile lets run, as if it had been seen.
fn everything(of: &Profile) -> Observed {
    let mut seen = Observed::default();
    let program = compile(of).unwrap();
    for &(number, _) in table::SYSCALLS {
        for data in common::some_calls_of(of, number, 500) {
            if common::verdict(&program, &data) == Action::Allow {
                seen.add(number, &data.args);
            }
        }
    }
    seen
}

#[test]
fn shipped_and_learned_profiles_are_within() {
    for (at, inner) in WORKLOADS.iter().enumerate() {
        for (other, outer) in WORKLOADS.iter().enumerate() {
            let found = beyond(&program(inner), &program(outer));
            assert_eq!(
                found.is_none(),
                at <= other,
                "{inner} in {outer}: {found:x?}"
            );
        }
        let node = shipped(inner).unwrap();
        for seen in [Observed::default(), server(), everything(&node)] {
            let least = compile(&minimal("least", &seen, &node)).unwrap();
            let begun = Instant::now();
            let found = beyond(&least, &program(inner));
            println!(
                "{inner}: {} kinds, compared in {:?}",
                seen.kinds().count(),
                begun.elapsed()
            );
            assert_eq!(found, None);
        }
    }
}

/// `least` of the server, with this beside.
fn with(group: &str) -> String {
    let least = minimal("web", &server(), &shipped("default").unwrap());
    let text = export::toml(&least);
    let at = text.find("\n[[group]]").unwrap();
    format!("{}\n{group}\n{}", &text[..at], &text[at..])
}

#[test]
fn what_is_beyond_is_found_and_named() {
    let allow = |call: &str, args: &str| {
        with(&format!(
            "[[group]]\nname = \"more\"\naction = \"allow\"\n[[group.rule]]\n\
             syscalls = [\"{call}\"]\nreason = \"r\"\n{args}\n"
        ))
    };
    let arg = |index: u8, rest: &str| format!("args = [{{ index = {index}, {rest} }}]");
    let beyond = [
        (allow("mount", ""), "mount"),
        (allow("ioctl", ""), "ioctl"),
        (
            allow("ioctl", &arg(1, "op = \"eq\", value = 0x5412")),
            "ioctl(request 0x5412)",
        ),
        // Only some of the values that it allows are beyond.
        (
            allow(
                "ioctl",
                &arg(1, "op = \"masked_eq\", mask = 0xffffff00, value = 0x5400"),
            ),
            "ioctl",
        ),
        (
            allow("socket", &arg(0, "op = \"le\", value = 40")),
            "socket",
        ),
        (
            allow("socket", &arg(0, "op = \"eq\", value = 2, width = 64")),
            "socket(family 2",
        ),
        (
            allow(
                "clone",
                &arg(
                    0,
                    "op = \"masked_eq\", mask = 0x10000000, value = 0x10000000",
                ),
            ),
            "clone",
        ),
        (
            with("").replacen("x32 = \"errno(ENOSYS)\"", "x32 = \"allow\"", 1),
            "call 1073741824",
        ),
        (
            with("").replacen("unknown = \"errno(ENOSYS)\"", "unknown = \"log\"", 1),
            "call 337",
        ),
        (
            with("").replacen("default = \"errno(ENOSYS)\"", "default = \"allow\"", 1),
            "ptrace",
        ),
    ];
    for (text, named) in beyond {
        let profile = Profile::from_toml(&text).unwrap();
        let error = node::check(&profile, "web", "/x/web.toml".as_ref())
            .unwrap_err()
            .to_string();
        let expected = format!("/x/web.toml: allows {named}");
        if named == "ptrace" {
            assert!(error.contains("which default answers with"), "{error}");
        } else {
            assert!(error.starts_with(&expected), "{error}\nexpected {expected}");
        }
        assert!(!error.contains('\n'), "{error}");
    }
    let within = [
        allow("ioctl", &arg(1, "op = \"eq\", value = 0x5401")),
        allow(
            "socket",
            "args = [{ index = 0, op = \"eq\", value = 2 }, { index = 1, op = \"eq\", value = 1 }, { index = 2, op = \"eq\", value = 6 }]",
        ),
        allow("clone", &arg(0, "op = \"eq\", value = 0x11")),
        allow("writev", &arg(3, "op = \"lt\", value = 4096, width = 64")),
    ];
    for text in within {
        let profile = Profile::from_toml(&text).unwrap();
        node::check(&profile, "web", "/x/web.toml".as_ref()).unwrap();
    }
}

/// A directory as a node has it; gone with it.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("profiles-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn put(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        path
    }

    fn error(&self, name: &str) -> String {
        let error = node::read(&self.0, name).unwrap_err().to_string();
        let start = self.0.display().to_string();
        assert!(error.contains(&start) && !error.contains('\n'), "{error}");
        error
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _gone = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_file_of_roots_is_read_and_others_are_refused() {
    let dir = Directory::new("read");
    let missing = node::read(&dir.0, "web").unwrap_err();
    assert!(missing.is_missing(), "{missing}");
    assert!(
        node::read(&dir.0.join("none"), "web")
            .unwrap_err()
            .is_missing()
    );
    let text = with("");
    let path = dir.put("web.toml", &text);
    if !rustix::process::geteuid().is_root() {
        assert!(dir.error("web").contains("owned by user"));
        return;
    }
    let file = node::read(&dir.0, "web").unwrap();
    assert_eq!(
        (file.prepared.name(), file.within.as_str()),
        ("web", "default")
    );
    let profile = Profile::from_toml(&text).unwrap();
    assert_eq!(file.prepared.hash(), compile(&profile).unwrap().hash());
    let refused = SeccompData::x86_64(nr("mount"), [0; 6]);
    let rule = file.prepared.explainer().explain(&refused).unwrap();
    assert!(rule.id.starts_with("web/"), "{rule:?}");

    for mode in [0o664, 0o646] {
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        assert!(dir.error("web").contains("chmod go-w"));
    }
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    chown(&path, Some(1000), None).unwrap();
    assert!(dir.error("web").contains("owned by user 1000"));
    chown(&path, Some(0), None).unwrap();
    fs::set_permissions(&dir.0, Permissions::from_mode(0o777)).unwrap();
    assert!(dir.error("web").contains("mode 777"));
    fs::set_permissions(&dir.0, Permissions::from_mode(0o755)).unwrap();
    symlink(&path, dir.0.join("link.toml")).unwrap();
    assert!(dir.error("link").contains("symbolic link"));
    fs::create_dir(dir.0.join("dir.toml")).unwrap();
    assert!(dir.error("dir").contains("no file"));
    for name in ["..", "../web", "Web", "-web", "", &"w".repeat(64)] {
        assert!(dir.error(name).contains("rename it"), "{name}");
    }
    for (name, text, expected) in [
        ("default", text.as_str(), "shipped profile has this name"),
        ("other", &text, "the file is called other"),
        ("web", &"#".repeat(300 * 1024), "longer than"),
        (
            "web",
            &text.replace("within = \"default\"\n", ""),
            "within = \"\"",
        ),
        (
            "web",
            &text.replace("within = \"default\"", "within = \"agent\""),
            "strict, default and compat",
        ),
        (
            "web",
            &text.replacen("action = \"errno(EPERM)\"", "action = \"notify\"", 1),
            "action notify",
        ),
        (
            "web",
            &text.replacen("\"accept4\"", "\"accept5\"", 1),
            "accept5",
        ),
        ("web", &text.replacen("reason", "raison", 1), "raison"),
    ] {
        dir.put(&format!("{name}.toml"), text);
        let error = dir.error(name);
        assert!(error.contains(expected), "{error}\nexpected {expected}");
    }
    dir.put("web.toml", &text);
    dir.put("README", "");
    let names = ["default", "dir", "link", "other", "web"];
    assert_eq!(node::names(&dir.0).unwrap(), names);
    assert!(node::names(&dir.0.join("none")).unwrap().is_empty());
}

#[test]
fn compiling_is_measured() {
    let least = minimal("web", &server(), &shipped("default").unwrap());
    let text = export::toml(&least);
    let least_of = |times: u32, what: &dyn Fn()| {
        (0..times)
            .map(|_| {
                let begun = Instant::now();
                what();
                begun.elapsed()
            })
            .min()
            .unwrap()
    };
    let parsed = least_of(20, &|| {
        Profile::from_toml(&text).unwrap();
    });
    let prepared = least_of(20, &|| {
        Prepared::of(&least).unwrap();
    });
    let checked = least_of(20, &|| {
        node::check(&least, "web", "/x".as_ref()).unwrap();
    });
    println!(
        "{} bytes: read {parsed:?}, compiled {prepared:?}, with checks {checked:?}",
        text.len()
    );
}

#[test]
fn bounds_and_bits_are_kept_to_the_value() {
    let of = |op: &str| {
        let text = format!(
            "name = \"x\"\ndescription = \"\"\ndefault = \"errno(ENOSYS)\"\n[[group]]\n\
             name = \"g\"\naction = \"allow\"\n[[group.rule]]\nsyscalls = [\"dup\"]\n\
             reason = \"r\"\nargs = [{{ index = 0, {op} }}]\n"
        );
        compile(&Profile::from_toml(&text).unwrap()).unwrap()
    };
    for (inner, outer, is_within) in [
        ("op = \"ge\", value = 6", "op = \"gt\", value = 5", true),
        ("op = \"ge\", value = 5", "op = \"gt\", value = 5", false),
        ("op = \"le\", value = 5", "op = \"lt\", value = 6", true),
        ("op = \"le\", value = 6", "op = \"lt\", value = 6", false),
        ("op = \"eq\", value = 5", "op = \"ge\", value = 5", true),
        ("op = \"eq\", value = 5", "op = \"ne\", value = 5", false),
        ("op = \"gt\", value = 5", "op = \"ne\", value = 5", true),
        ("op = \"ge\", value = 5", "op = \"ne\", value = 5", false),
        (
            "op = \"le\", value = 1",
            "op = \"eq\", values = [0, 1]",
            true,
        ),
        (
            "op = \"le\", value = 2",
            "op = \"eq\", values = [0, 1]",
            false,
        ),
        (
            "op = \"masked_eq\", mask = 6, value = 6",
            "op = \"masked_eq\", mask = 2, value = 2",
            true,
        ),
        (
            "op = \"masked_eq\", mask = 2, value = 2",
            "op = \"masked_eq\", mask = 6, value = 6",
            false,
        ),
        (
            "op = \"masked_eq\", mask = 6, value = 0",
            "op = \"masked_eq\", mask = 6, values = [0, 2]",
            true,
        ),
        (
            "op = \"masked_eq\", mask = 2, value = 0",
            "op = \"masked_eq\", mask = 6, values = [0, 2]",
            false,
        ),
        (
            "op = \"le\", value = 5",
            "op = \"le\", value = 5, width = 64",
            false,
        ),
        (
            "op = \"ge\", value = 0x500000000, width = 64",
            "op = \"gt\", value = 0x4ffffffff, width = 64",
            true,
        ),
        (
            "op = \"ge\", value = 0x4ffffffff, width = 64",
            "op = \"gt\", value = 0x4ffffffff, width = 64",
            false,
        ),
    ] {
        let found = beyond(&of(inner), &of(outer));
        assert_eq!(found.is_none(), is_within, "{inner} in {outer}: {found:x?}");
        assert!(
            beyond(&of(outer), &of(outer)).is_none(),
            "{outer} in itself"
        );
    }
}
