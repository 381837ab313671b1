//! REST with real processes: the whole life of a volume, requests that are repeated, and what nobody should send.
#![expect(clippy::disallowed_methods, reason = "system tests run in real time")]

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use system_tests::harness::Scratch;
use system_tests::harness::cluster::{Cluster, Probe};
use system_tests::harness::http::{Answer, ask, send};
use system_tests::harness::tools::run;

struct Api {
    url: String,
}

impl Api {
    fn get(&self, path: &str) -> Value {
        let answer = ask(&self.url, "GET", path, None);
        assert_eq!(answer.status, 200, "{path}: {answer:?}");
        answer.json()
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        ask(&self.url, "POST", path, Some(&body.to_string()))
    }

    fn delete(&self, path: &str) -> u16 {
        ask(&self.url, "DELETE", path, None).status
    }

    /// The request is refused with this status and code, and its message says this.
    fn refused(&self, answer: &Answer, status: u16, code: &str, message: &str) {
        let error = &answer.json()["error"];
        assert_eq!((answer.status, error["code"].as_str()), (status, Some(code)), "{answer:?}");
        let text = error["message"].as_str().expect("a message");
        assert!(text.contains(message), "{text}, not {message}");
        assert!(!error["what_to_do"].as_str().expect("what to do").is_empty());
    }
}

fn api(cluster: &Cluster) -> Api {
    Api { url: cluster.ctl.url() }
}

#[test]
fn a_volume_lives_and_requests_may_be_repeated() {
    let scratch = Scratch::new("rest");
    let cluster = Cluster::start(&scratch, 3, 512);
    let api = api(&cluster);
    assert_eq!(ask(&api.url, "GET", "/healthz", None).body, "ok\n");
    assert_eq!(api.get("/v1/volumes"), json!([]));
    let names: Vec<Value> =
        api.get("/v1/nodes").as_array().expect("a list").iter().map(|it| it["name"].clone()).collect();
    assert_eq!(names, ["n1", "n2", "n3"]);
    assert_eq!(api.get("/v1/nodes/n2")["connected"], true);

    for _ in 0..2 {
        let drained = api.post("/v1/nodes/n2/drain", &json!({}));
        assert_eq!((drained.status, &drained.json()["draining"]), (200, &json!(true)));
    }
    let stays = api.post("/v1/nodes/n2/undrain", &json!({}));
    assert_eq!((stays.status, &stays.json()["draining"]), (200, &json!(false)));
    assert_eq!(api.delete("/v1/nodes/n9"), 204, "it is not there");

    let wish = json!({"name": "v", "size_bytes": 16 << 20});
    let made = api.post("/v1/volumes", &wish);
    assert_eq!((made.status, &made.json()["in_sync"]), (201, &json!(["n1", "n2", "n3"])));
    assert_eq!(api.post("/v1/volumes", &wish).status, 200, "again, as after a lost answer");
    let other = api.post("/v1/volumes", &json!({"name": "v", "size_bytes": 8 << 20}));
    api.refused(&other, 409, "exists", "it has 16777216 bytes, not 8388608");

    // Also if there is no room for another one like it.
    let room = |node: &Value| node["capacity_bytes"].as_u64().zip(node["reserved_bytes"].as_u64());
    let nodes = api.get("/v1/nodes");
    let left =
        nodes.as_array().expect("a list").iter().map(|node| room(node).map(|(all, taken)| all - taken));
    let large = json!({"name": "large", "size_bytes": left.min().flatten().expect("numbers") / 4096 * 4096});
    for status in [201, 200] {
        assert_eq!(api.post("/v1/volumes", &large).status, status);
    }
    assert_eq!(api.delete("/v1/volumes/large"), 204);

    // What REST and the command line say of it is the same.
    let shown: Value =
        serde_json::from_str(&run(&mut cluster.ctl.command("volume show v --output json"))).expect("JSON");
    assert_eq!(api.get("/v1/volumes/v"), shown);

    for _ in 0..2 {
        let attached = api.post("/v1/volumes/v/attach", &json!({"node": "n1"}));
        assert_eq!((attached.status, &attached.json()["is_led"]), (200, &json!(true)), "{attached:?}");
        assert_eq!(attached.json()["volume"]["head"], "n1");
    }
    Probe::new(&cluster.nodes[0], "v").write();
    let held = api.post("/v1/volumes/v/attach", &json!({"node": "n2"}));
    api.refused(&held, 422, "not_possible_now", "volume v is attached to node n1, which lives");
    api.refused(&ask(&api.url, "DELETE", "/v1/volumes/v", None), 422, "not_possible_now", "detach it first");
    let moved = api.post("/v1/volumes/v/attach", &json!({"node": "n2", "steal": true}));
    assert_eq!(moved.json()["volume"]["head"], "n2", "{moved:?}");
    Probe::new(&cluster.nodes[1], "v").write();
    let elsewhere = api.post("/v1/volumes/v/detach", &json!({"node": "n1"}));
    api.refused(&elsewhere, 422, "not_possible_now", "volume v is attached to node n2");
    for _ in 0..2 {
        assert_eq!(api.post("/v1/volumes/v/detach", &json!({})).json()["attached"], Value::Null);
    }
    assert_eq!((api.delete("/v1/volumes/v"), api.delete("/v1/volumes/v")), (204, 204));
    assert_eq!(api.get("/v1/volumes"), json!([]));
}

#[test]
fn replicas_are_added_and_forgotten_and_the_status_tells() {
    let scratch = Scratch::new("rest-replicas");
    let cluster = Cluster::start(&scratch, 3, 512);
    let api = api(&cluster);
    let wish = json!({"name": "v", "size_bytes": 16 << 20, "on": ["n1", "n2"], "min_in_sync": 1});
    assert_eq!(api.post("/v1/volumes", &wish).status, 201);
    assert_eq!(api.get("/v1/status")["degraded"], json!([]));
    for _ in 0..2 {
        let added = api.post("/v1/volumes/v/replicas", &json!({"node": "n3"}));
        assert_eq!((added.status, &added.json()["fresh"]), (200, &json!(["n3"])), "{added:?}");
    }
    assert_eq!(api.get("/v1/status")["degraded"], json!(["v"]));
    for _ in 0..2 {
        assert_eq!(api.delete("/v1/volumes/v/replicas/n3"), 200);
    }
    assert_eq!(api.get("/v1/status")["degraded"], json!([]));
    let needed = ask(&api.url, "DELETE", "/v1/volumes/v/replicas/n1", None);
    api.refused(&needed, 422, "not_possible_now", "is in sync, and is needed");
}

#[test]
fn whoever_sends_nonsense_is_told_and_nobody_else_notices() {
    let scratch = Scratch::new("rest-hostile");
    let cluster = Cluster::start(&scratch, 1, 128);
    let api = api(&cluster);
    let create = |body: &str| ask(&api.url, "POST", "/v1/volumes", Some(body));
    for (body, message) in [
        ("{", "EOF while parsing"),
        ("[1]", "invalid type"),
        (r#"{"name": "v"}"#, "missing field `size_bytes`"),
        (r#"{"name": "v", "size_bytes": -1}"#, "invalid value: integer `-1`"),
        (r#"{"name": "v", "size_bytes": 4096, "colour": "red"}"#, "unknown field `colour`"),
        (r#"{"name": "v", "size_bytes": 4097}"#, "4097 is not a multiple of 4096"),
        (r#"{"name": "v", "size_bytes": 0}"#, "size"),
        (r#"{"name": "v", "size_bytes": 18446744073709547520}"#, "size"),
        (r#"{"name": "Not A Name", "size_bytes": 4096}"#, "Not A Name"),
        (r#"{"name": "v", "size_bytes": 4096, "replicas": 1000}"#, "1000 replicas"),
        (r#"{"name": "v", "size_bytes": 4096, "on": ["n9"]}"#, "there is no node n9"),
    ] {
        api.refused(&create(body), 400, "invalid", message);
    }
    let deep = "[".repeat(30_000);
    api.refused(&create(&deep), 400, "invalid", "");
    api.refused(
        &create(r#"{"name": "v", "size_bytes": 4096}"#),
        422,
        "not_possible_now",
        "3 replicas need 3 nodes",
    );
    api.refused(&create(&format!(r#"{{"name": "{}"}}"#, "v".repeat(70_000))), 413, "too_large", "");
    let head = "POST /v1/volumes HTTP/1.1\r\nHost: ctl\r\nContent-Length: 2\r\nContent-Type: text/plain\r\n";
    api.refused(&send(&api.url, head, b"{}"), 415, "not_json", "");
    let head =
        "POST /v1/volumes HTTP/1.1\r\nHost: ctl\r\nContent-Length: 3\r\nContent-Type: application/json\r\n";
    api.refused(&send(&api.url, head, b"\"\xff\""), 400, "invalid", "");
    api.refused(
        &ask(&api.url, "PUT", "/v1/volumes", None),
        405,
        "wrong_method",
        "/v1/volumes does not know PUT",
    );
    api.refused(&ask(&api.url, "GET", "/v2", None), 404, "no_such_path", "/v2");
    api.refused(&ask(&api.url, "GET", "/v1/volumes/v", None), 404, "not_found", "there is no volume v");
    api.refused(&ask(&api.url, "GET", "/v1/nodes/n9", None), 404, "not_found", "there is no node n9");
    for (method, path) in [("POST", "/v1/nodes/n9/drain"), ("POST", "/v1/nodes/n9/undrain")] {
        api.refused(&ask(&api.url, method, path, None), 404, "not_found", "there is no node n9");
    }
    let connected = ask(&api.url, "DELETE", "/v1/nodes/n1", None);
    api.refused(&connected, 422, "not_possible_now", "node n1 is connected; stop it first");
    api.refused(&ask(&api.url, "GET", "/v1/volumes/%ff", None), 400, "invalid", "");
    api.refused(&ask(&api.url, "DELETE", "/v1/volumes/v?colour=red", None), 400, "invalid", "colour");
    let waits = api.post("/v1/volumes/v/attach", &json!({"node": "n1", "wait_seconds": 1000}));
    api.refused(&waits, 400, "invalid", "wait_seconds: 1000 is more than 60");

    // Bodies that never come end by themselves; meanwhile others are served.
    let address = api.url.strip_prefix("http://").expect("a URL");
    let head = "POST /v1/volumes HTTP/1.1\r\nHost: ctl\r\nContent-Length: 60000\r\nContent-Type: application/json\r\n\r\n{";
    let mut slow: Vec<TcpStream> =
        (0..50).map(|_| TcpStream::connect(address).expect("it listens")).collect();
    slow.iter_mut().for_each(|stream| stream.write_all(head.as_bytes()).expect("sent"));
    let start = Instant::now();
    assert_eq!(api.get("/v1/volumes"), json!([]));
    assert!(start.elapsed() < Duration::from_secs(2));
    for stream in &mut slow {
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        let mut first = [0; 12];
        stream.read_exact(&mut first).expect("an answer");
        assert_eq!(&first, b"HTTP/1.1 408");
    }
    assert!(api.get("/v1/openapi.json")["openapi"].as_str().expect("a version").starts_with("3.1"));
}
