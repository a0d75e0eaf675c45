//! Random numbers of the kernel, for identifiers and for decisions; keys come from the TLS library.

use std::io;

/// Fills `bytes` with random numbers (getrandom(2)).
///
/// # Errors
/// The error of the system call, which a kernel since 3.17 does not return.
pub fn fill(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        // SAFETY: the kernel writes no more bytes than there are.
        let filled = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        match usize::try_from(filled) {
            Ok(filled) => bytes = &mut bytes[filled..],
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_byte_is_filled() {
        let mut ever = [0; 1000];
        for _ in 0..8 {
            let mut bytes = [0; 1000];
            super::fill(&mut bytes).unwrap();
            ever.iter_mut()
                .zip(bytes)
                .for_each(|(all, one)| *all |= one);
        }
        assert!(!ever.contains(&0));
    }
}
