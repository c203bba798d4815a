//! Streams of processes over the task socket, as containerd uses them.

use protobuf::well_known_types::any::Any;
use ttrpc::asynchronous::{Client, ClientStream};

use super::*;
use crate::task::streaming::{
    DATA, Data, METHOD, SERVICE, StreamInit, WINDOW_UPDATE, WindowUpdate, decode, encode,
};
use crate::testing::patient;

type Stream = ClientStream<Any, Any>;

/// Connects under `id` and waits for the acknowledgement.
async fn connect(address: &str, id: &str) -> Stream {
    let client = Client::connect(address.strip_prefix("ttrpc+").unwrap())
        .await
        .unwrap();
    let request = ttrpc::Request {
        service: SERVICE.to_owned(),
        method: METHOD.to_owned(),
        ..Default::default()
    };
    let stream = client.new_stream(request, true, true).await.unwrap();
    let mut stream = Stream::new(stream);
    let init = StreamInit { id: id.to_owned() };
    let init = encode("containerd.services.streaming.v1.StreamInit", &init);
    stream.send(&init).await.unwrap();
    receive(&mut stream).await.unwrap();
    stream
}

async fn receive(stream: &mut Stream) -> ttrpc::Result<Any> {
    tokio::time::timeout(SOON, stream.recv()).await.unwrap()
}

async fn allow(stream: &Stream, update: i32) {
    let message = encode(WINDOW_UPDATE, &WindowUpdate { update });
    stream.send(&message).await.unwrap();
}

async fn data(stream: &mut Stream) -> String {
    let message = receive(stream).await.unwrap();
    assert_eq!(message.type_url, DATA);
    String::from_utf8(decode::<Data>(&message).unwrap().data).unwrap()
}

#[tokio::test]
async fn streams_carry_stdio_and_survive_a_connection() {
    if !can_mount() {
        return;
    }
    let daemon = Daemon::start(Fault::None, patient()).await;
    daemon.create("p1").await.unwrap();
    let address = daemon.start_pod("p1").await.unwrap().address;
    let socket = address.strip_prefix("ttrpc+").unwrap();
    let tasks = TaskClient::new(Client::connect(socket).await.unwrap());

    // containerd connects first and creates the task then.
    let mut stdin = connect(&address, "c1-stdin").await;
    let mut stdout = connect(&address, "c1-stdout").await;
    allow(&stdout, 7).await;
    let mut request = daemon.container("c1", &["cat"]);
    request.stdin = format!("{address}?streaming_id=c1-stdin");
    request.stdout = format!("{address}?streaming_id=c1-stdout");
    tasks.create(context(), &request).await.unwrap();
    start_task(&tasks, "c1", "").await.unwrap();

    // Leave to send comes from us; what was sent before the end of input is not lost to it.
    let window = receive(&mut stdin).await.unwrap();
    assert!(decode::<WindowUpdate>(&window).unwrap().update > 0);
    let text = b"through the guest".to_vec();
    stdin
        .send(&encode(DATA, &Data { data: text }))
        .await
        .unwrap();
    let close = api::CloseIORequest {
        id: "c1".to_owned(),
        stdin: true,
        ..Default::default()
    };
    tasks.close_io(context(), &close).await.unwrap();
    stdin.close_send().await.unwrap();

    // No more than was allowed, and the rest to whoever connects next.
    assert_eq!(data(&mut stdout).await, "through");
    assert_eq!(wait_task(&tasks, "c1", "").await, 0);
    stdout.close_send().await.unwrap();
    drop(stdout);
    let mut stdout = connect(&address, "c1-stdout").await;
    allow(&stdout, 1 << 16).await;
    assert_eq!(data(&mut stdout).await, " the guest");
    assert!(receive(&mut stdout).await.is_err(), "the end");
    assert_eq!(delete_task(&tasks, "c1", "").await.unwrap(), 0);
    daemon.shutdown_pod("p1").await.unwrap();
    daemon.assert_clean();
}
