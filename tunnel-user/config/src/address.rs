//! Server addresses: `host:port`.

/// Splits `host:port`. An IPv6 address stands in brackets.
pub fn split(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let host = match host.strip_prefix('[') {
        Some(v6) => v6.strip_suffix(']')?,
        None if host.contains(':') => return None,
        None => host,
    };
    let is_digits = port.bytes().all(|b| b.is_ascii_digit());
    let port = port.parse().ok().filter(|port| is_digits && *port != 0)?;
    let in_host = |c: char| c.is_ascii_alphanumeric() || "._-:%".contains(c);
    (!host.is_empty() && host.chars().all(in_host)).then_some((host, port))
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn addresses() {
        assert_eq!(split("cp.example.org:8132"), Some(("cp.example.org", 8132)));
        assert_eq!(split("[fd00::1]:8132"), Some(("fd00::1", 8132)));
        assert_eq!(split("[fe80::1%eth0]:1"), Some(("fe80::1%eth0", 1)));
        for wrong in [
            "",
            "cp",
            ":8132",
            "cp:0",
            "cp:x",
            "fd00::1:8132",
            "[fd00::1:8132",
            " cp:8132",
            "cp :8132",
            "cp:8132 ",
            "cp: 8132",
            "cp:+8132",
            "a:1, b:2",
            "a:1 b:2",
            "https://cp:8132",
            "cp/x:8132",
            "user@cp:8132",
        ] {
            assert_eq!(split(wrong), None, "{wrong:?}");
        }
    }
}
