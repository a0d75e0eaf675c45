//! The kernel programs embedded in this binary.

/// Object file of `cargo xtask build-ebpf`, aligned for its reader.
#[cfg(ebpf_object)]
static OBJECT: Option<&[u8]> = Some(aya::include_bytes_aligned!(env!("CPC_EBPF_OBJECT_PATH")));
#[cfg(not(ebpf_object))]
static OBJECT: Option<&[u8]> = None;

/// Returns the kernel programs (an ELF object), or `None` in a build without them.
pub fn object() -> Option<&'static [u8]> {
    OBJECT
}
