//! The places in a cgroup where our programs sit.

/// One program and the hook it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// Hands the origin to the accepting side (`BPF_CGROUP_SOCK_OPS`).
    Established,
    /// Answers getpeername(2) for IPv4 sockets.
    Getpeername4,
    /// Answers getpeername(2) for IPv6 sockets.
    Getpeername6,
    /// Decides over connect(2) of IPv4 sockets.
    Connect4,
    /// Decides over connect(2) of IPv6 sockets.
    Connect6,
}

impl Hook {
    /// All of them in the order of attaching: what a redirected socket needs comes before what
    /// redirects it. Detaching goes the other way.
    pub const ALL: [Self; 5] = [
        Self::Established,
        Self::Getpeername4,
        Self::Getpeername6,
        Self::Connect4,
        Self::Connect6,
    ];

    /// Name of the program in its object, and of its link's pin.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Established => "established",
            Self::Getpeername4 => "getpeername4",
            Self::Getpeername6 => "getpeername6",
            Self::Connect4 => "connect4",
            Self::Connect6 => "connect6",
        }
    }

    /// `enum bpf_attach_type` of linux/bpf.h.
    pub(super) const fn attach_type(self) -> u32 {
        match self {
            Self::Established => 3,
            Self::Connect4 => 10,
            Self::Connect6 => 11,
            Self::Getpeername4 => 29,
            Self::Getpeername6 => 30,
        }
    }
}
