//! Server addresses: `host:port`.

/// Splits `host:port`; an IPv6 address stands in brackets.
pub fn split(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let host = match host.strip_prefix('[') {
        Some(v6) => v6.strip_suffix(']')?,
        None if host.contains(':') => return None,
        None => host,
    };
    let port = port.parse().ok().filter(|port| *port != 0)?;
    (!host.is_empty()).then_some((host, port))
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn addresses() {
        assert_eq!(split("cp.example.org:8132"), Some(("cp.example.org", 8132)));
        assert_eq!(split("[fd00::1]:8132"), Some(("fd00::1", 8132)));
        for wrong in [
            "",
            "cp",
            ":8132",
            "cp:0",
            "cp:x",
            "fd00::1:8132",
            "[fd00::1:8132",
        ] {
            assert_eq!(split(wrong), None, "{wrong:?}");
        }
    }
}
