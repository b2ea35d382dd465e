//! Security modules of the node that know labels: whether they are on, and take
//! those that a specification asks for.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Write};

use casemate_spec::label::{Asked, Lsm};

/// `Y` where AppArmor is on.
const APPARMOR: &str = "/sys/module/apparmor/parameters/enabled";
/// Its loaded profiles, `NAME (MODE)` a line.
const PROFILES: &str = "/sys/kernel/security/apparmor/profiles";
/// Takes the labels that SELinux' policy has, and refuses others.
const CONTEXT: &str = "/sys/fs/selinux/context";

/// What the node's modules say. Nothing is looked at that isn't asked for.
pub struct Answers {
    apparmor: Answer,
    selinux: Answer,
}

/// Whether the module is on, or why it can't do it.
type Answer = Result<bool, String>;

impl Answers {
    /// Asks the node.
    pub fn to(asked: &Asked) -> Answers {
        Answers {
            apparmor: asked.apparmor.as_deref().map_or(Ok(false), apparmor),
            selinux: match asked.selinux.is_empty() {
                true => Ok(false),
                false => selinux(&asked.selinux),
            },
        }
    }

    /// Of AppArmor.
    pub fn apparmor(&self) -> Lsm<'_> {
        verdict(&self.apparmor)
    }

    /// Of SELinux.
    pub fn selinux(&self) -> Lsm<'_> {
        verdict(&self.selinux)
    }
}

fn verdict(answer: &Answer) -> Lsm<'_> {
    match answer {
        Ok(true) => Lsm::Takes,
        Ok(false) => Lsm::Missing,
        Err(why) => Lsm::Refuses(why),
    }
}

fn apparmor(profile: &str) -> Answer {
    let mut enabled = [0];
    match File::open(APPARMOR).and_then(|mut file| file.read_exact(&mut enabled)) {
        Ok(()) if enabled == *b"Y" => {}
        _ => return Ok(false),
    }
    let file = match File::open(PROFILES) {
        Ok(file) => file,
        Err(e) => {
            // The kernel says it again, when the profile is to be taken on.
            log::warn!("which AppArmor profiles are loaded can't be seen: {PROFILES}: {e}");
            return Ok(true);
        }
    };
    let loaded: Vec<(String, String)> = BufReader::new(file)
        .lines()
        .map_while(Result::ok)
        .filter_map(|line| split_mode(&line).map(|(name, mode)| (name.into(), mode.into())))
        .collect();
    for part in parts(profile) {
        match loaded.iter().find(|(name, _)| name == part) {
            None => return Err(format!("no profile {part} is loaded")),
            Some((_, mode)) if mode == "complain" || mode == "unconfined" => {
                log::warn!("AppArmor profile {part} is in mode {mode}: it forbids nothing");
            }
            Some(_) => {}
        }
    }
    Ok(true)
}

/// `NAME (MODE)`, as AppArmor writes labels.
pub fn split_mode(text: &str) -> Option<(&str, &str)> {
    let (name, mode) = text.trim_end().rsplit_once(" (")?;
    Some((name, mode.strip_suffix(')')?))
}

/// The profiles of an AppArmor label: several confine at once in a stack.
pub fn parts(label: &str) -> impl Iterator<Item = &str> {
    label.split("//&")
}

fn selinux(labels: &[String]) -> Answer {
    for label in labels {
        let file = OpenOptions::new().read(true).write(true).open(CONTEXT);
        let mut file = match file {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(format!("{CONTEXT}: {e}")),
        };
        if let Err(e) = file.write_all(label.as_bytes()) {
            return Err(format!("the node's policy doesn't take {label}: {e}"));
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_split_as_apparmor_writes_them() {
        assert_eq!(split_mode("a b (enforce)\n"), Some(("a b", "enforce")));
        assert_eq!(split_mode("a (x) (kill)"), Some(("a (x)", "kill")));
        assert_eq!(split_mode("unconfined"), None);
        assert_eq!(parts("a//&b").collect::<Vec<_>>(), ["a", "b"]);
    }
}
