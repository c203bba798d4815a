//! The pod's network, from outside.

use harness::cri::v1;

use crate::{Outcome, Suite};

pub(super) fn addresses(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let shell = suite.shell();
    let pod = suite.pod().id.clone();
    let addresses = kubelet.addresses(&pod);
    assert!(!addresses.is_empty());
    let inside = kubelet.output(&shell, "ip -o address; cat /sys/class/net/eth0/mtu");
    for address in &addresses {
        assert!(inside.contains(address.as_str()), "{address}: {inside}");
    }
    suite.with_node(|_| {
        assert_eq!(addresses.len(), 2, "one of each family: {addresses:?}");
        assert!(inside.ends_with("\n1400\n"), "{inside}");
    })
}

/// The second is of a network of its own, as meta plugins such as Multus make it.
pub(super) fn two_interfaces(suite: &Suite) -> Outcome {
    suite.with_node(|_| ())?;
    let shell = suite.shell();
    let script =
        "ip -o -4 address show eth1; ping -c 1 -w 20 10.214.7.1 | grep -c ' 0% packet loss'";
    let seen = suite.kubelet.output(&shell, script);
    assert!(seen.contains(" 10.214.7."), "{seen}");
    assert!(seen.ends_with("\n1\n"), "{seen}");
    Ok(())
}

pub(super) fn port_forward(suite: &Suite) -> Outcome {
    let kubelet = &suite.kubelet;
    let shell = suite.shell();
    let script = "mkdir -p /tmp/forward && echo forwarded > /tmp/forward/page && \
                  httpd -p 127.0.0.1:8085 -h /tmp/forward && httpd -p 8086 -h /tmp/forward";
    let _ = kubelet.output(&shell, script);
    // Once for what listens on the loopback interface alone, once for all.
    for port in [8085, 8086] {
        let request = v1::PortForwardRequest {
            pod_sandbox_id: suite.pod().id,
            port: vec![port],
        };
        let url = kubelet.cri.port_forward(request).unwrap().url;
        let mut session = suite.session(&url);
        // Both channels begin with the port's number.
        let greeting = session.receive().unwrap();
        assert_eq!(greeting.1, u16::try_from(port).unwrap().to_le_bytes());
        session.send(0, b"GET /page HTTP/1.0\r\n\r\n");
        session.expect(0, "forwarded");
    }
    // Nobody listens there: said, and the pod lives on.
    let request = v1::PortForwardRequest {
        pod_sandbox_id: suite.pod().id,
        port: vec![8099],
    };
    let url = kubelet.cri.port_forward(request).unwrap().url;
    let mut session = suite.session(&url);
    session.send(0, b"anybody?");
    let (stdout, _, _) = session.finish();
    assert!(stdout.len() <= 256, "{stdout}");
    assert_eq!(kubelet.output(&shell, "echo alive"), "alive\n");
    Ok(())
}
