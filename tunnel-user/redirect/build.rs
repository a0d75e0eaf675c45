//! Finds the kernel programs of `cargo xtask build-ebpf`, for `redirect::object` to embed.
//!
//! A build without them lacks only the redirect, which reports that at run time.

use std::{env, fs, path::PathBuf};

/// Variable that names another object than the default one.
const OVERRIDE: &str = "CPC_EBPF_OBJECT";

fn main() {
    println!("cargo::rustc-check-cfg=cfg(ebpf_object)");
    println!("cargo::rerun-if-env-changed={OVERRIDE}");

    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let directory = manifest.join("../../target/bpf");
    let object = match env::var_os(OVERRIDE) {
        Some(path) => PathBuf::from(path),
        None => {
            // Cargo takes a path that is missing for one that has changed, every time.
            if let Err(error) = fs::create_dir_all(&directory) {
                println!("cargo::warning={}: {error}", directory.display());
            }
            println!("cargo::rerun-if-changed={}", directory.display());
            directory.join("cpc-redirect.o")
        }
    };
    if let Ok(object) = object.canonicalize() {
        println!("cargo::rerun-if-changed={}", object.display());
        println!("cargo::rustc-env=CPC_EBPF_OBJECT_PATH={}", object.display());
        println!("cargo::rustc-cfg=ebpf_object");
    } else if env::var_os(OVERRIDE).is_some() {
        println!("cargo::error={OVERRIDE}: there is no {}", object.display());
    }
}
