//! Compiles every profile under `profiles/` into the bytes that seccomp(2) takes.

#![allow(dead_code, missing_docs)]

use std::error::Error;
use std::fmt::Write as _;
use std::path::Path;
use std::{env, fs};

use compile::Form;

#[path = "src/action.rs"]
mod action;
#[path = "src/args.rs"]
mod args;
#[path = "src/compile.rs"]
mod compile;
#[path = "src/errno.rs"]
mod errno;
#[path = "src/explain.rs"]
mod explain;
#[path = "src/graph.rs"]
mod graph;
#[path = "src/interp.rs"]
mod interp;
#[path = "src/profile.rs"]
mod profile;
#[path = "src/program.rs"]
mod program;
#[path = "src/table.rs"]
mod table;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=profiles");
    println!("cargo::rerun-if-changed=src");
    println!("cargo::rerun-if-changed=build.rs");
    let out = env::var("OUT_DIR")?;
    let root = env::var("CARGO_MANIFEST_DIR")?;
    let mut paths = fs::read_dir(Path::new(&root).join("profiles"))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()?;
    paths.retain(|path| path.extension().is_some_and(|ext| ext == "toml"));
    paths.sort();

    let mut list = String::from("static SHIPPED: &[Shipped] = &[\n");
    let mut texts = String::from("static TEXTS: &[(&str, &str)] = &[\n");
    for path in paths {
        let stem = path
            .file_stem()
            .and_then(|stem| stem.to_str())
            .ok_or_else(|| format!("{}: the name is not UTF-8", path.display()))?;
        let text = fs::read_to_string(&path)?;
        let wrong = |reason: String| format!("{}: {reason}", path.display());
        let profile = profile::Profile::from_toml(&text).map_err(|e| wrong(e.to_string()))?;
        if profile.name != stem {
            return Err(wrong(format!("name is \"{}\", must be \"{stem}\"", profile.name)).into());
        }
        let mut programs = Vec::new();
        for form in [Form::Enforce, Form::Notify, Form::Explain] {
            let compiled = compile::compile_as(&profile, form).map_err(|e| wrong(e.to_string()))?;
            let bytes = Path::new(&out).join(format!("{stem}.{form:?}.bpf"));
            fs::write(&bytes, compiled.to_bytes())?;
            programs.push(format!("include_bytes!({bytes:?})"));
        }
        writeln!(
            list,
            "Shipped {{ name: {stem:?}, enforce: {}, notify: {}, explain: {}, rules: &[",
            programs[0], programs[1], programs[2],
        )?;
        for rule in explain::rules(&profile) {
            writeln!(
                list,
                "RuleInfo {{ id: Cow::Borrowed({:?}), action: Action::{:?}, quiet: {}, reason: Cow::Borrowed({:?}) }},",
                rule.id, rule.action, rule.quiet, rule.reason,
            )?;
        }
        list.push_str("] },\n");
        writeln!(texts, "({stem:?}, include_str!({path:?})),")?;
    }
    list.push_str("];\n");
    list.push_str(&texts);
    list.push_str("];\n");
    fs::write(Path::new(&out).join("shipped.rs"), list)?;
    Ok(())
}
