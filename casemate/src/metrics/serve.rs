//! `GET /metrics` over HTTP/1.1. Nothing is gathered unless somebody asks.

use std::convert::Infallible;
use std::io::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{Mutex, Semaphore};

use super::gather::gather;
use crate::error::{RunError, Step};

/// Connections at a time; one more waits to be accepted.
const CONNECTIONS: usize = 16;
/// For a request's head, and for a connection's whole life.
const HEAD: Duration = Duration::from_secs(5);
const LIFE: Duration = Duration::from_secs(120);
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Answers until it is ended.
pub async fn serve(address: SocketAddr) -> Result<(), RunError> {
    let listener = TcpListener::bind(address)
        .await
        .step("listen at", address)?;
    let address = listener.local_addr().step("listen at", address)?;
    // Whoever started it may have gone; that is no reason to end.
    let _lost = writeln!(std::io::stderr(), "metrics at http://{address}/metrics");
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    // One scrape at a time: those that come together would ask all shims as often.
    let turn = Arc::new(Mutex::new(()));
    loop {
        let Ok(place) = room.clone().acquire_owned().await else {
            return Ok(());
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(_) => {
                // A client that has gone, or too few descriptors for a moment.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let turn = turn.clone();
        tokio::spawn(async move {
            let _place = place;
            let service = service_fn(move |request| answer(request, turn.clone()));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .max_buf_size(16 * 1024)
                .serve_connection(TokioIo::new(stream), service);
            // A client's mistakes are its own.
            let _ended = tokio::time::timeout(LIFE, connection).await;
        });
    }
}

type Answer = Response<Full<Bytes>>;

async fn answer(request: Request<Incoming>, turn: Arc<Mutex<()>>) -> Result<Answer, Infallible> {
    let path = request.uri().path();
    let is_read = matches!(*request.method(), Method::GET | Method::HEAD);
    Ok(match (is_read, path) {
        (false, _) => {
            let mut refused = plain(StatusCode::METHOD_NOT_ALLOWED, "GET alone\n");
            let allowed = hyper::header::HeaderValue::from_static("GET, HEAD");
            refused.headers_mut().insert(ALLOW, allowed);
            refused
        }
        (true, "/metrics") => {
            let _turn = turn.lock().await;
            match gather().await {
                Ok(samples) => plain(StatusCode::OK, samples.render()),
                Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            }
        }
        (true, _) => plain(StatusCode::NOT_FOUND, "metrics are at /metrics\n"),
    })
}

fn plain(status: StatusCode, text: impl Into<Bytes>) -> Answer {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    let kind = hyper::header::HeaderValue::from_static(TEXT);
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
