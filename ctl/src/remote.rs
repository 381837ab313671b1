//! How commands talk to `berth ctl`.

use std::future::Future;
use std::time::Duration;

use clap::Args;
use nbd_server::control::limits::{CALL_TIMEOUT, REPLY_BYTES_MAX};
use nbd_server::control::link::endpoint;
use nbd_server::control::proto::ListNodesRequest;
use nbd_server::control::proto::control_client::ControlClient;
use serde::Serialize;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::Output;

/// Flags of every command that talks to ctl.
#[derive(Debug, Args)]
pub(crate) struct RemoteArguments {
    /// Where `berth ctl` is.
    #[arg(
        long,
        value_name = "URL",
        env = "BERTH_CTL",
        default_value = "http://127.0.0.1:7440",
        global = true
    )]
    pub(crate) ctl: String,

    /// How to print the result.
    #[arg(long, value_enum, default_value_t = Output::Text, global = true)]
    pub(crate) output: Output,
}

/// A connection to ctl.
pub(crate) type Client = ControlClient<Channel>;

/// Connects, and does `work` with the connection.
pub(crate) fn with_client<T, F: Future<Output = Result<T, String>>>(
    remote: &RemoteArguments,
    work: impl FnOnce(Client) -> F,
) -> Result<T, String> {
    let endpoint = endpoint(&remote.ctl).map_err(|error| format!("--ctl: {error}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build();
    runtime.map_err(|error| error.to_string())?.block_on(async {
        let channel = endpoint.connect().await.map_err(|error| unreachable_text(&remote.ctl, &error))?;
        work(ControlClient::new(channel).max_decoding_message_size(REPLY_BYTES_MAX)).await
    })
}

fn unreachable_text(ctl: &str, error: &dyn std::error::Error) -> String {
    // The outermost error of the client says no more than that it is one.
    let mut cause = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    format!(
        "cannot reach berth ctl at {ctl}: {cause}; start it with `berth ctl`, or say where it is with --ctl URL"
    )
}

/// The answer to a call, or what to do about it.
pub(crate) async fn answer<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, String> {
    // Longer than the store's slowest sync, shorter than a person's patience.
    const PATIENCE: Duration = CALL_TIMEOUT;
    match tokio::time::timeout(PATIENCE, call).await {
        Ok(Ok(answer)) => Ok(answer.into_inner()),
        Ok(Err(status)) => Err(status_text(&status)),
        Err(_) => {
            Err("berth ctl did not answer in time; it may have done it all the same: look before you try \
                       again"
                .to_owned())
        }
    }
}

fn status_text(status: &Status) -> String {
    match status.code() {
        Code::Unavailable | Code::Unknown => {
            format!(
                "the connection to berth ctl failed: {}; it may have done it all the same: look before you try again",
                status.message()
            )
        }
        Code::NotFound => format!("{}; `berth volume list` shows what there is", status.message()),
        Code::Unimplemented => {
            "this berth ctl is of another version, and does not know the command".to_owned()
        }
        _ => status.message().to_owned(),
    }
}

/// Names of nodes by their numbers.
pub(crate) async fn node_names(client: &mut Client) -> Result<Vec<(u32, String)>, String> {
    let nodes = answer(client.list_nodes(ListNodesRequest {})).await?.nodes;
    Ok(nodes.into_iter().map(|node| (node.node, node.name)).collect())
}

/// Prints a result as it is wanted.
pub(crate) fn print(
    output: Output,
    result: &impl Serialize,
    text: impl FnOnce() -> String,
) -> Result<(), String> {
    match output {
        Output::Text => print!("{}", text()),
        Output::Json => {
            println!("{}", serde_json::to_string_pretty(result).map_err(|error| error.to_string())?);
        }
    }
    Ok(())
}

/// Lines of columns, as wide as their widest word. The first line is the heading.
pub(crate) fn columns(lines: &[Vec<String>]) -> String {
    let widths: Vec<usize> = (0..lines[0].len())
        .map(|column| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for line in lines {
        let words = line.iter().zip(&widths).map(|(word, width)| format!("{word:<width$}"));
        text.push_str(words.collect::<Vec<_>>().join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::columns;

    #[test]
    fn columns_are_as_wide_as_they_must() {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect();
        assert_eq!(columns(&[words("NAME SIZE X"), words("a 10G y")]), "NAME  SIZE  X\na     10G   y\n");
    }
}
