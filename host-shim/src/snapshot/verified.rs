//! Stamps that say that a file was verified.
