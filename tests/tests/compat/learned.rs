//! Servers under the profiles that their own load made: `tests/learned`.
//!
//! A script's head says how the server is called; its first part prepares files, and
//! its second, from the line `#: load` on, is the load, run in another container of the
//! pod, so that its calls don't end up in the server's profile. The server runs once to
//! be learned from, by two rounds of the load, and once under what that made: with
//! nothing refused but, at the end, what it never did.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use casemate_tests::bundle::Task;
use casemate_tests::exec::Exec;
use casemate_tests::operator::{ask, casemate, command};
use casemate_tests::pod::{Pids, Pod};
use casemate_tests::run::{run, until};
use casemate_tests::shim::SHORT;
use casemate_tests::skip::{Outcome, Stop, fail, once_more};
use casemate_tests::{World, ensure, ensure_eq, spec};
use seccomp_profiles::surface::{Abi, reachable};
use seccomp_profiles::{Program, shipped_program};
use serde_json::{Value, json};

use crate::{LIMIT, Workload, here, last, version};

/// What asks for a profile.
const ANNOTATION: &str = "casemate.io/profile";
/// The most calls of x86-64 that a learned profile may leave in reach.
const MOST: usize = 80;
/// For a server to end once it is told to.
const END: Duration = Duration::from_secs(20);
/// The one that runs under runc as well, with the profile in its form.
const UNDER_RUNC: &str = "redis";
/// None of them makes a symbolic link.
const UNUSED: [&str; 4] = ["/usr/bin/ln", "-s", "x", "/tmp/link"];

/// A server, its files prepared.
struct Server<'a> {
    script: &'a Workload,
    root: &'a Path,
    /// Overlay, work, recordings, profiles: gone with it.
    place: PathBuf,
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.place);
    }
}

/// What came of it.
struct Shown {
    /// Calls of x86-64 in reach, by the filters that were installed.
    reach: usize,
    /// The same under the profile that it was learned under.
    before: usize,
}

impl<'a> Server<'a> {
    fn new(script: &'a Workload, root: &'a Path) -> Result<Self, Stop> {
        let place = World::get()?.dir().join(format!("learned-{}", script.name));
        for name in ["prepared", "work", "profiles"] {
            fs::create_dir_all(place.join(name))?;
        }
        let server = Server {
            script,
            root,
            place,
        };
        let config = format!(
            "[learn]\nallow = true\ndirectory = \"{}\"\n[profiles]\ndirectory = \"{}\"\n",
            server.place.join("recordings").display(),
            server.place.join("profiles").display(),
        );
        fs::write(server.config(), config)?;
        Ok(server)
    }

    fn config(&self) -> String {
        self.place.join("config.toml").display().to_string()
    }

    fn profile(&self) -> PathBuf {
        let name = format!("{}.toml", self.script.name);
        self.place.join("profiles").join(name)
    }

    fn prepared(&self) -> PathBuf {
        self.place.join("prepared")
    }

    fn header(&self, key: &str) -> Result<&str, Stop> {
        let name = &self.script.name;
        let missing = || {
            Stop::Fail(format!(
                "tests/learned/{name}.sh has no line \"# {key}: …\""
            ))
        };
        self.script.header(key).ok_or_else(missing)
    }

    fn signal(&self, key: &str) -> Result<u32, Stop> {
        let text = self.header(key)?;
        text.parse()
            .map_err(|_| Stop::Fail(format!("# {key}: {text}: no number of a signal")))
    }

    fn parts(&self) -> Result<(&str, &str), Stop> {
        let text = &self.script.text;
        text.split_once("#: load\n")
            .ok_or_else(|| Stop::Fail(format!("{}: no line \"#: load\"", self.script.name)))
    }

    /// Puts the task on the prepared files, or makes it the one that prepares them.
    fn on_root(&self, task: &mut Task, prepares: bool) {
        let (root, prepared) = (self.root.display(), self.prepared());
        for option in &mut task.rootfs[0].options {
            match option.split_once('=') {
                Some(("lowerdir", _)) if prepares => *option = format!("lowerdir={root}"),
                Some(("lowerdir", _)) => {
                    *option = format!("lowerdir={}:{root}", prepared.display());
                }
                Some(("upperdir", _)) if prepares => {
                    *option = format!("upperdir={}", prepared.display());
                }
                Some(("workdir", _)) if prepares => {
                    *option = format!("workdir={}", self.place.join("work").display());
                }
                _ => {}
            }
        }
        let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        task.spec["process"]["env"] = json!([path, "LANG=C.UTF-8"]);
    }

    /// A script as a container's process, its output by one pipe.
    fn runs(task: &mut Task, script: &str) {
        let begin = "exec 2>&1; mkdir -p /w/run; cd /w/run; set -eux\n";
        task.spec["process"]["args"] = json!(["/bin/sh", "-c", format!("{begin}{script}")]);
    }

    fn ended_well(task: &Task, what: &str, limit: Duration) -> Outcome {
        let ended = task.rpc()?.wait(&task.id, limit);
        let said = String::from_utf8_lossy(&task.stdout.so_far()).into_owned();
        match ended {
            Ok(reply) if reply.exit_status == 0 => Ok(()),
            Ok(reply) => fail(format!("{what}: {}: {}", reply.exit_status, last(&said))),
            Err(error) => fail(format!("{what}: {error}: {}", last(&said))),
        }
    }

    fn prepare(&self) -> Outcome {
        let mut task = Task::new("prepare", &[])?;
        self.on_root(&mut task, true);
        Self::runs(&mut task, self.parts()?.0);
        task.boot()?;
        task.create()?;
        task.rpc()?.start(&task.id)?;
        Self::ended_well(&task, "what prepares it", LIMIT)?;
        Ok(task.finish()?)
    }

    fn pod(&self) -> Result<Pod, Stop> {
        let config = self.config();
        Ok(Pod::with("learned", |pause| {
            pause.shim.env.push(("CASEMATE_CONFIG".to_owned(), config));
        })?)
    }

    /// The server's process.
    fn process(&self, process: &mut Value) -> Outcome {
        let args: Vec<&str> = self.header("server")?.split(' ').collect();
        process["args"] = json!(args);
        if let Some(user) = self.script.header("user") {
            let id: u32 = user
                .parse()
                .map_err(|_| Stop::Fail(format!("# user: {user}")))?;
            process["user"] = json!({"uid": id, "gid": id});
            process["capabilities"] = json!({});
        }
        Ok(())
    }

    /// Starts the server in a pod, under a profile that is asked for by name.
    fn start(&self, pod: &Pod, profile: &str) -> Result<(Task, u32), Stop> {
        let mut server = pod.member(&self.script.name, &[], Pids::Own)?;
        self.on_root(&mut server, false);
        self.process(&mut server.spec["process"])?;
        spec::annotate(&mut server.spec, ANNOTATION, profile);
        server.boot()?;
        let pid = server.create()?.pid;
        server.rpc()?.start(&server.id)?;
        Ok((server, pid))
    }

    /// The load, once, from another container.
    fn load(&self, pod: &Pod) -> Outcome {
        let mut load = pod.member("load", &[], Pids::Own)?;
        self.on_root(&mut load, false);
        Self::runs(&mut load, self.parts()?.1);
        load.boot()?;
        load.create()?;
        load.rpc()?.start(&load.id)?;
        Self::ended_well(&load, "the load", LIMIT)?;
        pod.remove(load)?;
        Ok(())
    }

    fn reload(&self, server: &Task) -> Outcome {
        if self.script.header("reload").is_some() {
            server
                .rpc()?
                .kill(&server.id, self.signal("reload")?, false)?;
        }
        Ok(())
    }

    fn stop(&self, pod: &Pod, server: Task) -> Outcome {
        server
            .rpc()?
            .kill(&server.id, self.signal("stop")?, false)?;
        let ended = Self::ended_well(&server, "the server", END);
        ended?;
        pod.remove(server)?;
        Ok(())
    }

    /// Runs it to be learned from; the name that the recording has for it.
    fn learn(&self) -> Result<String, Stop> {
        let pod = self.pod()?;
        let (server, _) = self.start(&pod, "learn")?;
        self.load(&pod)?;
        self.reload(&server)?;
        self.load(&pod)?;
        let name = server.id.clone();
        self.stop(&pod, server)?;
        pod.finish()?;
        Ok(name)
    }

    fn recordings(&self) -> String {
        self.place.join("recordings").display().to_string()
    }

    fn export(&self, container: &str) -> Outcome {
        let (recordings, file) = (self.recordings(), self.profile().display().to_string());
        let config = self.config();
        let profile = |args: &[&str]| -> Result<casemate_tests::run::Output, Stop> {
            let all = [&["profile", "--config", &config], args].concat();
            Ok(casemate(&all)?.ok()?)
        };
        let name = self.script.name.as_str();
        let of = ["--container", container];
        let export = [
            &["export", "--name", name, "-o", &file],
            &of[..],
            &[&recordings],
        ]
        .concat();
        let said = profile(&export)?.err();
        ensure_eq!(said, "", "warnings of export");
        let check = profile(&["check", name, &recordings])?;
        ensure_eq!(check.out(), "", "what its own profile would have refused");
        Ok(())
    }

    /// Runs it under what was learned.
    fn locked(&self) -> Result<Shown, Stop> {
        let pod = self.pod()?;
        let (server, pid) = self.start(&pod, &self.script.name)?;
        let reach = in_reach(&casemate_sys::seccomp::filters_of(pid)?)?;
        self.load(&pod)?;
        self.reload(&server)?;
        self.load(&pod)?;
        let refused = denials(&server)?;
        ensure!(refused.is_empty(), "refused: {refused:#?}");
        // And what it never did is refused, and told.
        let exec = Exec::new(&server, "unused", &UNUSED)?;
        exec.begin()?;
        ensure!(exec.wait()? != 0, "a symbolic link can be made");
        until("the refusal of a link", SHORT, || {
            let is_link = |d: &Value| d["syscall"] == "symlinkat" || d["syscall"] == "symlink";
            denials(&server).is_ok_and(|all| all.iter().any(is_link))
        })?;
        self.stop(&pod, server)?;
        pod.finish()?;
        let own = |name| shipped_program(name).map(<[u8]>::to_vec);
        let before: Vec<Vec<u8>> = ["agent", "default"].into_iter().filter_map(own).collect();
        Ok(Shown {
            reach,
            before: in_reach(&before)?,
        })
    }

    /// The same server under runc, in the network of a pod that has the load.
    fn under_runc(&self, container: &str) -> Outcome {
        if run(Command::new("runc").arg("--version"), &[], SHORT).is_err() {
            return Err(Stop::Skip("no runc".to_owned()));
        }
        let recordings = self.recordings();
        let export = [
            "profile",
            "export",
            "--container",
            container,
            "--format",
            "oci",
        ];
        let mut export = command(&export)?;
        export.arg(&recordings);
        let filter: Value = serde_json::from_str(&run(&mut export, &[], SHORT)?.ok()?.out())
            .map_err(|e| Stop::Fail(e.to_string()))?;
        let pod = self.pod()?;
        let runc = Runc::start(self, &pod, filter)?;
        self.load(&pod)?;
        runc.stop(self.signal("stop")?)?;
        Ok(pod.finish()?)
    }
}

/// A container of runc's, and the mount below it.
struct Runc {
    id: String,
    place: PathBuf,
    child: Child,
}

impl Runc {
    fn start(server: &Server<'_>, pod: &Pod, filter: Value) -> Result<Runc, Stop> {
        let place = server.place.join("runc");
        for name in ["upper", "work", "rootfs"] {
            fs::create_dir_all(place.join(name))?;
        }
        let options = format!(
            "lowerdir={}:{},upperdir={},workdir={}",
            server.prepared().display(),
            server.root.display(),
            place.join("upper").display(),
            place.join("work").display(),
        );
        let id = World::get()?.id("runc");
        let mut document = spec::default(&[], "rootfs", casemate_tests::bundle::NAMESPACE, &id);
        server.process(&mut document["process"])?;
        document["linux"]["seccomp"] = filter;
        document["linux"]["cgroupsPath"] = format!("/{id}").into();
        if let Some(list) = document["linux"]["namespaces"].as_array_mut() {
            list.retain(|namespace| namespace["type"] != "network");
            let path = format!("/proc/{}/ns/net", pod.pid);
            list.push(json!({"type": "network", "path": path}));
        }
        fs::write(place.join("config.json"), document.to_string())?;
        let mut mount = Command::new("mount");
        mount.args(["-t", "overlay", "overlay", "-o", &options]);
        run(mount.arg(place.join("rootfs")), &[], SHORT)?.ok()?;
        let log = fs::File::create(place.join("out"))?;
        let mut runc = Self::command(&place);
        runc.args(["run", "--bundle"]).arg(&place).arg(&id);
        runc.stdin(std::process::Stdio::null());
        runc.stdout(log.try_clone()?).stderr(log);
        Ok(Runc {
            child: runc.spawn()?,
            id,
            place,
        })
    }

    fn command(place: &Path) -> Command {
        let mut runc = Command::new("runc");
        runc.arg("--root").arg(place.join("state"));
        runc
    }

    /// Ends it, which it must do well.
    fn stop(mut self, signal: u32) -> Outcome {
        let said = || fs::read_to_string(self.place.join("out")).unwrap_or_default();
        let mut kill = Self::command(&self.place);
        kill.args(["kill", &self.id, &signal.to_string()]);
        let killed = run(&mut kill, &[], SHORT)?;
        ensure_eq!(
            killed.code(),
            0,
            "runc kill: {}: {}",
            killed.err(),
            last(&said())
        );
        let text = said();
        let mut status = None;
        until("runc's end", END, || {
            status = self.child.try_wait().ok().flatten();
            status.is_some()
        })?;
        let right = status.is_some_and(|status| status.success());
        ensure!(right, "under runc: {status:?}: {}", last(&text));
        Ok(())
    }
}

impl Drop for Runc {
    fn drop(&mut self) {
        let mut delete = Self::command(&self.place);
        let _ = run(delete.args(["delete", "--force", &self.id]), &[], SHORT);
        let _ = self.child.kill();
        let _ = self.child.wait();
        let target = self.place.join("rootfs");
        let _ = rustix::mount::unmount(&target, rustix::mount::UnmountFlags::DETACH);
    }
}

/// x86-64 numbers that these programs, as the kernel has them, leave in reach.
fn in_reach(programs: &[Vec<u8>]) -> Result<usize, Stop> {
    let parsed = programs.iter().map(|bytes| Program::from_bytes(bytes));
    let parsed: Option<Vec<Program>> = parsed.collect();
    let Some(parsed) = parsed.filter(|all| !all.is_empty()) else {
        return fail("no filters, or no programs");
    };
    let chain: Vec<&Program> = parsed.iter().collect();
    Ok(reachable(&chain, Abi::X86_64).len())
}

/// What of a container was refused, by the broker's count.
fn denials(task: &Task) -> Result<Vec<Value>, Stop> {
    let told = ask(task.rpc()?, "Denials", &json!({}), SHORT)?;
    let all = told["denials"].as_array().cloned().unwrap_or_default();
    Ok(all
        .into_iter()
        .filter(|d| d["container"] == task.id.as_str())
        .collect())
}

fn demonstrate(script: &Workload, root: &Path) -> Result<Shown, Stop> {
    let server = Server::new(script, root)?;
    server.prepare()?;
    let container = server.learn()?;
    server.export(&container)?;
    let shown = server.locked()?;
    if script.name == UNDER_RUNC {
        server.under_runc(&container)?;
    }
    let known = script.header("over").is_some();
    if known && shown.reach <= MOST {
        return fail(format!(
            "{} calls in reach, and its script says why that is more than {MOST}",
            shown.reach
        ));
    }
    if !known && shown.reach > MOST {
        let text = fs::read_to_string(server.profile())?;
        let names = text.lines().filter(|line| line.starts_with("syscalls"));
        let names: Vec<&str> = names.collect();
        return fail(format!(
            "{} calls in reach: {}",
            shown.reach,
            names.join("\n")
        ));
    }
    Ok(shown)
}

/// All of them, or one; whether they did as they should.
pub fn all(scripts: &[Workload], root: &Path) -> Result<bool, Box<dyn std::error::Error>> {
    let (mut good, mut rows) = (true, String::new());
    let status = fs::read_to_string(root.join("var/lib/dpkg/status"))?;
    for script in scripts {
        let begun = Instant::now();
        let mut shown = demonstrate(script, root);
        if let Err(Stop::Fail(why)) = &shown
            && once_more(&format!("{} learned", script.name), why)
        {
            shown = demonstrate(script, root);
        }
        let told = match shown {
            Ok(Shown { reach, before }) => {
                let package = script.header("packages").unwrap_or_default();
                let package = package.split(' ').next().unwrap_or_default();
                let version = version(&status, package).unwrap_or_default();
                let what = script.header("what").unwrap_or_default();
                let why = script.header("over");
                let why = why.map_or_else(String::new, |why| format!(": {why}"));
                writeln!(rows, "| {package} {version} | {what} | {reach}{why} |")?;
                format!("{reach} system calls in reach, of {before} under default")
            }
            Err(Stop::Fail(why) | Stop::Skip(why)) => {
                good = false;
                format!("FAILED: {why}")
            }
        };
        let took = begun.elapsed().as_secs_f32();
        println!("{:<9} learned  {took:6.1} s  {told}", script.name);
    }
    if good && std::env::var_os("CASEMATE_WRITE_DOCS").is_some_and(|set| !set.is_empty()) {
        let page = here().join("docs/learning.md");
        let text = fs::read_to_string(&page)?;
        let (before, after) = (text.find(TABLE), text.find(AFTER));
        let (Some(before), Some(after)) = (before, after) else {
            return Err(format!("{}: no table of servers", page.display()).into());
        };
        let head = &text[..before + TABLE.len()];
        fs::write(&page, format!("{head}{rows}{}", &text[after..]))?;
    }
    Ok(good)
}

/// Where the page's table begins and ends.
const TABLE: &str = "| Server | Load | Calls in reach |\n| --- | --- | --- |\n";
const AFTER: &str = "\nMade by `make learned";
