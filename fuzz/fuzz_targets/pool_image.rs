//! A small pool, damaged anywhere, against recovery.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    datapath::store::fuzzing::check_pool_image(data);
});
