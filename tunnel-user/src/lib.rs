//! Control Plane Connector: kube-apiserver reaches kubelets, pods and services in a network that
//! nobody can reach from outside.
//!
//! A connection goes from left to right: frontend, router, link, the wire, agent, policy, dialer.
//! [`server`] is the control plane's half and [`agent`] the worker's; neither knows the other.

pub mod admin;
pub mod agent;
pub mod cli;
pub mod config;
pub mod datapath;
pub mod join;
pub mod kubernetes;
pub mod process;
pub mod redirect;
pub mod report;
pub mod server;
pub mod telemetry;
pub mod tls;
pub mod transport;
