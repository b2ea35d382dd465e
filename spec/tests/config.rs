//! The node's configuration: defaults, drop-ins, and what is wrong with it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by them")]

use std::fs;
use std::path::{Path, PathBuf};

use casemate_spec::config::{Beyond, Capabilities, Level, Profile, Volumes, WithoutIdmap};
use casemate_spec::{Config, caps};

struct Dir(PathBuf);

impl Dir {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("casemate-spec-{name}-{}", std::process::id()));
        fs::create_dir_all(dir.join("config.d")).unwrap();
        Self(dir)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.0.join(name), text).unwrap();
    }

    fn read(&self) -> Result<Config, String> {
        Config::read(&self.0.join("config.toml")).map_err(|e| e.to_string())
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn no_file_is_the_defaults() {
    let config = Config::read(Path::new("/nonexistent/casemate/config.toml")).unwrap();
    assert_eq!(config, Config::default());
    assert_eq!(
        (config.ids.base, config.ids.count, config.ids.size),
        (1_879_048_192, 2048, 131_072)
    );
    assert_eq!(config.profile, Profile::Default);
    assert_eq!(config.log.level, Level::Info);
    assert!(!config.sandbox.allow_host_network);
    assert_eq!(config.volumes.without_idmap, WithoutIdmap::ReadOnly);
    assert!(!config.fallback.without_landlock && config.fallback.without_oom_score_adj);
    assert_eq!(caps::names(config.capabilities.allow).len(), 10);
    assert_eq!(
        config.sandbox.agent_path(Path::new("/usr/local/bin/shim")),
        Path::new("/usr/local/bin/casemate-agent")
    );
    config.check().unwrap();
}

#[test]
fn drop_ins_win_in_order_of_name_key_by_key() {
    let dir = Dir::new("merge");
    dir.write(
        "config.toml",
        "profile = \"strict\"\n[ids]\ncount = 10\nsize = 65537\n",
    );
    dir.write("config.d/20.toml", "[ids]\ncount = 30\n");
    dir.write(
        "config.d/10.toml",
        "[ids]\ncount = 20\n[log]\nlevel = \"debug\"\n",
    );
    dir.write("config.d/30.toml.bak", "nonsense");
    let config = dir.read().unwrap();
    assert_eq!((config.ids.count, config.ids.size), (30, 65537));
    assert_eq!(
        (config.profile, config.log.level),
        (Profile::Strict, Level::Debug)
    );
}

#[test]
fn a_mistake_is_named_with_its_file_and_key() {
    let dir = Dir::new("mistakes");
    for (text, expected) in [
        (
            "[sandbox]\nallow_hostnetwork = true",
            vec![
                "config.d/5.toml",
                "sandbox.allow_hostnetwork",
                "allow_host_network",
            ],
        ),
        ("[ids]\nbase = \"x\"", vec!["config.d/5.toml", "ids.base"]),
        ("[ids]\nbase = -1", vec!["ids.base"]),
        ("profile = \"lax\"", vec!["profile", "lax", "compat"]),
        ("\n[ids\n", vec!["config.d/5.toml", "line 2"]),
        (
            "[volumes]\nwithout_idmap = \"copy\"",
            vec!["volumes.without_idmap", "copy", "read-only", "pass-through"],
        ),
        (
            "[capabilities]\nallow = [\"CAP_FLY\"]",
            vec!["capabilities.allow", "CAP_FLY"],
        ),
        ("[ids]\nbase = 1000", vec!["ids.base = 1000", "65536"]),
        ("[ids]\nsize = 65536", vec!["ids.size = 65536", "65537"]),
        ("[ids]\ncount = 0", vec!["ids.count = 0"]),
        (
            "[ids]\ncount = 1000000",
            vec!["ids.count = 1000000", "18431 or less"],
        ),
        (
            "[sandbox]\nagent_path = \"agent\"",
            vec!["sandbox.agent_path = agent"],
        ),
        (
            "[devices]\nallow = [\"/dev/\"]",
            vec!["devices.allow = /dev/"],
        ),
        (
            "[hooks]\nallow = [\"/a/../b\"]",
            vec!["hooks.allow = /a/../b"],
        ),
        ("[hooks]\nallow = [\"/\"]", vec!["hooks.allow = /"]),
        ("[hooks]\ntimeout = 0", vec!["hooks.timeout = 0"]),
    ] {
        dir.write("config.d/5.toml", text);
        let error = dir.read().unwrap_err();
        assert!(!error.contains('\n'), "{error}");
        for part in expected {
            assert!(error.contains(part), "{text:?}: {error:?} lacks {part:?}");
        }
    }
}

#[test]
fn what_is_written_out_reads_back() {
    let config = Config {
        profile: Profile::Compat,
        capabilities: Capabilities {
            allow: 1 | 1 << 21,
            beyond: Beyond::Drop,
        },
        volumes: Volumes {
            without_idmap: WithoutIdmap::PassThrough,
        },
        ..Config::default()
    };
    let text = toml::to_string(&config).unwrap();
    assert_eq!(Config::parse(Path::new("x"), &text).unwrap(), config);
}

#[test]
fn a_diagnosis_has_every_problem_with_its_place() {
    let dir = Dir::new("diagnosis");
    let look = || casemate_spec::config::diagnose(&dir.0.join("config.toml"));
    assert!(look().problems.is_empty() && look().files.is_empty());
    dir.write(
        "config.toml",
        "profile = \"lax\"\n[ids]\nbase = 1000\n\n[sandbox]\nallow_hostnetwork = true\napi = 3\n",
    );
    dir.write(
        "config.d/1.toml",
        "[hooks]\ntimeout = 0\n[images]\nregistries = \"x\"\n",
    );
    dir.write("config.d/2.toml", "\n[ids\n");
    let found = look();
    assert_eq!(found.files.len(), 3);
    let mut places: Vec<(String, Option<usize>, String)> = found
        .problems
        .iter()
        .map(|p| {
            assert!(!p.reason.is_empty() && !p.way_out.is_empty(), "{p:?}");
            let file = p.file.file_name().unwrap().to_string_lossy().into_owned();
            (file, p.line, p.key.clone())
        })
        .collect();
    places.sort();
    let want = [
        ("1.toml", Some(2), "hooks.timeout"),
        ("1.toml", Some(4), "images.registries"),
        ("2.toml", Some(2), ""),
        ("config.toml", Some(1), "profile"),
        ("config.toml", Some(3), "ids.base"),
        ("config.toml", Some(6), "sandbox.allow_hostnetwork"),
        ("config.toml", Some(7), "sandbox.api"),
    ];
    let places: Vec<(&str, Option<usize>, &str)> =
        places.iter().map(|(f, l, k)| (&**f, *l, &**k)).collect();
    assert_eq!(places, want);
    let of = |key: &str| found.problems.iter().find(|p| p.key == key).unwrap();
    assert_eq!(of("ids.base").value, "1000");
    assert!(
        of("sandbox.allow_hostnetwork")
            .reason
            .contains("allow_host_network")
    );
    // It finds something wherever a pod would.
    dir.read().unwrap_err();
}
