//! The benchmark: several ways from a client to a target, measured in turns in one run.
//!
//! * [`scene`]: two network namespaces and the wire between them, with a target at its end;
//! * [`path`]: a way from the client to the target, and the programs that it consists of;
//! * [`measure`]: what is done over a path, and the figures that it gives;
//! * [`run`]: every measure over every path, round by round, and what came out of it;
//! * [`load`]: the client's connections;
//! * `offload`: what network devices do by themselves, switched off;
//! * [`target`]: the program at the end of all paths;
//! * [`usage`]: what a path's programs took meanwhile.
//!
//! Clients and target are not part of what is measured: their processor time and their memory are
//! never counted, only shared with.

pub mod load;
pub mod measure;
mod offload;
pub mod path;
pub mod run;
pub mod scene;
pub mod target;
pub mod usage;
