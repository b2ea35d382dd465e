use super::*;

fn rules(egress: Option<&str>, ingress: Option<&str>) -> Result<Rules, String> {
    let network = Network::default();
    Rules::of(egress, ingress, &network, false, || {
        vec!["192.0.2.53".parse().unwrap()]
    })
    .map_err(|e| e.to_string())
}

#[test]
fn entries_are_read_as_they_are_written() {
    for (text, shown) in [
        ("10.0.0.0/8:443", "10.0.0.0/8:443"),
        ("10.1.2.3:443/tcp", "10.1.2.3:443/tcp"),
        ("10.1.2.3/32:53/udp", "10.1.2.3:53/udp"),
        ("0.0.0.0/0:1-65535/sctp", "0.0.0.0/0:1-65535/sctp"),
        ("10.0.0.0/8:*/tcp", "10.0.0.0/8:*/tcp"),
        ("10.0.0.0/8:*", "10.0.0.0/8"),
        ("[2001:db8::]/32:8000-8999", "[2001:db8::]/32:8000-8999"),
        ("[2001:db8::1]:443/tcp", "[2001:db8::1]:443/tcp"),
        ("[::]/0:443", "[::]/0:443"),
    ] {
        let list: List = text.parse().unwrap();
        assert_eq!(list.entries.len(), 1);
        assert_eq!(list.entries[0].to_string(), shown);
        let again: Entry = shown.parse().unwrap();
        assert_eq!(again, list.entries[0], "{shown}");
    }
    let list: List = " 10.0.0.0/8:443 , cluster-dns,[::1]:1 ".parse().unwrap();
    assert_eq!((list.entries.len(), list.cluster_dns), (2, true));
    assert_eq!("none".parse::<List>().unwrap(), List::default());
}

#[test]
fn what_is_wrong_with_an_entry_is_told() {
    for (text, why) in [
        ("10.0.0.1/8:443", "is 10.0.0.0/8 meant?"),
        ("[2001:db8::1]/32:443", "is 2001:db8::/32 meant?"),
        ("10.0.0.0/33:443", "a prefix that isn't 0 to 32"),
        ("10.0.0.0/+8:443", "a prefix that isn't"),
        ("10.0.0.0/8", "no port"),
        ("10.0.0.0/8:0", "no port from 1"),
        ("10.0.0.0/8:9-8", "no port from 1"),
        ("10.0.0.0/8:65536", "no port from 1"),
        ("10.0.0.0/8:+1", "no port from 1"),
        ("10.0.0.0/8:http", "no port from 1"),
        ("10.0.0.0/8:80/icmp", "isn't tcp, udp or sctp"),
        ("2001:db8::1:443", "without [ and ]"),
        ("[::ffff:10.0.0.1]:443", "in the form of IPv6"),
        ("example.org:443", "no address"),
        ("10.0.0.0/8:443,", "is no entry"),
        ("", "is no entry"),
        ("none,10.0.0.0/8:443", "beside other entries"),
        ("10.0.0.0/8:443 10.0.0.0/8:80", "IPv6 without"),
    ] {
        let error = rules(Some(text), None).unwrap_err();
        assert!(error.contains(why), "{text}: {error}");
        assert!(error.contains("casemate.io/egress"), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }
    let many = vec!["10.0.0.0/8:1"; MOST + 1].join(",");
    let error = rules(Some(&many), None).unwrap_err();
    assert!(error.contains("more than 256"), "{error}");
}

#[test]
fn metadata_is_cut_off_unless_the_node_says_otherwise() {
    let all = rules(None, None).unwrap();
    assert_eq!((all.egress, all.ingress), (None, None));
    assert_eq!(all.denied.len(), METADATA.len() + 1, "{:?}", all.denied);
    let first = all.denied[0].0.to_string();
    assert_eq!(first, "169.254.169.254");
    let network = Network {
        metadata: Metadata::Allow,
        deny: vec!["10.0.0.0/8".parse().unwrap()],
        ..Network::default()
    };
    let rules = Rules::of(None, None, &network, false, Vec::new).unwrap();
    assert_eq!(rules.denied.len(), 1);
}

#[test]
fn the_clusters_names_are_those_of_the_pod_or_of_the_node() {
    let of = rules(Some("cluster-dns"), None).unwrap().egress.unwrap();
    assert_eq!(of.len(), 1);
    assert_eq!(of[0].to_string(), "192.0.2.53:53");
    let network = Network {
        cluster_dns: vec!["fd00::10".parse().unwrap()],
        ..Network::default()
    };
    let of = Rules::of(Some("cluster-dns"), None, &network, false, Vec::new).unwrap();
    assert_eq!(of.egress.unwrap()[0].to_string(), "[fd00::10]:53");
    let nothing = Rules::of(
        Some("cluster-dns"),
        None,
        &Network::default(),
        false,
        Vec::new,
    );
    let error = nothing.unwrap_err().to_string();
    assert!(error.contains("stands for nothing"), "{error}");
    let error = rules(None, Some("cluster-dns")).unwrap_err();
    assert!(error.contains("casemate.io/ingress"), "{error}");
    let text = "# nameserver 1.1.1.1\nnameserver 10.0.0.10\nnameserver x\n\
                search a\nnameserver fe80::1%eth0 \n";
    let read: Vec<String> = nameservers(text).iter().map(ToString::to_string).collect();
    assert_eq!(read, ["10.0.0.10", "fe80::1"]);
}

#[test]
fn the_hosts_network_takes_no_lists() {
    let network = Network::default();
    let none = Rules::of(None, None, &network, true, Vec::new).unwrap();
    assert_eq!(none, Rules::default());
    let error = Rules::of(None, Some("none"), &network, true, Vec::new).unwrap_err();
    assert_eq!(error.rule, "network-list-host");
    assert!(error.to_string().contains("casemate.io/ingress"), "{error}");
}

#[test]
fn the_nodes_probes_come_in() {
    let network = Network {
        nodes: vec!["192.0.2.0/24".parse().unwrap()],
        ..Network::default()
    };
    let rules = Rules::of(None, Some("none"), &network, false, Vec::new).unwrap();
    assert_eq!(rules.ingress.unwrap()[0].to_string(), "192.0.2.0/24");
}

#[test]
fn the_port_lock_is_asked_for_by_naming_loopback() {
    let of = |egress: Option<&str>, ingress: Option<&str>| rules(egress, ingress).unwrap();
    let all = of(None, None);
    assert_eq!((all.connect.ports(), all.listen.ports()), (None, None));
    let list = "10.0.0.0/8:443, 10.0.0.0/8:90-95/udp, cluster-dns";
    for text in [list.to_owned(), format!("{list}, loopback:*")] {
        assert_eq!(of(Some(&text), None).connect.ports(), None, "{text}");
    }
    for (text, ports) in [
        (format!("{list},loopback:none"), &[(53, 53), (443, 443)][..]),
        (
            format!("loopback:8080,loopback:50-52, {list}, loopback:8070-8090"),
            &[(50, 53), (443, 443), (8070, 8090)],
        ),
        ("loopback:7".into(), &[(7, 7)]),
        ("loopback:none".into(), &[]),
    ] {
        let rules = of(Some(&text), Some("10.0.0.0/8:80-81/tcp"));
        assert_eq!(rules.connect.ports(), Some(ports), "{text}");
        assert_eq!(rules.listen.ports(), None);
        if text.starts_with("loopback:7") || text == "loopback:none" {
            assert_eq!(rules.egress, Some(Vec::new()), "nothing leaves: {text}");
        }
    }
    let rules = of(None, Some("10.0.0.0/8:80-81, loopback:none"));
    assert_eq!(rules.listen.ports(), Some(&[(80, 81)][..]));
}

#[test]
fn a_port_lock_that_would_hold_nothing_is_refused() {
    for (text, why) in [
        ("10.0.0.0/8:*, loopback:1", "has all ports of TCP"),
        ("10.0.0.0/8:*/tcp, loopback:none", "has all ports of TCP"),
        (
            "10.0.0.0/8:1-2000, loopback:1",
            "2000, and 1024 is the most",
        ),
        ("loopback:1, loopback:none", "beside other entries"),
        ("loopback:none, loopback:1", "beside loopback:none"),
        ("loopback:*, loopback:1", "beside other entries"),
        ("loopback:0", "no port from 1"),
        ("loopback:1/tcp", "no port from 1"),
        ("loopback", "has no port"),
    ] {
        let error = rules(Some(text), None).unwrap_err();
        assert!(error.contains(why), "{text}: {error}");
        let error = rules(None, Some(text)).unwrap_err();
        assert!(error.contains(why), "{text}: {error}");
    }
    // All ports of something else is no matter.
    rules(Some("10.0.0.0/8:*/udp, loopback:1"), None).unwrap();
}
