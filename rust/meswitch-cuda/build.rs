//! Compiles `cuda/kernels/*.cu` into fat binaries, where nvcc is to be had, and has them embedded.
//!
//! `MESWITCH_CUDA` says what a missing nvcc means: with `auto` (the default) the crate has no kernels and says why, with
//! `require` the build fails; with `off` nvcc is not looked for. Kernels run on the driver of CUDA 13.0 if an nvcc of
//! 13.0 made them: newer PTX needs a newer driver.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs, thread};

const KERNELS: [&str; 4] = ["prepare", "multiply", "finish", "rows"];

/// Machine code for each; later devices of the same first digit run it too (8.6 and 8.9 that of 8.0).
const CAPABILITIES: [&str; 4] = ["80", "90", "100", "120"];

/// PTX, which the driver compiles for any later device.
const PTX: &str = "100";

fn main() {
    let cuda = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../cuda");
    for name in ["MESWITCH_CUDA", "PATH", "VIRTUAL_ENV", "CUDA_HOME"] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    for folder in ["include", "kernels"] {
        println!("cargo::rerun-if-changed={}", cuda.join(folder).display());
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let wanted = env::var("MESWITCH_CUDA").unwrap_or_else(|_| "auto".into());
    let built = match wanted.as_str() {
        "off" => Err("built with MESWITCH_CUDA=off".to_owned()),
        "auto" | "require" => find_nvcc().and_then(|nvcc| compile(&nvcc, &cuda, &out)),
        other => panic!("MESWITCH_CUDA: expected auto, off or require, found {other}"),
    };
    if let (Err(reason), "require") = (&built, wanted.as_str()) {
        panic!("MESWITCH_CUDA=require: {reason}");
    }
    fs::write(out.join("images.rs"), source(built.as_ref().map_err(String::as_str))).expect("OUT_DIR takes files");
}

/// `images.rs`: the fat binaries, or why there are none.
fn source(built: Result<&String, &str>) -> String {
    let (count, value) = match built {
        Err(reason) => (0, format!("Err({reason:?})")),
        Ok(version) => {
            let image = |name| format!("image!(\"{name}\", concat!(env!(\"OUT_DIR\"), \"/{name}.fatbin\"))");
            let images: Vec<String> = KERNELS.map(image).into();
            let built = format!("{version}, sm_{}", CAPABILITIES.join(", sm_"));
            (KERNELS.len(), format!("Ok(Built {{ compiler: {built:?}, images: &[{}] }})", images.join(", ")))
        }
    };
    format!("/// {count} fat binaries.\npub static EMBEDDED: Result<Built, &str> = {value};\n")
}

/// A system's nvcc, or that of the wheels that `make` puts into a folder of the virtual environment.
fn find_nvcc() -> Result<PathBuf, String> {
    let mut folders: Vec<PathBuf> = env::var_os("PATH").iter().flat_map(env::split_paths).collect();
    folders.extend(env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin")));
    folders.push("/usr/local/cuda/bin".into());
    folders.extend(env::var_os("VIRTUAL_ENV").map(|environment| Path::new(&environment).join("cuda/nvidia/cu13/bin")));
    let found = folders.into_iter().map(|folder| folder.join("nvcc")).find(|path| path.is_file());
    found.ok_or_else(|| "no nvcc on PATH, below CUDA_HOME or in the virtual environment when this was built".into())
}

/// Compiles every kernel and returns nvcc's name and version.
fn compile(nvcc: &Path, cuda: &Path, out: &Path) -> Result<String, String> {
    thread::scope(|scope| {
        let jobs = KERNELS.map(|name| scope.spawn(move || compile_kernel(nvcc, cuda, out, name)));
        jobs.into_iter().try_for_each(|job| job.join().expect("a compiler's thread does not panic"))
    })?;
    let said = run(Command::new(nvcc).arg("--version"))?;
    let release = said.split("release ").nth(1).and_then(|rest| rest.split(',').next()).unwrap_or("of unknown version");
    Ok(format!("nvcc {release}"))
}

fn compile_kernel(nvcc: &Path, cuda: &Path, out: &Path, name: &str) -> Result<(), String> {
    let mut command = Command::new(nvcc);
    command.args(["-fatbin", "-std=c++17", "--compress-mode=size", "-gencode"]);
    command.arg(format!("arch=compute_{PTX},code=compute_{PTX}"));
    for capability in CAPABILITIES {
        command.args(["-gencode", &format!("arch=compute_{capability},code=sm_{capability}")]);
    }
    command.arg(cuda.join(format!("kernels/{name}.cu"))).arg("-o").arg(out.join(format!("{name}.fatbin")));
    run(&mut command).map(drop)
}

/// What a command writes, or the first line that says why it failed.
fn run(command: &mut Command) -> Result<String, String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let done = command.output().map_err(|error| format!("{program} does not run: {error}"))?;
    if done.status.success() {
        return Ok(String::from_utf8_lossy(&done.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    let line = said.lines().find(|line| line.contains("error") || line.contains("fatal")).or(said.lines().next());
    Err(format!("{program} failed: {}", line.unwrap_or("it did not say why")))
}
