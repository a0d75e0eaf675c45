//! Generates the messages. protox is a protobuf compiler in Rust: no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=tunnel.proto");
    println!("cargo::rerun-if-changed=konnectivity.proto");
    let descriptors = protox::compile(["tunnel.proto", "konnectivity.proto"], ["."])?;
    let mut config = prost_build::Config::new();
    // A payload is passed on, not looked at: it stays where it was received.
    config.bytes([".Data.data"]);
    // Without a package of its own, which would be in the paths.
    config.default_package_filename("konnectivity");
    config.compile_fds(descriptors)?;
    Ok(())
}
