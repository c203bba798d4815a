//! WASI 0.2: sockets in the lane's network, and servers of HTTP requests.

use super::*;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use wasm_host::Network;

/// A port that stays free: below those that the kernel gives to clients.
fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let first = std::process::id();
    let ports = std::iter::repeat_with(|| {
        let number = first.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        20_000 + u16::try_from(number % 10_000).unwrap()
    });
    let free = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
    ports.take(10_000).find(free).unwrap()
}

#[tokio::test]
async fn a_tcp_server_serves_where_it_may() {
    harness::skip_if!(harness::wasm::clang_missing());
    let program = load(&harness::wasm::echo()).await;
    assert_eq!(program.kind(), "component");
    let port = free_port().to_string();
    let denied = settings(&[&port]);
    let (code, out, _) = run(&program, denied.clone()).await;
    assert_eq!(code, 1, "{out}");

    let granted = Settings {
        network: Network::Namespace,
        ..denied
    };
    let mut server = start(&program, granted).await;
    server.says("listening").await;
    for _ in 0..2 {
        let mut client = TcpStream::connect(format!("127.0.0.1:{port}"))
            .await
            .unwrap();
        client.write_all(b"to a guest and back").await.unwrap();
        client.shutdown().await.unwrap();
        let mut back = String::new();
        client.read_to_string(&mut back).await.unwrap();
        assert_eq!(back, "to a guest and back");
    }
    // It waits in accept.
    server.process.signal(15);
    assert_eq!(server.end().await.0.code, 143);
}

#[tokio::test]
async fn a_udp_server_serves_where_it_may() {
    harness::skip_if!(harness::wasm::clang_missing());
    let program = load(&harness::wasm::echo()).await;
    let client = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let port = {
        let free = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        free.local_addr().unwrap().port()
    };
    let denied = settings(&["udp", &port.to_string()]);
    assert_eq!(run(&program, denied.clone()).await.0, 1);
    let granted = Settings {
        network: Network::Namespace,
        ..denied
    };
    // A confined thread may do so as well.
    let lane = Lane::start(LaneConfig {
        seccomp: true,
        ..LaneConfig::default()
    })
    .unwrap();
    let mut server = start_on(&lane, &program, granted).await;
    server.says("listening").await;
    for text in ["one", "and another"] {
        client
            .send_to(text.as_bytes(), ("127.0.0.1", port))
            .await
            .unwrap();
        let mut back = [0; 64];
        let answer = tokio::time::timeout(LIMIT, client.recv_from(&mut back)).await;
        let (bytes, from) = answer.expect("an answer").unwrap();
        assert_eq!((&back[..bytes], from.port()), (text.as_bytes(), port));
    }
    server.process.signal(15);
    assert_eq!(server.end().await.0.code, 143);
}

#[tokio::test]
async fn names_are_looked_up_where_that_is_granted() {
    harness::skip_if!(harness::wasm::clang_missing());
    let program = load(&harness::wasm::echo()).await;
    let mut lookup = settings(&["lookup", "localhost"]);
    let (code, out, _) = run(&program, lookup.clone()).await;
    assert_eq!(code, 1, "{out}");
    lookup.network = Network::Namespace;
    // A confined thread may do so as well.
    let lane = Lane::start(LaneConfig {
        seccomp: true,
        ..LaneConfig::default()
    })
    .unwrap();
    let (exit, out, _) = start_on(&lane, &program, lookup).await.end().await;
    let code = exit.code;
    assert!(
        code == 0 && out.ends_with("addresses\n") && !out.starts_with('0'),
        "{out}"
    );
}

#[tokio::test]
async fn a_component_knows_where_it_begins() {
    harness::skip_if!(harness::wasm::clang_missing());
    let program = load(&harness::wasm::echo()).await;
    let begins = Settings {
        cwd: Some("/work".to_owned()),
        ..settings(&["cwd"])
    };
    assert_eq!(run(&program, begins).await.1, "/work\n");
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut client = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    client.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    answer
}

#[tokio::test]
async fn a_proxy_serves_requests_side_by_side() {
    harness::skip_if!(harness::wasm::clang_missing());
    let program = load(&harness::wasm::proxy()).await;
    assert!(program.is_proxy());
    let address: SocketAddr = format!("127.0.0.1:{}", free_port()).parse().unwrap();
    let settings = Settings {
        http_listen: Some(address),
        ..settings(&[])
    };
    let server = start(&program, settings.clone()).await;
    let answer = get(address, "/").await;
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("Hello from a component"), "{answer}");
    let answer = get(address, "/trap").await;
    assert!(answer.starts_with("HTTP/1.1 500"), "{answer}");
    // One that computes for ever holds up nobody.
    let mut hog = TcpStream::connect(address).await.unwrap();
    hog.write_all(b"GET /spin HTTP/1.1\r\nHost: test\r\n\r\n")
        .await
        .unwrap();
    for _ in 0..5 {
        assert!(get(address, "/").await.contains("Hello"));
    }
    // The address is taken as long as it serves.
    let container = host().container(settings);
    let error = container
        .start(lane(), &program, Stdio::default())
        .await
        .unwrap_err();
    assert!(error.to_string().contains(&address.to_string()), "{error}");
    server.process.signal(9);
    let (exit, _, err) = server.end().await;
    assert_eq!(exit.code, 137);
    assert!(err.contains("unreachable"), "{err}");
}

#[tokio::test]
async fn a_proxy_asks_other_servers_where_it_may() {
    harness::skip_if!(harness::wasm::clang_missing());
    let program = load(&harness::wasm::proxy()).await;
    let upstream = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let asked = upstream.local_addr().unwrap();
    let (heads, mut seen) = tokio::sync::mpsc::unbounded_channel();
    tokio::spawn(async move {
        while let Ok((mut client, _)) = upstream.accept().await {
            let mut head = vec![0; 4096];
            let bytes = client.read(&mut head).await.unwrap();
            head.truncate(bytes);
            let _ = heads.send(String::from_utf8(head).unwrap());
            let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nupstream\n";
            client.write_all(answer).await.unwrap();
        }
    });
    let address: SocketAddr = format!("127.0.0.1:{}", free_port()).parse().unwrap();
    let settings = Settings {
        http_listen: Some(address),
        network: Network::Namespace,
        ..settings(&[])
    };
    let server = start(&program, settings.clone()).await;
    let answer = get(address, &format!("/http?{asked}")).await;
    assert!(answer.contains("upstream\n"), "{answer}");
    let head = seen.recv().await.unwrap().to_lowercase();
    assert!(
        head.starts_with("get / http/1.1\r\n") && head.contains(&format!("host: {asked}")),
        "{head}"
    );
    let nobody = format!("/http?127.0.0.1:{}", free_port());
    let answer = get(address, &nobody).await;
    assert!(answer.contains("no answer"), "{answer}");
    let answer = get(address, &format!("/https?{asked}")).await;
    assert!(!answer.contains("upstream"), "{answer}");
    server.process.signal(15);
    server.end().await;

    let denied = Settings {
        network: Network::Denied,
        ..settings
    };
    let server = start(&program, denied).await;
    let answer = get(address, &format!("/http?{asked}")).await;
    assert!(!answer.contains("upstream"), "{answer}");
    server.process.signal(15);
    server.end().await;
    assert!(seen.try_recv().is_err(), "nobody else asked");
}

#[tokio::test]
async fn a_proxy_that_is_asked_to_end_finishes_what_is_under_way() {
    harness::skip_if!(harness::wasm::clang_missing());
    let program = load(&harness::wasm::proxy()).await;
    let address: SocketAddr = format!("127.0.0.1:{}", free_port()).parse().unwrap();
    let settings = Settings {
        http_listen: Some(address),
        ..settings(&[])
    };
    let server = start(&program, settings).await;
    // A connection that is kept open and silent does not hold it up.
    let idle = TcpStream::connect(address).await.unwrap();
    assert!(get(address, "/").await.contains("Hello"));
    server.process.signal(15);
    let (exit, _, _) = server.end().await;
    assert_eq!((exit.code, exit.ended), (0, Ended::Exited));
    drop(idle);
}
