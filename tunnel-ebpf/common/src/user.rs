//! Lets user space store the types in aya's maps.

use crate::{Attachment, Flow, FlowKey, Heartbeat, PortSet, Prefix};

// SAFETY: `#[repr(C)]`, made of integers only and without padding, so that every byte is
// initialised and every bit pattern is a value.
unsafe impl aya::Pod for Attachment {}
// SAFETY: as above.
unsafe impl aya::Pod for Flow {}
// SAFETY: as above.
unsafe impl aya::Pod for FlowKey {}
// SAFETY: as above.
unsafe impl aya::Pod for Heartbeat {}
// SAFETY: as above.
unsafe impl aya::Pod for PortSet {}
// SAFETY: as above.
unsafe impl aya::Pod for Prefix {}

/// Padding would make two equal keys differ.
const _: () = {
    use crate::{Address, Endpoint, Origin};
    assert!(size_of::<Endpoint>() == size_of::<Address>() + 4);
    assert!(size_of::<Attachment>() == 16 + 2 * size_of::<Endpoint>() + crate::NAME_LENGTH);
    assert!(size_of::<FlowKey>() == 8 + 2 * size_of::<Endpoint>());
    assert!(size_of::<Flow>() == 8 + size_of::<Endpoint>() + 4);
    assert!(size_of::<Heartbeat>() == 16);
    assert!(size_of::<Origin>() == size_of::<Endpoint>() + 8);
    assert!(size_of::<Prefix>() == 8 + size_of::<Address>());
    assert!(size_of::<PortSet>() == 4 * crate::MAX_RANGES);
};
