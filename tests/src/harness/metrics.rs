//! What a server tells of itself on its page of metrics.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;

/// The samples of one page, by name and labels as they stand there.
#[derive(Clone, Debug)]
pub struct Page {
    samples: BTreeMap<String, f64>,
}

impl Page {
    /// Fetches the page, and checks it line by line: `name{labels} value`, types before samples, and an end.
    ///
    /// # Panics
    /// If it cannot be had or breaks the format.
    #[must_use]
    pub fn fetch(url: &str) -> Page {
        let address =
            url.strip_prefix("http://").and_then(|rest| rest.strip_suffix("/metrics")).expect("a URL");
        let mut stream = TcpStream::connect(address).expect("the server listens");
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").expect("sent");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let (head, page) = answer.split_once("\r\n\r\n").expect("a head and a body");
        assert!(head.starts_with("HTTP/1.0 200 OK\r\n"), "{head}");
        assert!(page.ends_with("# EOF\n"), "{page}");
        let mut families = Vec::new();
        let mut samples = BTreeMap::new();
        for line in page.lines().filter(|line| *line != "# EOF") {
            if let Some(comment) = line.strip_prefix("# ") {
                let family = comment.split(' ').nth(1).expect("a name").to_owned();
                families.push(family);
                continue;
            }
            let (name, value) = line.rsplit_once(' ').expect("a value");
            let plain = name.split('{').next().expect("a name");
            assert!(families.iter().any(|family| plain.starts_with(family.as_str())), "{line} has no type");
            assert!(plain.starts_with("berth_") && (!name.contains('{') || name.ends_with('}')), "{line}");
            let before = samples.insert(name.to_owned(), value.parse().expect("a number"));
            assert!(before.is_none(), "{name} is there twice");
        }
        Page { samples }
    }

    /// The sum over all samples of this name whose labels contain `part`.
    ///
    /// # Panics
    /// If there is none.
    #[must_use]
    pub fn sum(&self, name: &str, part: &str) -> f64 {
        let wanted = self.samples.iter().filter(|(sample, _)| {
            let (found, labels) = sample.split_once('{').unwrap_or((sample, ""));
            found == name && labels.contains(part)
        });
        let values: Vec<f64> = wanted.map(|(_, value)| *value).collect();
        assert!(!values.is_empty(), "no {name} with {part}");
        values.iter().sum()
    }
}
