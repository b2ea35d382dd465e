//! What becomes of a bind whose file system can't map ids: one row for each kind
//! of file system, and the decision. docs/volumes.md has it as a table, which a
//! test compares.

use casemate_spec::config::WithoutIdmap;

/// What a file system is, where its ids can't be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Files that stay: what a pod writes there has ids that the next one doesn't.
    Lasting,
    /// Files that go with the pod, or at the latest with the node's next start.
    Memory,
    /// The kernel's own state of the node.
    Kernel,
}

/// A kind of file system.
#[derive(Debug)]
pub struct Row {
    /// Names, as in /proc/filesystems.
    pub name: &'static str,
    /// `f_type` of statfs(2).
    magic: &'static [u64],
    /// Since which Linux it maps ids (mount_setattr(2)); empty: not at all.
    pub since: &'static str,
    /// What it is where it can't.
    pub class: Class,
}

const fn row(name: &'static str, magic: &'static [u64], since: &'static str, class: Class) -> Row {
    Row {
        name,
        magic,
        since,
        class,
    }
}

use Class::{Kernel, Lasting, Memory};

static TABLE: &[Row] = &[
    row("ext2, ext3, ext4", &[0xef53], "5.12", Lasting),
    row("xfs", &[0x5846_5342], "5.12", Lasting),
    row("btrfs", &[0x9123_683e], "5.15", Lasting),
    row("f2fs", &[0xf2f5_2010], "5.18", Lasting),
    row("vfat", &[0x4d44], "5.12", Lasting),
    row("ntfs3", &[0x7366_746e], "5.15", Lasting),
    row("erofs", &[0xe0f5_e1e2], "5.19", Lasting),
    row("squashfs", &[0x7371_7368], "6.2", Lasting),
    row("ceph", &[0x00c3_6400], "6.7", Lasting),
    row(
        "fuse, virtiofs",
        &[0x6573_5546],
        "6.12, if its server allows",
        Lasting,
    ),
    row("overlay", &[0x794c_7630], "", Lasting),
    row("nfs", &[0x6969], "", Lasting),
    row(
        "cifs, smb3",
        &[0xff53_4d42, 0xfe53_4d42, 0x517b],
        "",
        Lasting,
    ),
    row("9p", &[0x0102_1997], "", Lasting),
    row("tmpfs", &[0x0102_1994], "6.3", Memory),
    row("hugetlbfs", &[0x9584_58f6], "6.9", Memory),
    row("ramfs", &[0x8584_58f6], "", Memory),
    row("proc", &[0x9fa0], "", Kernel),
    row("sysfs", &[0x6265_6572], "", Kernel),
    row("cgroup, cgroup2", &[0x0027_e0eb, 0x6367_7270], "", Kernel),
    row("debugfs, tracefs", &[0x6462_6720, 0x7472_6163], "", Kernel),
    row("securityfs", &[0x7363_6673], "", Kernel),
    row(
        "selinuxfs, smackfs",
        &[0xf97c_ff8c, 0x4341_5d53],
        "",
        Kernel,
    ),
    row("configfs", &[0x6265_6570], "", Kernel),
    row("bpf", &[0xcafe_4a11], "", Kernel),
    row("nsfs", &[0x6e73_6673], "", Kernel),
    row("devpts", &[0x1cd1], "", Kernel),
    row("mqueue", &[0x1980_0202], "", Kernel),
    row("binfmt_misc", &[0x4249_4e4d], "", Kernel),
    row("pstore, efivarfs", &[0x6165_676c, 0xde5e_81e4], "", Kernel),
];

/// Every other one.
static OTHER: Row = row("any other", &[], "", Lasting);

/// The row of a file system, by its `f_type`.
pub fn of(magic: u64) -> &'static Row {
    TABLE
        .iter()
        .find(|row| row.magic.contains(&magic))
        .unwrap_or(&OTHER)
}

/// What to do with a bind that can't be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Shown with the ids on disk, of which the pod has none: what others may
    /// read or write, it may.
    PassThrough,
    /// As [`Fate::PassThrough`] if everything in it may be read by others, else
    /// copied, if it is small.
    Copy,
    /// The container doesn't start.
    Refuse,
}

/// The decision.
pub fn fate(class: Class, read_only: bool, policy: WithoutIdmap) -> Fate {
    match (class, policy) {
        (Kernel, _) | (_, WithoutIdmap::Refuse) => Fate::Refuse,
        (Memory, _) if read_only => Fate::Copy,
        (Memory, _) | (Lasting, WithoutIdmap::PassThrough) => Fate::PassThrough,
        (Lasting, WithoutIdmap::ReadOnly) if read_only => Fate::PassThrough,
        (Lasting, WithoutIdmap::ReadOnly) => Fate::Refuse,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(fate: Fate) -> &'static str {
        match fate {
            Fate::PassThrough => "unmapped",
            Fate::Copy => "unmapped, or a copy",
            Fate::Refuse => "refused",
        }
    }

    /// The table as docs/volumes.md has it.
    fn markdown() -> String {
        let mut text = String::from(
            "| File system | Maps ids since Linux | Read-only, else | Writable, else | \
             Writable, `\"pass-through\"` |\n| --- | --- | --- | --- | --- |\n",
        );
        for row in TABLE.iter().chain([&OTHER]) {
            let fate = |read_only, policy| word(fate(row.class, read_only, policy));
            let since = if row.since.is_empty() {
                "–"
            } else {
                row.since
            };
            text += &format!(
                "| {} | {since} | {} | {} | {} |\n",
                row.name,
                fate(true, WithoutIdmap::ReadOnly),
                fate(false, WithoutIdmap::ReadOnly),
                fate(false, WithoutIdmap::PassThrough),
            );
        }
        text
    }

    #[test]
    fn the_document_has_this_table() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/volumes.md");
        let document = std::fs::read_to_string(path).unwrap();
        let table = markdown();
        assert!(
            document.contains(&table),
            "docs/volumes.md must have exactly this:\n{table}"
        );
    }

    #[test]
    fn no_magic_is_there_twice_and_what_is_unknown_lasts() {
        let all: Vec<u64> = TABLE.iter().flat_map(|r| r.magic).copied().collect();
        for magic in &all {
            assert_eq!(all.iter().filter(|m| *m == magic).count(), 1, "{magic:x}");
        }
        assert_eq!(of(0x1234_5678).class, Class::Lasting);
        assert_eq!(of(0xef53).name, "ext2, ext3, ext4");
    }

    #[test]
    fn refuse_refuses_all_and_nothing_shows_the_kernel() {
        for read_only in [false, true] {
            for class in [Lasting, Memory, Kernel] {
                assert_eq!(fate(class, read_only, WithoutIdmap::Refuse), Fate::Refuse);
            }
            assert_eq!(
                fate(Kernel, read_only, WithoutIdmap::PassThrough),
                Fate::Refuse
            );
        }
    }
}
