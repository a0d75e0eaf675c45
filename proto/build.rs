//! Generates the messages. protox is a protobuf compiler in Rust: no `protoc` is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=tunnel.proto");
    println!("cargo::rerun-if-changed=konnectivity.proto");
    println!("cargo::rerun-if-changed=handover.proto");
    println!("cargo::rerun-if-changed=keeper.proto");
    let files = [
        "tunnel.proto",
        "konnectivity.proto",
        "handover.proto",
        "keeper.proto",
    ];
    let descriptors = protox::compile(files, ["."])?;
    let mut config = prost_build::Config::new();
    // A payload is passed on, not looked at: it stays where it was received.
    config.bytes([".Data.data", ".cpc.handover.v1", ".cpc.keeper.v1"]);
    // Without a package of its own, which would be in the paths.
    config.default_package_filename("konnectivity");
    config.compile_fds(descriptors)?;
    Ok(())
}
