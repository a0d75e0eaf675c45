//! Targets of log lines that filters name.

/// Target of the access log: `cpc::access=off`.
pub const ACCESS: &str = "cpc::access";
