//! Compiles the kernels, for a GPU or for the emulation.
use std::error::Error;
#[cfg(feature = "cuda")]
use std::path::Path;
use std::path::PathBuf;
use std::{env, fs};

/// Every `.cu` file, and cargo told to watch the folder.
fn sources() -> Result<Vec<PathBuf>, Box<dyn Error>> {
    println!("cargo:rerun-if-changed=kernels");
    let mut files = fs::read_dir("kernels")?.map(|e| Ok(e?.path())).collect::<Result<Vec<_>, std::io::Error>>()?;
    files.retain(|path| path.extension().is_some_and(|e| e == "cu"));
    files.sort();
    Ok(files)
}

/// Machine code for each architecture of `PREFIXD_CUDA_ARCHS` (default: 80, 90a), and PTX of the first for later ones; then
/// `kernels.rs`, which holds them all.
#[cfg(feature = "cuda")]
pub fn for_cuda(out: &Path) -> Result<(), Box<dyn Error>> {
    use std::fmt::Write;
    for variable in ["NVCC", "CUDA_HOME", "PREFIXD_CUDA_ARCHS"] {
        println!("cargo:rerun-if-env-changed={variable}");
    }
    let nvcc = match (env::var_os("NVCC"), env::var_os("CUDA_HOME")) {
        (Some(nvcc), _) => PathBuf::from(nvcc),
        (None, Some(home)) => Path::new(&home).join("bin/nvcc"),
        (None, None) => PathBuf::from("nvcc"),
    };
    let archs = env::var("PREFIXD_CUDA_ARCHS").unwrap_or_else(|_| "80,90a".into());
    let mut targets: Vec<String> = Vec::new();
    for (i, arch) in archs.split(',').map(str::trim).enumerate() {
        targets.push(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
        if i == 0 {
            targets.push(format!("-gencode=arch=compute_{arch},code=compute_{arch}"));
        }
    }
    let mut list = String::from("/// File and code.\nconst KERNELS: &[(&str, &[u8])] = &[\n");
    for source in sources()? {
        let name = source.file_stem().and_then(|s| s.to_str()).ok_or("a kernel without a name")?.to_owned();
        let image = out.join(format!("{name}.fatbin"));
        let mut command = std::process::Command::new(&nvcc);
        command
            .args(["-fatbin", "-O3", "-std=c++17", "-I", "kernels"])
            .args(&targets)
            .arg("-o")
            .arg(&image)
            .arg(&source);
        let status = command.status().map_err(|e| {
            format!("cannot run {}: {e}. Install a CUDA toolkit, or run scripts/cuda-toolkit.sh", nvcc.display())
        })?;
        if !status.success() {
            return Err(format!("nvcc failed on {}", source.display()).into());
        }
        writeln!(list, "    ({name:?}, include_bytes!({image:?})),")?;
    }
    list.push_str("];\n");
    fs::write(out.join("kernels.rs"), list)?;
    Ok(())
}

/// A library of the kernels as C++. `PREFIXD_SANITIZE=address,undefined` has each access checked; `PREFIXD_KERNELS_DIR` is where
/// a shared one is that somebody has built (`scripts/kernels-mutate.py`).
#[cfg(feature = "emulate")]
pub fn for_cpu() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-env-changed=PREFIXD_SANITIZE");
    println!("cargo:rerun-if-env-changed=PREFIXD_KERNELS_DIR");
    if let Ok(dir) = env::var("PREFIXD_KERNELS_DIR") {
        println!("cargo:rustc-link-search=native={dir}");
        println!("cargo:rustc-link-lib=dylib=prefixd_kernels");
        return Ok(());
    }
    let mut build = cc::Build::new();
    build.cpp(true).opt_level(2).include("kernels").include("kernels/cpu");
    // What the kernels are compiled with wherever that is on the CPU.
    fs::read_to_string("kernels/cpu/flags")?.lines().filter(|l| !l.starts_with('#')).for_each(|flag| {
        build.flag(flag);
    });
    if let Ok(checks) = env::var("PREFIXD_SANITIZE") {
        build
            .flag(format!("-fsanitize={checks}"))
            .flag("-fno-sanitize-recover=all")
            .flag("-fno-omit-frame-pointer")
            .opt_level(1);
        // By name, which reaches tests of the library too.
        let runtimes = [("address", "asan"), ("undefined", "ubsan")];
        for (_, library) in runtimes.iter().filter(|(check, _)| checks.split(',').any(|c| c == *check)) {
            println!("cargo:rustc-link-lib=dylib={library}");
        }
    }
    build.files(sources()?).file("kernels/cpu/emulate.cpp");
    // The kernels register themselves; no symbol of theirs is asked for.
    build.link_lib_modifier("+whole-archive").compile("prefixd_kernels");
    Ok(())
}
