//! A server's bytes against the decoders of the NBD client.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| datapath::session::nbd::fuzzing::check_reply(data));
