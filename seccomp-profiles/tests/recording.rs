//! Recordings: written and read back, joined, bounded, and read as hostile input.

// Outside #[test] functions clippy does not see that this is a test.
#![allow(clippy::unwrap_used, clippy::panic)]

use proptest::prelude::*;
use seccomp_profiles::recording::{Base, Container, LONGEST, Lost, Pod};
use seccomp_profiles::{Observed, Recording, RecordingError, table};
use serde_json::{Value, json};

fn nr(name: &str) -> u32 {
    table::number(name).unwrap()
}

fn base(name: &str) -> Base {
    Base {
        name: name.to_owned(),
        hash: "0123456789abcdef".repeat(4),
    }
}

fn pod(name: &str) -> Pod {
    Pod {
        id: format!("{name}-id"),
        namespace: "shop".into(),
        name: name.into(),
        uid: "6f".into(),
    }
}

fn web() -> Container {
    let mut web = Container::new("abc", base("default"));
    assert!(web.call(nr("openat"), &[7; 6], 3));
    assert!(!web.call(nr("openat"), &[8; 6], 4));
    assert!(web.call(nr("socket"), &[2, 0o2_000_001, 6, 9, 9, 9], 1));
    assert!(web.call(nr("socket"), &[1 | 5 << 32, 1, 0, 0, 0, 0], 1));
    assert!(!web.call(999, &[0; 6], 1));
    assert!(web.bound(80) && !web.bound(80) && !web.bound(0));
    assert!(web.connected(5432));
    assert!(web.path("//usr/lib/x") && !web.path("/usr") && web.path("/etc/passwd"));
    assert!(web.path("/") && !web.path("relative/x") && !web.path("/a\u{1b}[31m/x"));
    web
}

fn one() -> Recording {
    let mut recording = Recording::new(pod("web-1"));
    assert!(recording.add("web", web()).unwrap());
    recording
}

#[test]
fn what_is_written_is_read_back() {
    let recording = one();
    let json = recording.to_json().unwrap();
    assert_eq!(Recording::parse(&json).unwrap(), recording, "{json}");
    let web = recording.container("web").unwrap();
    assert_eq!(web.families().into_iter().collect::<Vec<_>>(), [1, 2]);
    let directories: Vec<_> = web.directories().iter().map(String::as_str).collect();
    assert_eq!(directories, ["/", "/etc", "/usr"]);
    assert_eq!(web.lost().directories, 1);
    let counts: Vec<_> = web.calls().map(|(k, n)| (k.to_string(), n)).collect();
    assert!(counts.contains(&("openat".to_owned(), 7)), "{counts:?}");
    let mut seen = Observed::default();
    seen.add(nr("openat"), &[0; 6]);
    seen.add(nr("socket"), &[1, 1, 0, 0, 0, 0]);
    seen.add(nr("socket"), &[2, 1, 6, 0, 0, 0]);
    assert_eq!(web.observed(), seen);
    let dir = std::env::temp_dir().join(format!("recording-{}", std::process::id()));
    std::fs::write(&dir, &json).unwrap();
    assert_eq!(Recording::read(&dir).unwrap(), recording);
    std::fs::write(&dir, "{}").unwrap();
    let error = Recording::read(&dir).unwrap_err().to_string();
    assert!(
        error.contains(dir.to_str().unwrap()) && error.contains("version"),
        "{error}"
    );
    std::fs::remove_file(&dir).unwrap();
    let gone = Recording::read(&dir).unwrap_err().to_string();
    assert!(gone.contains(dir.to_str().unwrap()), "{gone}");
}

#[test]
fn several_become_one() {
    let mut all = one();
    let mut second = Container::new("def", base("default"));
    second.call(nr("openat"), &[0; 6], 1);
    second.call(nr("sendfile"), &[0; 6], 1);
    second.bound(8080);
    second.connected(6379);
    second.path("/srv/www");
    second.lose(&Lost {
        unread: 2,
        ..Lost::default()
    });
    let mut other = Recording::new(pod("web-2"));
    other.add("web", second).unwrap();
    other
        .add("sidecar", Container::new("x", base("strict")))
        .unwrap();
    all.merge(other).unwrap();
    let web = all.container("web").unwrap();
    assert_eq!(web.ids().collect::<Vec<_>>(), ["abc", "def"]);
    assert_eq!(web.observed().calls(), 3);
    assert_eq!(
        web.calls()
            .find(|(k, _)| k.number == nr("openat"))
            .unwrap()
            .1,
        8
    );
    assert_eq!(
        web.ports_bound().iter().copied().collect::<Vec<_>>(),
        [80, 8080]
    );
    assert_eq!(
        web.ports_connected().iter().copied().collect::<Vec<_>>(),
        [5432, 6379]
    );
    let directories: Vec<_> = web.directories().iter().map(String::as_str).collect();
    assert_eq!(directories, ["/", "/etc", "/srv", "/usr"]);
    assert_eq!((web.lost().unread, web.lost().directories), (2, 1));
    assert_eq!((all.pods().count(), all.containers().count()), (2, 2));
    assert_eq!(Recording::parse(&all.to_json().unwrap()).unwrap(), all);

    let mut strict = Recording::new(pod("web-3"));
    strict
        .add("web", Container::new("ghi", base("strict")))
        .unwrap();
    let error = all.merge(strict).unwrap_err();
    assert!(matches!(error, RecordingError::Bases { .. }));
    assert!(
        error
            .to_string()
            .starts_with("container web was recorded under default"),
        "{error}"
    );
}

#[test]
fn a_container_holds_no_more_than_its_bounds() {
    let mut one = Container::new("abc", base("default"));
    for n in 0..20_000u32 {
        // Of one call no more than an observation has.
        one.call(nr("ioctl"), &[0, n.into(), 0, 0, 0, 0], 1);
        one.call(nr("socket"), &[n.into(), 1, 0, 0, 0, 0], 1);
        one.call(n % 300, &[n.into(); 6], 1);
        one.bound(n as u16);
        one.connected(n as u16);
        one.path(&format!("/d{n}/x"));
    }
    let kinds = one.calls().count();
    assert!(kinds <= Container::KINDS && one.observed().kinds().count() == kinds);
    let of = |name| one.observed().of(nr(name)).count();
    assert_eq!(
        (of("ioctl"), of("socket")),
        (Observed::KINDS, Observed::KINDS)
    );
    assert_eq!(one.ports_bound().len(), Container::PORTS);
    assert_eq!(one.ports_connected().len(), Container::PORTS);
    assert_eq!(one.directories().len(), Container::DIRECTORIES);
    let lost = one.lost();
    assert!(lost.calls > 38_000, "{lost:?}");
    assert_eq!(lost.directories, (20_000 - Container::DIRECTORIES) as u64);
    assert_eq!(lost.ports, 2 * (19_999 - Container::PORTS) as u64);
    // The largest that a pod writes is one that is read.
    let mut all = Recording::new(pod("p"));
    let mut room = 0;
    for n in 0..Recording::CONTAINERS + 1 {
        let added = all.add(&format!("c{n}"), one.clone()).unwrap();
        room += usize::from(added);
    }
    assert_eq!(room, Recording::CONTAINERS);
    let mut single = Recording::new(pod("p"));
    single.add("c", one).unwrap();
    let json = single.to_json().unwrap();
    println!("the largest container: {} bytes", json.len());
    assert_eq!(Recording::parse(&json).unwrap(), single);
}

#[test]
fn what_no_recording_has_is_refused_with_its_field() {
    let good: Value = serde_json::from_str(&one().to_json().unwrap()).unwrap();
    let with = |pointer: &str, value: Value| {
        let mut bad = good.clone();
        *bad.pointer_mut(pointer)
            .unwrap_or_else(|| panic!("{pointer}")) = value;
        bad.to_string()
    };
    let long = "x".repeat(300);
    let cases = [
        (with("/version", json!(1)), "version is 1"),
        (with("/version", json!("1")), "not a recording"),
        (with("/pods/0/name", json!("a\nb")), "pods.name"),
        (with("/pods/0/uid", json!(long)), "pods.uid"),
        (with("/pods", json!(vec![pod("p"); 300])), "pods: 300"),
        (
            with("/containers/0/name", json!("\u{202e}x")),
            "containers[0].name",
        ),
        (with("/containers/0/name", json!("")), "containers[0].name"),
        (with("/containers/0/base/hash", json!("ff")), "base.hash"),
        (with("/containers/0/base/name", json!("a\u{7}")), "base"),
        (with("/containers/0/ids", json!(vec!["i"; 100])), "ids: 100"),
        (
            with("/containers/0/calls/0/call", json!("evil\u{1b}")),
            "\"evil \" is no call",
        ),
        (
            with("/containers/0/calls/0/count", json!(-1)),
            "not a recording",
        ),
        (
            with("/containers/0/calls/1/args", json!([1])),
            "arguments that count",
        ),
        (
            with("/containers/0/calls/1/args", json!([1, 16, 0])),
            "type 0x10",
        ),
        (
            with("/containers/0/calls/1/args", json!([1, 1, 1u64 << 32])),
            "protocol",
        ),
        (
            with(
                "/containers/0/calls",
                json!(vec![good["containers"][0]["calls"][0].clone(); 2]),
            ),
            "there twice",
        ),
        (with("/containers/0/bound", json!([0])), "0 is no port"),
        (
            with("/containers/0/bound", json!([65536])),
            "not a recording",
        ),
        (
            with("/containers/0/bound", json!((1..300).collect::<Vec<u16>>())),
            "299 entries",
        ),
        (
            with("/containers/0/directories", json!(["/usr/lib"])),
            "directories",
        ),
        (
            with("/containers/0/directories", json!(["usr"])),
            "directories",
        ),
        (with("/containers/0/lost", json!({"more": 1})), "more"),
        (
            with("/containers", json!(vec![good["containers"][0].clone(); 2])),
            "containers[1].name: it is there twice",
        ),
        (format!("{}{}", good, " ".repeat(LONGEST)), "longer than"),
        ("[".repeat(100_000), "not a recording"),
        (good.to_string().replace("\"ids\"", "\"idz\""), "idz"),
        (String::new(), "not a recording"),
    ];
    Recording::parse(&good.to_string()).unwrap();
    for (text, expected) in cases {
        let error = Recording::parse(&text).unwrap_err().to_string();
        let start: String = text.chars().take(300).collect();
        assert!(
            error.contains(expected),
            "{error}\nexpected {expected}, for {start}"
        );
        assert!(
            !error.chars().any(char::is_control) && error.len() < 500,
            "{error}"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_recording_is_read_back(
        calls in prop::collection::vec((0u32..500, any::<[u64; 6]>(), any::<u64>()), 0..60),
        ports in prop::collection::vec(any::<u16>(), 0..20),
        paths in prop::collection::vec(".*", 0..20),
    ) {
        let mut one = Container::new("abc", base("default"));
        for (number, args, count) in calls {
            one.call(number, &args, count);
        }
        for port in ports {
            one.bound(port);
            one.connected(port.wrapping_add(1));
        }
        for path in paths {
            one.path(&path);
            one.path(&format!("/{path}"));
        }
        let mut all = Recording::new(pod("p"));
        all.add("c", one).unwrap();
        prop_assert_eq!(Recording::parse(&all.to_json().unwrap()).unwrap(), all);
    }

    #[test]
    fn a_damaged_recording_does_no_harm(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut json = one().to_json().unwrap().into_bytes();
        let at = at.index(json.len());
        json[at] = byte;
        if let Ok(text) = String::from_utf8(json)
            && let Ok(read) = Recording::parse(&text)
        {
            prop_assert_eq!(Recording::parse(&read.to_json().unwrap()).unwrap(), read);
        }
    }
}
