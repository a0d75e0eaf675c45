//! What a process needs from its host: cores ([`cores`]), signals and the service manager
//! ([`lifecycle`]), sockets ([`listen`]), some of which outlive it ([`inherited`]), its share of the memory
//! ([`memory`]), capabilities that it gives back ([`privileges`]), directories that others may own
//! ([`directory`]), limits, the host's ([`host`], [`descriptors`]) and our own ([`gate`], [`room`], [`sources`]),
//! and which kernel it is ([`kernel`]). What people read of an error is made in [`report`].

pub mod cores;
pub mod descriptors;
pub mod directory;
pub mod gate;
pub mod host;
pub mod inherited;
pub mod kernel;
pub mod lifecycle;
pub mod listen;
pub mod memory;
pub mod privileges;
pub mod report;
pub mod room;
pub mod sources;
