//! The client's side of option haggling.

use super::{Client, ClientPlan, Headers, Phase};
use crate::sim::bytes::Fields;
use crate::to_u32;

const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const ERROR_BIT: u32 = 1 << 31;
const REPLY_ACK: u32 = 1;
const REPLY_SERVER: u32 = 2;
const REPLY_INFO: u32 = 3;
const REPLY_META_CONTEXT: u32 = 4;
const ERROR_POLICY: u32 = 0x8000_0002;
const ERROR_UNSUPPORTED: u32 = ERROR_BIT | 1;
const ERROR_UNKNOWN_EXPORT: u32 = ERROR_BIT | 6;
const CONTEXT: &str = "base:allocation";

/// What a client asks for before transmission, one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Unknown,
    List,
    InfoOfNothing,
    Structured,
    Extended,
    Context,
    Info,
    Go,
    ExportName,
}

impl Step {
    fn number(self) -> u32 {
        match self {
            Step::ExportName => 1,
            Step::List => 3,
            Step::Info | Step::InfoOfNothing => 6,
            Step::Go => 7,
            Step::Structured => 8,
            Step::Context => 10,
            Step::Extended => 11,
            Step::Unknown => 0x00de_fec8,
        }
    }
}

/// The steps of a plan, last one first.
pub(super) fn steps(plan: &ClientPlan) -> Vec<Step> {
    // EXPORT_NAME is forbidden once extended headers are on.
    let extended = plan.extended && !plan.export_name;
    let wanted = [
        (plan.curious, Step::Unknown),
        (plan.curious, Step::List),
        (plan.curious, Step::InfoOfNothing),
        (plan.structured && !extended, Step::Structured),
        (extended, Step::Extended),
        (plan.status && (plan.structured || extended), Step::Context),
        (plan.curious, Step::Info),
        (!plan.export_name, Step::Go),
        (plan.export_name, Step::ExportName),
    ];
    wanted.iter().rev().filter(|(wanted, _)| *wanted).map(|(_, step)| *step).collect()
}

impl Client {
    pub(super) fn handle_greeting(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut fields = Fields(bytes);
        let (first, second, flags) = (fields.u64()?, fields.u64()?, fields.u16()?);
        assert_eq!((first, second), (GREETING_MAGIC, OPTION_MAGIC), "not a newstyle greeting");
        assert_eq!(flags & 1, 1, "fixed newstyle is not offered");
        self.no_zeroes &= flags & 2 != 0;
        self.output.extend_from_slice(&(1 | u32::from(self.no_zeroes) << 1).to_be_bytes());
        self.phase = Phase::Options;
        self.send_option();
        Some(18)
    }

    pub(super) fn handle_option_reply(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut fields = Fields(bytes);
        let (magic, option, kind) = (fields.u64()?, fields.u32()?, fields.u32()?);
        let length = fields.length()?;
        let data = fields.bytes(length)?;
        let step = *self.steps.last().expect("an option is under way");
        assert_eq!((magic, option), (OPTION_REPLY_MAGIC, step.number()), "a reply to another option");
        match (step, kind) {
            (Step::List, REPLY_SERVER)
            | (Step::Context, REPLY_META_CONTEXT)
            | (Step::Info | Step::Go, REPLY_INFO) => {
                self.handle_fact(step, data).expect("a complete fact");
            }
            (Step::InfoOfNothing, kind) => {
                assert_eq!(kind, ERROR_UNKNOWN_EXPORT, "INFO of a volume that does not exist");
                self.finish_step();
            }
            (Step::Unknown, kind) => {
                assert_eq!(kind, ERROR_UNSUPPORTED, "an unknown option was not refused as such");
                self.finish_step();
            }
            (_, REPLY_ACK) => self.handle_ack(step),
            (Step::Go, ERROR_POLICY) if self.plan.elsewhere => self.turn_away(),
            (Step::Info | Step::Go | Step::Context, ERROR_UNKNOWN_EXPORT) if self.plan.may_be_unknown => {
                self.turn_away();
            }
            // These are optional features; nothing else may be refused.
            (Step::Structured | Step::Extended | Step::Context | Step::List, ERROR_UNSUPPORTED) => {
                self.finish_step()
            }
            _ => panic!("{step:?} was answered with {kind:#x}: {}", String::from_utf8_lossy(data)),
        }
        Some(20 + length)
    }

    fn turn_away(&mut self) {
        self.turned_away = true;
        self.phase = Phase::Gone;
    }

    /// The answer to EXPORT_NAME has no header.
    pub(super) fn handle_export(&mut self, bytes: &[u8]) -> Option<usize> {
        let mut fields = Fields(bytes);
        let (size, flags) = (fields.u64()?, fields.u16()?);
        let padding = if self.no_zeroes { 0 } else { 124 };
        assert!(fields.bytes(padding)?.iter().all(|byte| *byte == 0), "padding is not zero");
        self.note_export(size, flags);
        self.phase = Phase::Ready;
        Some(10 + padding)
    }

    fn handle_fact(&mut self, step: Step, data: &[u8]) -> Option<()> {
        let mut fields = Fields(data);
        match step {
            Step::Context => {
                let id = fields.u32()?;
                assert_eq!(fields.0, CONTEXT.as_bytes(), "a context that was not asked for");
                self.status_context = Some(id);
            }
            Step::List => {
                let length = fields.length()?;
                fields.bytes(length)?;
            }
            _ => match fields.u16()? {
                0 => {
                    let (size, flags) = (fields.u64()?, fields.u16()?);
                    self.note_export(size, flags);
                }
                3 => {
                    let (least, preferred, most) = (fields.u32()?, fields.u32()?, fields.u32()?);
                    assert!(least.is_power_of_two() && least <= 512, "smallest block {least}");
                    assert!(preferred.is_power_of_two() && preferred >= 512, "preferred block {preferred}");
                    assert!(most >= 32 << 20, "longest payload {most}");
                }
                _ => {}
            },
        }
        Some(())
    }

    fn handle_ack(&mut self, step: Step) {
        match step {
            Step::Structured => self.headers = Headers::Structured,
            Step::Extended => self.headers = Headers::Extended,
            Step::Context => assert!(self.status_context.is_some(), "{CONTEXT} is not offered"),
            Step::Go => {
                assert!(self.flags & 1 != 0, "GO was acknowledged without facts about the export");
                self.phase = Phase::Ready;
            }
            Step::List | Step::Info | Step::InfoOfNothing | Step::Unknown | Step::ExportName => {}
        }
        self.finish_step();
    }

    fn note_export(&mut self, size: u64, flags: u16) {
        assert_eq!(size, self.plan.size_bytes, "size of {}", self.plan.name);
        // HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES.
        let needed = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6;
        assert_eq!(flags & needed, needed, "transmission flags {flags:#x}");
        assert_eq!(flags & (1 << 1), 0, "the volume is not read-only");
        let offers_df = flags & (1 << 7) != 0;
        assert_eq!(offers_df, self.headers != Headers::Simple, "DF goes with structured replies");
        self.flags = flags;
    }

    fn finish_step(&mut self) {
        self.steps.pop();
        if self.phase == Phase::Options {
            self.send_option();
        }
    }

    fn send_option(&mut self) {
        let step = *self.steps.last().expect("the last step ends the handshake");
        let name = if step == Step::InfoOfNothing { "no such volume" } else { &self.plan.name };
        let mut data = Vec::new();
        match step {
            Step::Unknown => data.extend_from_slice(b"what is this?"),
            Step::List | Step::Structured | Step::Extended => {}
            Step::ExportName => data.extend_from_slice(name.as_bytes()),
            Step::Context => {
                push_string(&mut data, name);
                data.extend_from_slice(&1_u32.to_be_bytes());
                push_string(&mut data, CONTEXT);
            }
            Step::Info | Step::InfoOfNothing | Step::Go => {
                push_string(&mut data, name);
                // One fact beyond the mandatory one: block sizes.
                data.extend_from_slice(&[0, 1, 0, 3]);
            }
        }
        self.output.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        self.output.extend_from_slice(&step.number().to_be_bytes());
        self.output.extend_from_slice(&to_u32(data.len()).to_be_bytes());
        self.output.extend_from_slice(&data);
        if step == Step::ExportName {
            self.steps.pop();
            self.phase = Phase::ExportName;
        }
    }
}

fn push_string(data: &mut Vec<u8>, text: &str) {
    data.extend_from_slice(&to_u32(text.len()).to_be_bytes());
    data.extend_from_slice(text.as_bytes());
}
