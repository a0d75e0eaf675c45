//! The kernel programs that this binary carries.

/// The object file that `cargo xtask build-ebpf` made, aligned as its reader wants it.
#[cfg(ebpf_object)]
static OBJECT: Option<&[u8]> = Some(aya::include_bytes_aligned!(env!("CPC_EBPF_OBJECT_PATH")));
#[cfg(not(ebpf_object))]
static OBJECT: Option<&[u8]> = None;

/// The kernel programs (an ELF object), or `None` in a build that was made without them.
pub fn object() -> Option<&'static [u8]> {
    OBJECT
}
