//! A client's stream, cut anywhere, against one NBD session.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| datapath::session::nbd::fuzzing::check_session(data));
