//! Compiles `proto/` with protox: no protoc to install. Watches the folders that become part of the executable. With the
//! feature `cuda`, compiles `kernels/` with nvcc; with `emulate`, with a C++ compiler, to run them on the CPU.
use prost::Message;
use std::{env, fs, path::PathBuf};

#[cfg(any(feature = "cuda", feature = "emulate"))]
#[path = "kernels/build.rs"]
mod kernels;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    // Folders that `include_dir!` puts into the executable: it cannot tell cargo of them itself.
    println!("cargo:rerun-if-changed=adapters");
    println!("cargo:rerun-if-changed=models/demo/hot-load");
    println!("cargo:rerun-if-changed=models/demo/live");
    let files =
        ["inference.proto", "adapters.proto", "training.proto", "server.proto"].map(|f| format!("prefixd/v1/{f}"));
    let descriptors = protox::compile(files, ["proto"])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("prefixd.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().compile_fds(descriptors)?;
    #[cfg(feature = "cuda")]
    kernels::for_cuda(&out)?;
    #[cfg(feature = "emulate")]
    kernels::for_cpu()?;
    Ok(())
}
