//! The return of free memory to the system, when peers hold less of it.
//!
//! Freed memory lies between live allocations, and glibc returns by itself only the free memory at the
//! top of a heap: hundreds of megabytes would stay resident until the process ends.

use std::time::Duration;

use super::Budget;

/// Interval between two checks of the budget.
const INTERVAL: Duration = Duration::from_secs(1);

/// Number of bytes that is not worth the walk through the heaps.
const FEW: u64 = 16 << 20;

/// Returns free memory whenever peers hold half as many bytes as before. Never ends.
pub async fn give_back(budget: Budget) {
    let mut max = 0;
    loop {
        tokio::time::sleep(INTERVAL).await;
        let now = budget.used();
        max = max.max(budget.take_peak());
        if has_shrunk(max, now) {
            max = now;
            // Milliseconds for each 100 MB, but none of a shard's time. It fails only when the
            // process is ending.
            let _ = tokio::task::spawn_blocking(trim).await;
        }
    }
}

fn has_shrunk(max: u64, now: u64) -> bool {
    max >= FEW && now <= max / 2
}

#[cfg(target_env = "gnu")]
fn trim() {
    // SAFETY: malloc_trim(3) takes its own locks, is safe from any thread, and moves nothing.
    unsafe { libc::malloc_trim(0) };
}

/// Does nothing: other C libraries return free pages by themselves.
#[cfg(not(target_env = "gnu"))]
fn trim() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_bytes_are_not_worth_it() {
        assert!(has_shrunk(200 << 20, 100 << 20) && has_shrunk(FEW, 0));
        assert!(!has_shrunk(200 << 20, 101 << 20) && !has_shrunk(FEW - 1, 0));
    }
}
