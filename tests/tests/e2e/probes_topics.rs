//! Which trials stand for which topic of the probes, beside the probes themselves.

use std::collections::BTreeMap;

use casemate_tests::ensure;
use casemate_tests::probes::TOPICS;
use casemate_tests::skip::Outcome;

/// Probes that succeed on the host and have nothing to try inside: with the reason.
pub const NOT_TRIED: &[(&str, &str)] = &[
    (
        "T03.",
        "a user without privilege has no file of root's to begin with",
    ),
    (
        "T25.write-",
        "the files aren't in the part of the hierarchy that is shown",
    ),
];

/// Topic, and the trials that look from outside. With `cri`: one for each
/// containerd, named by what follows `criNN_`.
const TRIALS: &[(&str, &[&str])] = &[
    (
        "T01",
        &[
            "probes_t01_ids_of_two_pods",
            "locks_pods_are_apart",
            "sandbox_ranges_are_exclusive",
            "c119_ranges_are_one_pods",
        ],
    ),
    (
        "T02",
        &[
            "sandbox_capabilities_and_filters",
            "locks_exec_is_held_as_init",
            "c132_capabilities_known_and_unknown",
        ],
    ),
    (
        "T03",
        &["c129_no_new_privileges", "c128_set_uid_gains_where_it_may"],
    ),
    (
        "T04",
        &[
            "probes_t04_filters_are_the_same",
            "locks_exec_is_held_as_init",
        ],
    ),
    (
        "T05",
        &[
            "c127_default_seccomp_profile_of_containerd",
            "cri21_seccomp_localhost",
            "cri21_seccomp_unconfined_is_still_filtered",
        ],
    ),
    ("T07", &["locks_no_namespaces_below_the_container"]),
    (
        "T08",
        &[
            "locks_hold_against_all_capabilities",
            "locks_hold_with_every_privilege_granted",
            "c142_raw_mounts_are_refused",
        ],
    ),
    (
        "T09",
        &[
            "locks_hold_against_all_capabilities",
            "locks_hold_against_a_hostile_agent",
            "sandbox_read_only_rootfs",
            "cri21_sub_path",
        ],
    ),
    ("T10", &["c123_recursive_read_only"]),
    (
        "T11",
        &[
            "c125_masked_and_read_only_paths",
            "sandbox_masked_and_read_only_paths",
        ],
    ),
    (
        "T12",
        &[
            "hostile_links_where_the_sandbox_mounts",
            "hostile_links_stay_inside_the_root",
            "ctr_hostile_links",
            "ctr_hostile_passwd",
            "hostile_masks_through_links",
            "bad_mount_target_through_a_link",
        ],
    ),
    (
        "T13",
        &[
            "hostile_source_that_vanishes",
            "hostile_race_of_a_volumes_source",
            "hostile_race_of_a_volumes_parent",
            "hostile_race_of_a_mounts_target",
            "hostile_race_of_an_execs_directory",
            "cri21_sub_path",
        ],
    ),
    (
        "T14",
        &[
            "sandbox_bad_cwd",
            "ctr_bad_cwd",
            "exec_cwd_through_hostile_links",
            "hostile_race_of_an_execs_directory",
        ],
    ),
    (
        "T15",
        &[
            "c136_only_three_descriptors",
            "cri21_c136_no_descriptor_leaks_in",
        ],
    ),
    (
        "T16",
        &[
            "probes_t16_a_hundred_hostile_execs",
            "c137_own_binary_is_out_of_reach",
            "cri21_c137_binaries_of_the_host",
        ],
    ),
    (
        "T17",
        &["locks_agent_is_out_of_reach", "c115_shared_pid_namespace"],
    ),
    (
        "T18",
        &[
            "pod_siblings_signal_but_do_not_trace",
            "c116_pid_namespaces_of_others_are_refused",
            "locks_pods_are_apart",
        ],
    ),
    ("T19", &["probes_t19_pods_find_nothing_of_each_other"]),
    (
        "T20",
        &[
            "locks_own_device_nodes",
            "c133_device_rules",
            "sandbox_device_nodes_are_safe",
        ],
    ),
    (
        "T21",
        &[
            "c065_terminal_of_an_exec",
            "c066_resize",
            "terminal_hangs_up_when_the_shim_lets_go",
        ],
    ),
    (
        "T22",
        &[
            "cri21_ping_without_capabilities",
            "cri21_localhost_is_the_pods",
        ],
    ),
    (
        "T23",
        &["cri21_guard_metadata_is_cut_off", "cri21_guard_stays"],
    ),
    (
        "T24",
        &["c135_sysctls_of_the_pod_alone", "cri21_sysctl_of_the_node"],
    ),
    (
        "T25",
        &[
            "sandbox_processes_are_in_their_cgroup",
            "cri21_c126_cgroup_mount",
        ],
    ),
    (
        "T26",
        &[
            "sandbox_cgroup_limits_are_in_force",
            "sandbox_memory_limit_kills_and_tells",
            "oci_rlimits",
            "cri21_c084_c085_out_of_memory_is_reported",
        ],
    ),
    ("T29", &["locks_session_keyring_is_its_own"]),
    (
        "T31",
        &[
            "broker_answers_what_the_filter_would",
            "broker_dead_is_a_dead_pod",
            "broker_stopped_ends_the_pod_in_time",
        ],
    ),
    (
        "T32",
        &[
            "c141_agent_that_lies_of_itself",
            "c141_agent_that_lies_as_a_forker",
            "c141_forker_that_lies_of_an_exec",
            "c141_forker_that_lies_of_an_exit",
            "c141_flood_of_messages_stays_in_its_pod",
            "fault_wedged_forker_and_agent",
        ],
    ),
    (
        "T33",
        &[
            "fault_killed_shim_after_every_effect",
            "fault_stopped_shim_after_every_journal_line",
            "c109_containerd_restarts",
            "c104_delete_after_the_shim_was_killed",
        ],
    ),
    (
        "T34",
        &[
            "probes_t34_a_storm_of_forks_and_memory",
            "hostile_fork_bomb",
        ],
    ),
    (
        "T35",
        &[
            "hostile_no_user_namespaces_on_the_node",
            "hostile_masked_proc_on_the_node",
            "hostile_no_cgroups_on_the_node",
            "hostile_shim_without_privilege",
        ],
    ),
    (
        "T36",
        &["probes_t36_files_with_privilege_stay_where_they_are"],
    ),
    (
        "T37",
        &[
            "cri21_privileged_pod",
            "cri21_c118_host_pid",
            "cri21_c118_host_ipc",
            "cri21_c118_host_network",
            "c118_host_namespaces",
        ],
    ),
    (
        "T38",
        &[
            "posture_of_pods_as_promised",
            "posture_a_process_that_came_from_outside",
        ],
    ),
];

/// Topics that nothing stands for yet, and why.
pub const OPEN: &[(&str, &str)] = &[];

/// The same as a map.
pub fn trials() -> BTreeMap<String, Vec<String>> {
    TRIALS
        .iter()
        .map(|(topic, names)| {
            let names = names.iter().map(|n| (*n).to_owned()).collect();
            ((*topic).to_owned(), names)
        })
        .collect()
}

/// Every topic has probes or trials, and every trial that is named exists.
pub fn are_whole(known: &[String], probes: &[String]) -> Outcome {
    let mut wrong = Vec::new();
    for (topic, _) in TOPICS {
        let prefix = format!("{topic}.");
        let named = TRIALS
            .iter()
            .any(|(t, names)| *t == topic && !names.is_empty());
        let probed = probes.iter().any(|id| id.starts_with(&prefix));
        let open = OPEN.iter().any(|(t, _)| *t == topic);
        if open == (named || probed) {
            wrong.push(format!(
                "{topic}: neither probes nor trials, or open with some"
            ));
        }
    }
    for (topic, names) in TRIALS {
        for name in *names {
            if !known.iter().any(|k| k == name) {
                wrong.push(format!("{topic}: no trial {name}"));
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("; "));
    Ok(())
}
