//! Hooks of the programs in a cgroup.

/// A program and its hook.
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
    /// All hooks in the order of attaching: the hooks that a redirected socket needs come before
    /// the redirect itself. Detaching uses the reverse order.
    pub const ALL: [Self; 5] = [
        Self::Established,
        Self::Getpeername4,
        Self::Getpeername6,
        Self::Connect4,
        Self::Connect6,
    ];

    /// Returns the name of the program in its object, and of its link's pin.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Established => "established",
            Self::Getpeername4 => "getpeername4",
            Self::Getpeername6 => "getpeername6",
            Self::Connect4 => "connect4",
            Self::Connect6 => "connect6",
        }
    }

    /// Returns the `enum bpf_attach_type` of linux/bpf.h.
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
