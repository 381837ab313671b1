//! LIST_META_CONTEXT and SET_META_CONTEXT: which facts about blocks BLOCK_STATUS can tell.
//!
//! There is one context, `base:allocation`. A query of another namespace is ignored, as the protocol demands; one
//! without a colon is refused. `base:` alone is a wildcard for listing and selects nothing.

use super::handshake::Refusal;
use super::rejection::Rejection;
use crate::request::{ExportIndex, Exports};
use crate::wire::nbd_handshake::{
    BASE_ALLOCATION, MetaContextQuery, encode_meta_context, option, reply_type,
};
use crate::wire::nbd_transmission::HeaderStyle;
use std::borrow::Cow;

/// The number of `base:allocation` in replies to BLOCK_STATUS.
pub(super) const BASE_ALLOCATION_ID: u32 = 1;

const NEEDS_CHUNKS: Refusal = Refusal(
    reply_type::ERR_INVALID,
    Cow::Borrowed("structured replies must be negotiated first"),
    Rejection::OptionOrder,
);
const NO_NAMESPACE: Refusal = Refusal(
    reply_type::ERR_INVALID,
    Cow::Borrowed("a query begins with a namespace and a colon"),
    Rejection::OptionMalformed,
);

/// Lists the contexts of an export that the queries match; without queries, all.
pub(super) fn answer_list(
    style: HeaderStyle,
    exports: &dyn Exports,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), Refusal> {
    let (_, query) = check(style, exports, payload)?;
    let all = query.queries().next().is_none();
    if all || query.queries().any(|query| query == BASE_ALLOCATION || query == "base:") {
        // In a list the number means nothing and is zero.
        encode_meta_context(out, option::LIST_META_CONTEXT, 0, BASE_ALLOCATION);
    }
    Ok(())
}

/// Chooses the contexts of an export; returns the export if there is anything to tell about it.
pub(super) fn answer_set(
    style: HeaderStyle,
    exports: &dyn Exports,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<Option<ExportIndex>, Refusal> {
    let (export, query) = check(style, exports, payload)?;
    if !query.queries().any(|query| query == BASE_ALLOCATION) {
        return Ok(None);
    }
    encode_meta_context(out, option::SET_META_CONTEXT, BASE_ALLOCATION_ID, BASE_ALLOCATION);
    Ok(Some(export))
}

fn check<'a>(
    style: HeaderStyle,
    exports: &dyn Exports,
    payload: &'a [u8],
) -> Result<(ExportIndex, MetaContextQuery<'a>), Refusal> {
    if style == HeaderStyle::Simple {
        return Err(NEEDS_CHUNKS);
    }
    let query = MetaContextQuery::decode(payload).map_err(|_| Refusal::MALFORMED)?;
    if query.queries().any(|query| query.find(':').is_none_or(|colon| colon == 0)) {
        return Err(NO_NAMESPACE);
    }
    let export = exports.find(query.name).ok_or(Refusal::NO_EXPORT)?;
    Ok((export.index, query))
}
