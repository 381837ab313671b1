//! What a node tells of itself for placement: what it can hold, and where it stands.

use std::collections::BTreeMap;

use super::MessageError;
use crate::control::limits::LABELS_BYTES_MAX;
use crate::control::proto;

/// Bytes of a zone, a rack, a label's key or its value.
pub const LABEL_BYTES_MAX: usize = 63;

/// See the module's text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// Bytes that volumes may use in its pools.
    pub capacity_bytes: u64,
    /// What fails together beyond racks.
    pub zone: Option<String>,
    /// What fails together within the zone.
    pub rack: Option<String>,
    /// For whoever chooses nodes by them.
    pub labels: BTreeMap<String, String>,
    /// Of its program.
    pub version: String,
}

impl NodeFacts {
    pub(super) fn into_message(self) -> proto::NodeFacts {
        proto::NodeFacts {
            capacity_bytes: self.capacity_bytes,
            zone: self.zone.unwrap_or_default(),
            rack: self.rack.unwrap_or_default(),
            labels: self.labels.into_iter().map(|(key, value)| proto::Label { key, value }).collect(),
            version: self.version,
        }
    }
}

/// The message of these facts.
#[must_use]
pub fn facts_to_message(facts: &NodeFacts) -> proto::NodeFacts {
    facts.clone().into_message()
}

/// The facts of a message. Nodes of an earlier version tell none.
///
/// # Errors
/// The first field that is wrong.
pub fn facts_from_message(message: Option<proto::NodeFacts>) -> Result<NodeFacts, MessageError> {
    let Some(message) = message else { return Ok(NodeFacts::default()) };
    let optional = |field, text: String| {
        if text.is_empty() { Ok(None) } else { label(field, text).map(Some) }
    };
    let bytes: usize = message.labels.iter().map(|label| label.key.len() + label.value.len()).sum();
    if bytes > LABELS_BYTES_MAX {
        return Err(MessageError::Labels(bytes));
    }
    let mut labels = BTreeMap::new();
    for proto::Label { key, value } in message.labels {
        let key = label("labels", key)?;
        let value = if value.is_empty() { value } else { label("labels", value)? };
        labels.insert(key, value);
    }
    Ok(NodeFacts {
        capacity_bytes: message.capacity_bytes,
        zone: optional("zone", message.zone)?,
        rack: optional("rack", message.rack)?,
        labels,
        version: if message.version.is_empty() {
            message.version
        } else {
            label("version", message.version)?
        },
    })
}

/// A zone, a rack, a label's key or value: 1 to 63 of A-Z, a-z, 0-9, '.', '-', '_' and '/'.
///
/// # Errors
/// If it is not one.
pub fn label(field: &'static str, text: String) -> Result<String, MessageError> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-_/+".contains(&byte);
    if (1..=LABEL_BYTES_MAX).contains(&text.len()) && text.bytes().all(allowed) {
        Ok(text)
    } else {
        Err(MessageError::Label { field, text: text.chars().take(80).collect() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> NodeFacts {
        NodeFacts {
            capacity_bytes: 5 << 30,
            zone: Some("eu-west-1a".to_owned()),
            rack: None,
            labels: [("disk".to_owned(), "nvme".to_owned()), ("spare".to_owned(), String::new())].into(),
            version: "0.1.0".to_owned(),
        }
    }

    #[test]
    fn facts_come_back_as_they_went() {
        for facts in [facts(), NodeFacts::default()] {
            assert_eq!(facts_from_message(Some(facts_to_message(&facts))), Ok(facts));
        }
        assert_eq!(facts_from_message(None), Ok(NodeFacts::default()));
    }

    #[test]
    fn what_would_not_fit_into_a_line_is_refused() {
        type Break = fn(&mut proto::NodeFacts);
        let cases: &[(Break, &str)] = &[
            (|m| m.zone = "a b".to_owned(), "zone: \"a b\" is not 1 to 63 of"),
            (|m| m.rack = "x".repeat(64), "rack: "),
            (|m| m.labels[0].key.clear(), "labels: \"\""),
            (|m| m.labels[0].value = "a\nb".to_owned(), "labels: \"a\\nb\""),
            (|m| m.labels = vec![m.labels[0].clone(); 99], "labels: 792 bytes, more than 256"),
            (|m| m.version = "é".to_owned(), "version: "),
        ];
        for (break_it, expected) in cases {
            let mut message = facts_to_message(&facts());
            break_it(&mut message);
            let error = facts_from_message(Some(message)).expect_err(expected).to_string();
            assert!(error.starts_with(expected), "{error}, not {expected}");
        }
    }
}
