//! Konnectivity as it is spoken by others: stand-ins for its server, its agent and its client
//! library, made from the facts of the protocol with another gRPC library and other code for its
//! messages, at every place of the connector where a real one may stand.

mod agent;
mod agent_connections;
mod agent_session;
mod authority;
mod balancer;
mod choice;
mod client;
mod defects;
mod framing;
mod frontend_tcp;
mod guide;
mod lease;
mod legacy_agent;
mod legacy_connect;
mod legacy_frontend;
mod legacy_server;
mod loads;
mod migration;
mod patience;
mod peers;
mod place;
mod program;
mod quic_step;
mod reusable;
mod revocation;
mod scene;
mod script;
mod script_agent;
mod script_server;
mod server_close;
mod server_data;
mod server_dial;
mod server_http;
mod server_session;
mod service;
mod shards;
mod tls_floor;
mod token;
mod wire;
