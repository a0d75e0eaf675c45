//! The number of shards of a process.

/// Maximum number of shards of a process.
pub const MAX_SHARDS: usize = 64;

/// Returns one shard for each core that the process may run on, at most [`MAX_SHARDS`].
pub fn usual_shards() -> usize {
    let cores = std::thread::available_parallelism();
    cores.map_or(1, usize::from).clamp(1, MAX_SHARDS)
}
