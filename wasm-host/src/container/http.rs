//! Components of the world `wasi:http/proxy`: a server that gives each request an instance of
//! its own, and requests to other servers.

use std::future::poll_fn;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::{Pin, pin};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::FuturesUnordered;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tracing::debug;
use wasmtime_wasi_http::p2::bindings::ProxyPre;
use wasmtime_wasi_http::p2::bindings::http::types::Scheme;
use wasmtime_wasi_http::p2::body::HyperOutgoingBody;
use wasmtime_wasi_http::{Error, RequestOptions, WasiBody, WasiHttpHooks, WasiHttpView};

use super::Ended;
use super::run::Job;
use super::state::{Outputs, State};
use crate::error::{Result, WasmError};

/// Where components serve unless told otherwise.
const LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED), 8080);

/// Connections at once, and requests: whoever goes away leaves a request that is still worked
/// on. Further ones wait in the kernel.
const MAX_CONNECTIONS: usize = 1024;

/// How long a client may take to send the head of a request.
const HEAD_LIMIT: Duration = Duration::from_secs(30);

/// How long a request to another server may take where the guest does not say.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);

type Guest<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;
type Guests<'a> = mpsc::UnboundedSender<Guest<'a>>;

/// Serves one component.
pub(super) struct Server<'a> {
    job: &'a Job,
    proxy: &'a ProxyPre<State>,
    outputs: &'a Outputs,
    listener: TcpListener,
}

impl<'a> Server<'a> {
    /// Listens, in the namespace of this thread.
    pub(super) fn bind(
        job: &'a Job,
        proxy: &'a ProxyPre<State>,
        outputs: &'a Outputs,
    ) -> Result<Self> {
        let address = job.settings.http_listen.unwrap_or(LISTEN);
        let failed = || format!("listening on {address} for HTTP requests");
        let listen = || {
            let listener = std::net::TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            TcpListener::from_std(listener)
        };
        Ok(Self {
            job,
            proxy,
            outputs,
            listener: listen().map_err(WasmError::io(failed()))?,
        })
    }

    /// Serves until the container is asked to end, then finishes what is under way.
    pub(super) async fn serve(self) -> Result<(u32, Ended)> {
        let (guests, mut more_guests) = mpsc::unbounded_channel::<Guest<'_>>();
        let (closing, closed) = watch::channel(false);
        let mut asked = pin!(self.job.control.asked());
        let mut running = FuturesUnordered::new();
        let mut connections = FuturesUnordered::new();
        loop {
            let open = !*closed.borrow();
            let room = connections.len().max(running.len()) < MAX_CONNECTIONS;
            tokio::select! {
                _ = &mut asked, if open => {
                    closing.send_replace(true);
                }
                accepted = self.listener.accept(), if open && room => {
                    match accepted {
                        Ok((stream, _)) => {
                            connections.push(self.connection(stream, guests.clone(), closed.clone()));
                        }
                        Err(e) => debug!("cannot accept a connection: {e}"),
                    }
                }
                Some(()) = connections.next() => {}
                Some(guest) = more_guests.recv() => running.push(guest),
                Some(()) = running.next() => {}
                else => {}
            }
            if *closed.borrow() && connections.is_empty() && running.is_empty() {
                return Ok((0, Ended::Exited));
            }
        }
    }

    async fn connection<'b>(
        &'b self,
        stream: TcpStream,
        guests: Guests<'b>,
        mut closed: watch::Receiver<bool>,
    ) {
        let service = service_fn(|request| self.answer(request, guests.clone()));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_LIMIT)
            .half_close(true)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = pin!(connection);
        let ended = tokio::select! {
            ended = connection.as_mut() => ended,
            () = async { drop(closed.wait_for(|closed| *closed).await) } => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        if let Err(e) = ended {
            debug!("a connection broke: {e}");
        }
    }

    async fn answer<'b>(
        &'b self,
        request: Request<Incoming>,
        guests: Guests<'b>,
    ) -> std::result::Result<Response<HyperOutgoingBody>, Error> {
        let (answer, answered) = oneshot::channel();
        let _ = guests.send(Box::pin(self.guest(request, answer)));
        match answered.await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(code)) => Ok(failure(&format!("the component answered with {code:?}"))),
            // It ended without an answer; why is in its log.
            Err(_) => Ok(failure("the component did not answer")),
        }
    }

    async fn guest(
        &self,
        request: Request<Incoming>,
        answer: oneshot::Sender<
            std::result::Result<
                Response<HyperOutgoingBody>,
                wasmtime_wasi_http::p2::bindings::http::types::ErrorCode,
            >,
        >,
    ) {
        let mut store = match self.job.store(None, self.outputs) {
            Ok(store) => store,
            Err(e) => return self.outputs.stderr.append(&format!("{e}\n")).await,
        };
        let handled = async {
            let request = store
                .data_mut()
                .http()
                .new_incoming_request(Scheme::Http, request)?;
            let outparam = store.data_mut().http().new_response_outparam(answer)?;
            let proxy = self.proxy.instantiate_async(&mut store).await?;
            proxy
                .wasi_http_incoming_handler()
                .call_handle(&mut store, request, outparam)
                .await
        }
        .await;
        let refused = store.data().limiter.refused;
        if let (_, Ended::Trap(why)) = self.job.judge(handled.map(|()| 0), refused) {
            self.outputs.stderr.append(&format!("{why}\n")).await;
        }
    }
}

fn failure(why: &str) -> Response<HyperOutgoingBody> {
    let body = Full::new(Bytes::from(format!("{why}\n")))
        .map_err(Error::from)
        .boxed_unsync();
    let mut response = Response::new(body);
    *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
    response
}

/// Requests of a guest to other servers, from this thread's namespace, without TLS.
pub(super) struct Outgoing {
    pub(super) allowed: bool,
}

type Sent = (
    Response<WasiBody>,
    Box<dyn Future<Output = std::result::Result<(), Error>> + Send>,
);

impl WasiHttpHooks for Outgoing {
    fn is_supported_scheme(&mut self, scheme: &hyper::http::uri::Scheme) -> bool {
        *scheme == hyper::http::uri::Scheme::HTTP
    }

    fn default_scheme(&mut self) -> Option<hyper::http::uri::Scheme> {
        Some(hyper::http::uri::Scheme::HTTP)
    }

    fn send_request(
        &mut self,
        request: Request<WasiBody>,
        options: Option<RequestOptions>,
        _processed: Box<dyn Future<Output = std::result::Result<(), Error>> + Send>,
    ) -> Box<dyn Future<Output = std::result::Result<Sent, Error>> + Send> {
        let allowed = self.allowed;
        Box::new(async move {
            if !allowed {
                return Err(Error::HttpRequestDenied);
            }
            send(request, options.as_ref()).await
        })
    }
}

async fn send(
    mut request: Request<WasiBody>,
    options: Option<&RequestOptions>,
) -> std::result::Result<Sent, Error> {
    let limit = |choose: fn(&RequestOptions) -> Option<Duration>| {
        options.and_then(choose).unwrap_or(REQUEST_LIMIT)
    };
    let authority = request
        .uri()
        .authority()
        .ok_or(Error::HttpRequestUriInvalid)?;
    let address = (
        authority.host().trim_matches(['[', ']']).to_owned(),
        authority.port_u16().unwrap_or(80),
    );
    let connecting = timeout(limit(|o| o.connect_timeout), TcpStream::connect(address));
    let stream = connecting
        .await
        .map_err(|_| Error::ConnectionTimeout)?
        .map_err(Error::Connect)?;
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    // Only a proxy is told scheme and authority.
    let path = request
        .uri()
        .path_and_query()
        .map_or("/", |path| path.as_str());
    *request.uri_mut() = path.parse().map_err(|_| Error::HttpRequestUriInvalid)?;
    let mut connection = Box::pin(connection);
    let mut over = false;
    let first_byte = limit(|o| o.first_byte_timeout);
    let mut response = Box::pin(timeout(first_byte, sender.send_request(request)));
    let response = poll_fn(|cx| {
        if !over {
            // Its error is the response's as well.
            over = connection.as_mut().poll(cx).is_ready();
        }
        response.as_mut().poll(cx)
    })
    .await
    .map_err(|_| Error::HttpResponseTimeout)??;
    let rest = async move {
        if over {
            return Ok(());
        }
        connection.await.map_err(Error::from)
    };
    let response = response.map(|body| body.map_err(Error::from).boxed_unsync());
    Ok((response, Box::new(rest)))
}
