//! Taste as a test.
