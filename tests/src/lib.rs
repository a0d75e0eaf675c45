//! Common parts of the end-to-end tests, `cargo xtask lab` and `cargo xtask demo`.
//!
//! * [`lab`]: the laboratory, a control plane and its workers as network namespaces on one machine;
//! * [`target`]: the servers that stand on the workers, beside a real nginx;
//! * [`puppet`]: a target that a test holds in its hands;
//! * [`frontend`]: the ways into the tunnel;
//! * [`bench`](mod@bench): the benchmark: paths, measures and the run that joins them;
//! * [`client`]: what connects to them, with checks and measurements;
//! * [`exposition`]: a strict reader of the page of metrics;
//! * [`hostile`]: programs that mean harm, beside a pair that must not notice;
//! * [`ledger`]: a server that remembers every request that it was asked;
//! * [`load`]: clients that ask again and again while something happens;
//! * [`service`]: one address that several agents serve;
//! * [`steady`]: a client that must not notice what is done to others;
//! * [`pattern`]: bytes that show where they were lost, doubled or reordered.
//!
//! The library starts programs and asks the kernel; it knows nothing of the connector's inside.

pub mod bench;
pub mod client;
pub mod conversation;
pub mod exposition;
pub mod frontend;
pub mod hostile;
pub mod keeper;
pub mod lab;
pub mod ledger;
pub mod load;
pub mod pattern;
pub mod puppet;
pub mod seccomp;
pub mod service;
pub mod side;
pub mod steady;
pub mod successor;
pub mod target;
