//! Classic BPF, as far as the program uses it that steers packets to shards (`SO_ATTACH_REUSEPORT_CBPF`).

/// One instruction.
#[derive(Clone, Copy, Debug)]
pub struct Instruction {
    /// Operation.
    pub code: u16,
    /// Offset of the jump where the condition holds.
    pub jt: u8,
    /// Offset of the jump where it does not.
    pub jf: u8,
    /// Operand.
    pub k: u32,
}

/// Runs `program` over a packet. A load beyond its end, and an unknown instruction, return 0.
pub fn run(program: &[Instruction], packet: &[u8]) -> u32 {
    let (mut at, mut a) = (0usize, 0u32);
    while let Some(step) = program.get(at) {
        at += 1;
        let from = step.k as usize;
        match step.code {
            // BPF_LD | BPF_B | BPF_ABS
            0x30 => match packet.get(from) {
                Some(byte) => a = u32::from(*byte),
                None => return 0,
            },
            // BPF_LD | BPF_H | BPF_ABS
            0x28 => match packet.get(from..from + 2) {
                Some(bytes) => a = u32::from(bytes[0]) << 8 | u32::from(bytes[1]),
                None => return 0,
            },
            // BPF_ALU | BPF_MOD | BPF_K
            0x94 => match a.checked_rem(step.k) {
                Some(rest) => a = rest,
                None => return 0,
            },
            // BPF_JMP | BPF_JA
            0x05 => at += from,
            // BPF_JMP | BPF_JEQ | BPF_K
            0x15 => at += usize::from(if a == step.k { step.jt } else { step.jf }),
            // BPF_JMP | BPF_JSET | BPF_K
            0x45 => at += usize::from(if a & step.k != 0 { step.jt } else { step.jf }),
            // BPF_RET | BPF_A
            0x16 => return a,
            _ => return 0,
        }
    }
    0
}
