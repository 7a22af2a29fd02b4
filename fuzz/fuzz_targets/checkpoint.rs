#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| meswitch_fuzz::checkpoint(data));
