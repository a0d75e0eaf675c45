//! Windows of a stream, and what they cost.

/// Maximum number of bytes that the far side may send on one stream before they are read: the cost of a
/// stopped reader. Above the bandwidth-delay product of 1 Gbit/s at 8 ms.
pub(super) const STREAM_WINDOW: u32 = 1 << 20;

/// Maximum number of bytes of packets that quinn-proto keeps for a stream whose reader has stopped: its
/// assembler joins chunks once they take one and a half windows more than they hold.
pub(super) const STREAM_HELD: u32 = STREAM_WINDOW / 2 * 5;
