//! Peers and strangers that mean harm, while an honest agent goes on serving an honest client.
//!
//! After each attack: a line in the log says what was refused and why, the processes live and hold
//! no more than before, and not one request of the honest client has failed.

mod agent_peer;
mod certificates;
mod descriptors;
mod handshakes;
mod joins;
#[path = "../../hostile/leaky.rs"]
mod leaky;
mod limits;
mod memory;
#[path = "../../hostile/peer.rs"]
mod peer;
mod ports;
mod programs;
mod renewal;
mod scene;
mod server_peer;
