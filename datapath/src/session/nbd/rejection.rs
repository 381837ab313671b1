//! Why a client was refused something, in words for metrics: one counter for each reason.

macro_rules! rejections {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// A reason to refuse an option, a request or the whole connection.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Rejection {
            $($(#[$doc])* $variant,)*
        }

        impl Rejection {
            /// Every reason, in the order of the counters.
            pub const ALL: &'static [Rejection] = &[$(Rejection::$variant,)*];

            /// The reason as a label of a metric.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Rejection::$variant => $name,)* }
            }
        }
    };
}

rejections! {
    /// Client flags that were not offered. Ends the connection.
    ClientFlags = "client_flags",
    /// No option where one must stand. Ends the connection.
    OptionMagic = "option_magic",
    /// An option that claims an absurd length. Ends the connection.
    OptionLength = "option_length",
    /// Too many options. Ends the connection.
    OptionCount = "option_count",
    /// An option other than EXPORT_NAME from a client that cannot read replies. Ends the connection.
    OptionNeedsFixed = "option_needs_fixed_newstyle",
    /// EXPORT_NAME that cannot be satisfied, and that has no error reply. Ends the connection.
    ExportName = "export_name",
    /// EXPORT_NAME after extended headers were agreed on. Ends the connection.
    ExportNameExtended = "export_name_extended",
    /// An option that the server does not know.
    OptionUnknown = "option_unknown",
    /// STARTTLS, which is not offered.
    TlsNotOffered = "tls_not_offered",
    /// A payload where none belongs, or one that does not parse.
    OptionMalformed = "option_malformed",
    /// An option too long to be read.
    OptionTooBig = "option_too_big",
    /// An export that does not exist.
    ExportUnknown = "export_unknown",
    /// The volume is led by another node.
    ExportElsewhere = "export_elsewhere",
    /// Something negotiated twice, or in the wrong order.
    OptionOrder = "option_order",
    /// An option while the server is stopping.
    OptionShutdown = "option_shutdown",
    /// No request where one must stand. Ends the connection.
    RequestMagic = "request_magic",
    /// A payload of absurd length. Ends the connection.
    PayloadLength = "payload_length",
    /// An unknown command.
    Command = "command",
    /// An unknown flag, or one that does not belong to the command or was not negotiated.
    CommandFlag = "command_flag",
    /// A payload with a command that takes none, or one that does not parse.
    CommandPayload = "command_payload",
    /// A change of a read-only export.
    ReadOnly = "read_only",
    /// A range that leaves the export.
    Range = "range",
    /// A request longer than what was advertised, or FLUSH with a range.
    RequestLength = "request_length",
    /// BLOCK_STATUS without a metadata context, or for one that was not agreed on.
    MetaContext = "meta_context",
    /// A request while the server is stopping.
    RequestShutdown = "request_shutdown",
}

/// How often each [`Rejection`] happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Rejections {
    counts: [u32; Rejection::ALL.len()],
}

impl Rejections {
    /// How often this one happened.
    #[must_use]
    pub fn count(&self, rejection: Rejection) -> u32 {
        self.counts[rejection as usize]
    }

    /// Each reason that happened, with its count.
    pub fn iter(&self) -> impl Iterator<Item = (Rejection, u32)> + '_ {
        Rejection::ALL.iter().map(|&reason| (reason, self.count(reason))).filter(|&(_, count)| count > 0)
    }

    /// Adds what another session counted.
    pub fn add(&mut self, other: &Rejections) {
        for (mine, others) in self.counts.iter_mut().zip(other.counts) {
            *mine = mine.saturating_add(others);
        }
    }

    pub(super) fn note(&mut self, rejection: Rejection) {
        let count = &mut self.counts[rejection as usize];
        *count = count.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::{Rejection, Rejections};

    #[test]
    fn names_are_labels_and_unique() {
        let names: std::collections::BTreeSet<_> = Rejection::ALL.iter().map(|r| r.name()).collect();
        assert_eq!(names.len(), Rejection::ALL.len());
        assert!(names.iter().all(|name| name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_')));
        assert!(Rejection::ALL.iter().enumerate().all(|(index, &reason)| reason as usize == index));
    }

    #[test]
    fn counts_add_up() {
        let (mut all, mut one) = (Rejections::default(), Rejections::default());
        one.note(Rejection::Range);
        one.note(Rejection::Range);
        one.note(Rejection::Command);
        all.add(&one);
        all.add(&one);
        assert_eq!(all.iter().collect::<Vec<_>>(), [(Rejection::Command, 2), (Rejection::Range, 4)]);
    }
}
