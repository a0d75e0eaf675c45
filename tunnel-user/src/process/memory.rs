//! Gives memory back to the system when stopped streams have gone.
//!
//! What they held lies between what lives, and glibc returns by itself only what is free at the
//! top of a heap: hundreds of megabytes would stay resident for ever.

use std::time::Duration;

use crate::datapath::Budget;

/// How often it is looked whether streams have gone.
const INTERVAL: Duration = Duration::from_secs(5);

/// Streams that are not worth the walk through the heaps.
const FEW: usize = 16;

/// Returns free memory, for ever, whenever half of the stalled streams have gone.
pub async fn give_back(budget: Budget) {
    let mut most = 0;
    loop {
        tokio::time::sleep(INTERVAL).await;
        let now = budget.stalled();
        most = most.max(budget.take_peak());
        if has_shrunk(most, now) {
            most = now;
            // Milliseconds for each 100 MB, but none of a shard's time. It fails only when the
            // process is ending.
            let _ = tokio::task::spawn_blocking(trim).await;
        }
    }
}

fn has_shrunk(most: usize, now: usize) -> bool {
    most >= FEW && now <= most / 2
}

#[cfg(target_env = "gnu")]
fn trim() {
    // SAFETY: malloc_trim(3) takes its own locks, is safe from any thread, and moves nothing.
    unsafe { libc::malloc_trim(0) };
}

/// Other C libraries return free pages by themselves.
#[cfg(not(target_env = "gnu"))]
fn trim() {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_streams_are_not_worth_it() {
        assert!(has_shrunk(200, 100) && has_shrunk(FEW, 0));
        assert!(!has_shrunk(200, 101) && !has_shrunk(FEW - 1, 0));
    }
}
