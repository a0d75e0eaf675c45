//! The version of the kernel. Only for what can't be probed: distributions backport features to older
//! kernels.

/// Whether the kernel's version is `version` or newer; false if the version can't be read.
pub fn is_since(version: (u32, u32)) -> bool {
    parse(&release()).is_some_and(|own| own >= version)
}

/// Returns the release of the kernel, for example `6.18.44-generic`.
pub fn release() -> String {
    let name = rustix::system::uname();
    name.release().to_string_lossy().into_owned()
}

/// Returns the first two numbers of a release.
fn parse(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_are_compared_as_numbers() {
        assert_eq!(parse("6.1.0-28-amd64"), Some((6, 1)));
        assert_eq!(parse("5.9-rc1"), Some((5, 9)));
        assert!(parse("5.9-rc1") < Some((5, 19)));
        assert_eq!(parse("next"), None);
        assert!(is_since((2, 6)) && !is_since((1000, 0)));
    }
}
