//! The needs of a process from its host: cores ([`cores`]), signals and the service manager
//! ([`lifecycle`]), sockets ([`listen`], [`inherited`]), memory ([`memory`]), capabilities
//! ([`privileges`]), directories of other owners ([`directory`]), the kernel's version ([`kernel`]),
//! a process of its own or a place among others ([`environment`]),
//! limits of the host ([`host`], [`descriptors`]) and our own ([`concurrency`], [`connection_slots`], [`source_limiter`]).
//! [`report`] formats errors for people.

pub mod concurrency;
pub mod connection_slots;
pub mod cores;
pub mod descriptors;
pub mod directory;
pub mod environment;
pub mod host;
pub mod inherited;
pub mod kernel;
pub mod lifecycle;
pub mod listen;
pub mod memory;
pub mod privileges;
pub mod random;
pub mod report;
pub mod source_limiter;
