//! The pages of the documentation: their links, and the blocks of shell in them
//! that tests run as they stand.
//!
//! A block whose fence says `sh test` is run; where a block follows whose fence says
//! `text output`, each of its lines must be a part of what came out, in this order.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use crate::error::{Result, file};

/// A block of shell to be run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Line of the page at which it begins.
    pub line: usize,
    /// What to run.
    pub script: String,
    /// What its output must have, in order.
    pub output: Vec<String>,
}

/// The checkout.
#[must_use]
pub fn top() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_owned()
}

/// All pages: those of the top and of `docs/`.
///
/// # Errors
/// A directory can't be listed, or a page can't be read.
pub fn all() -> Result<BTreeMap<PathBuf, String>> {
    let mut pages = BTreeMap::new();
    for dir in [top(), top().join("docs")] {
        let list = std::fs::read_dir(&dir).map_err(file("list", &dir))?;
        for entry in list.flatten() {
            let path = entry.path();
            if path.extension().is_some_and(|e| e == "md") {
                let text = std::fs::read_to_string(&path).map_err(file("read", &path))?;
                pages.insert(path, text);
            }
        }
    }
    Ok(pages)
}

/// The lines outside of fenced blocks, with their numbers.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    text.lines().enumerate().filter_map(move |(at, line)| {
        let is_fence = line.trim_start().starts_with("```");
        fenced ^= is_fence;
        (!fenced && !is_fence).then_some((at + 1, line))
    })
}

/// The blocks of a page that are to be run.
#[must_use]
pub fn blocks(text: &str) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((at, line)) = lines.next() {
        let Some(kind) = line.strip_prefix("```").filter(|kind| !kind.is_empty()) else {
            continue;
        };
        let inner: Vec<&str> = lines
            .by_ref()
            .map(|(_, line)| line)
            .take_while(|line| !line.starts_with("```"))
            .collect();
        match (kind, blocks.last_mut()) {
            ("sh test", _) => blocks.push(Block {
                line: at + 1,
                script: inner.join("\n"),
                output: Vec::new(),
            }),
            ("text output", Some(last)) => {
                last.output = inner.iter().map(|&l| l.to_owned()).collect()
            }
            _ => {}
        }
    }
    blocks
}

/// The first line of `wanted` that `output` doesn't have where it should.
#[must_use]
pub fn missing<'a>(wanted: &'a [String], output: &str) -> Option<&'a str> {
    let mut rest = output.lines();
    wanted
        .iter()
        .find(|part| !rest.any(|line| line.contains(part.as_str())))
        .map(String::as_str)
}

/// What a heading is called in links, as code hosts make it.
fn anchor(heading: &str) -> String {
    heading
        .chars()
        .filter_map(|c| match c {
            ' ' => Some('-'),
            c if c.is_alphanumeric() || c == '-' || c == '_' => Some(c),
            _ => None,
        })
        .flat_map(char::to_lowercase)
        .collect()
}

fn anchors(text: &str) -> BTreeSet<String> {
    prose(text)
        .filter_map(|(_, line)| {
            let heading = line.trim_start_matches('#');
            (heading.len() < line.len()).then(|| anchor(heading.trim()))
        })
        .collect()
}

/// Targets of the links of a line: `[text](target)`.
fn targets(line: &str) -> impl Iterator<Item = &str> {
    line.split("](")
        .skip(1)
        .filter_map(|rest| rest.split_once(')').map(|(target, _)| target))
}

/// Links to pages, parts of pages and files that aren't there: `PAGE:LINE: TARGET`.
#[must_use]
pub fn broken(pages: &BTreeMap<PathBuf, String>) -> Vec<String> {
    let mut broken = Vec::new();
    for (page, text) in pages {
        let dir = page.parent().unwrap_or(page);
        for (number, line) in prose(text) {
            for target in targets(line).filter(|t| !t.contains("://")) {
                let (path, part) = target.split_once('#').unwrap_or((target, ""));
                let path = if path.is_empty() {
                    page.clone()
                } else {
                    plain(&dir.join(path))
                };
                let is_there = path.exists()
                    && (part.is_empty()
                        || pages
                            .get(&path)
                            .is_some_and(|text| anchors(text).contains(part)));
                if !is_there {
                    broken.push(format!("{}:{number}: {target}", page.display()));
                }
            }
        }
    }
    broken
}

/// Without `..`, as the pages are named.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        if part == std::path::Component::ParentDir {
            plain.pop();
        } else {
            plain.push(part);
        }
    }
    plain
}

/// Pages of `docs/` to which no other page leads.
#[must_use]
pub fn lost(pages: &BTreeMap<PathBuf, String>) -> Vec<String> {
    let mut led = BTreeSet::new();
    for (page, text) in pages {
        let dir = page.parent().unwrap_or(page);
        for (_, line) in prose(text) {
            for target in targets(line) {
                let path = target.split('#').next().unwrap_or_default();
                let to = plain(&dir.join(path));
                if to != *page {
                    led.insert(to);
                }
            }
        }
    }
    let docs = top().join("docs");
    let unled = pages
        .keys()
        .filter(|page| page.starts_with(&docs) && !led.contains(*page));
    unled.map(|page| page.display().to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_every_link_leads_somewhere() {
        let pages = all().unwrap();
        assert!(pages.len() > 10, "{} pages", pages.len());
        assert_eq!(broken(&pages), Vec::<String>::new());
        assert_eq!(lost(&pages), Vec::<String>::new());
    }

    #[test]
    fn pages_broken_links_are_found() {
        let page = top().join("docs/x.md");
        let text = "# A `b` c, d\n[1](x.md#a-b-c-d) [2](#a-b-c-d) [3](none.md) [4](#none)\n\
                    ```\n[5](in-a-block.md)\n```\n[6](../README.md) [7](https://example.org/x)\n";
        let pages = BTreeMap::from([(page.clone(), text.to_owned())]);
        let page = page.display();
        // The page itself isn't on the disk.
        let ends = |n: &str| format!("{page}:2: {n}");
        let found = broken(&pages);
        assert_eq!(
            found,
            [
                ends("x.md#a-b-c-d"),
                ends("#a-b-c-d"),
                ends("none.md"),
                ends("#none")
            ]
        );
    }

    #[test]
    fn pages_blocks_and_their_output() {
        let text =
            "a\n```sh test\necho 1\necho 2\n```\n\n```text output\n1\n2\n```\n```sh\nno\n```\n";
        let blocks = blocks(text);
        assert_eq!(blocks.len(), 1);
        assert_eq!(blocks[0].script, "echo 1\necho 2");
        assert_eq!(missing(&blocks[0].output, "x1x\n\n2"), None);
        assert_eq!(missing(&blocks[0].output, "2\n1"), Some("2"));
    }
}
