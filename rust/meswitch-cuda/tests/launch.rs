//! The whole launch path, with the driver of `cuda/host` in place of libcuda: it runs the same kernels on the processor.

use std::ffi::{CString, c_void};
use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;
use std::{env, ptr};

use meswitch_cuda::Error;
use meswitch_cuda::arguments::{Group, Launch, Part, RowsLaunch, Slot, groups, splits};
use meswitch_cuda::driver::{self, Driver};
use meswitch_cuda::image::{self, Image};
use meswitch_cuda::kernels::{Dtype, Kernels};

/// An image that begins as a fat binary does, which is all that the host's driver looks at.
#[repr(align(64))]
struct FatBinary([u8; 64]);
static FAT_BINARY: FatBinary = FatBinary({
    let mut bytes = [0; 64];
    [bytes[0], bytes[1], bytes[2], bytes[3]] = 0xba55_ed50_u32.to_le_bytes();
    bytes
});
const IMAGE: Image = Image { name: "kernels", bytes: &FAT_BINARY.0 };

/// The host's driver, compiled once; `CXX` may name the compiler.
fn host_driver() -> &'static Driver {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    DRIVER.get_or_init(|| {
        let cuda = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../cuda");
        let folder = tempfile::tempdir().unwrap();
        let library = folder.path().join("libcuda.so.1");
        let sources =
            ["kernels/prepare.cu", "kernels/multiply.cu", "kernels/finish.cu", "kernels/rows.cu", "host/driver.cpp"];
        let done = Command::new(env::var("CXX").unwrap_or_else(|_| "g++".into()))
            .args(["-std=c++20", "-O1", "-shared", "-fPIC", "-x", "c++"])
            .args(sources.map(|source| cuda.join(source)))
            .arg("-o")
            .arg(&library)
            .status()
            .expect("a C++ compiler");
        assert!(done.success());
        let name = CString::new(library.to_str().unwrap()).unwrap();
        // SAFETY: it has the functions of a driver, with the types of cuda.h.
        unsafe { Driver::open(&name) }.unwrap()
    })
}

/// A launch of one site that points to nothing yet.
fn launch_of(rows: i32, columns: i32) -> Launch {
    let mut launch = Launch { columns, site_count: 1, most_rows: rows, x_stride: columns.into(), ..Launch::EMPTY };
    (launch.sites[0].rows, launch.sites[0].y_stride) = (rows, rows.into());
    launch.splits = splits(rows as usize, columns as usize);
    launch
}

/// 300 rows and 2304 columns of 2 bits, every code 3 with a zero of 1.5 and a scale of 1: Δ̂ · x is 1.5 · Σ x.
#[test]
fn a_launch_adds_the_delta() {
    const ROWS: usize = 300;
    const COLUMNS: usize = 2304;
    let kernels = Kernels::load(host_driver(), 0, &[IMAGE]).unwrap();
    let (codes, scales) = (vec![u128::MAX; COLUMNS / 4 * 320 / 16], [0x3c00u16; ROWS]); // 1.0
    let mut slots = [Slot::EMPTY; 3];
    slots[2].part_count = 1;
    slots[2].unit = 1.0;
    let part = Part::new(2, 1.5, COLUMNS, ROWS, COLUMNS).unwrap();
    slots[2].parts[0] = Part { codes: codes.as_ptr().cast(), scales: scales.as_ptr(), ..part };
    let x: Vec<f32> = (0..4 * COLUMNS).map(|at| (at % 7) as f32).collect();
    let mut y = vec![1f32; 4 * ROWS];
    let (groups, order) = groups(&[-1, 0, 1, 2]);
    let count = groups.len() as i32;

    let mut launch = launch_of(ROWS as i32, COLUMNS as i32);
    assert_eq!(launch.splits, 2, "the few rows leave the columns to divide");
    let bytes = launch.workspace(groups.len()).unwrap();
    let mut ready = vec![0u128; bytes.ready / 16];
    let mut floats = [bytes.steps, bytes.vx, bytes.partial].map(|bytes| vec![0f32; bytes / 4]);
    (launch.sites[0].slots, launch.sites[0].slot_count) = (slots.as_ptr(), 2);
    launch.sites[0].y = y.as_mut_ptr().cast();
    (launch.groups, launch.group_count, launch.order) = (groups.as_ptr(), &raw const count, order.as_ptr());
    launch.x = x.as_ptr().cast();
    launch.ready = ready.as_mut_ptr().cast();
    [launch.steps, launch.vx, launch.partial] = floats.each_mut().map(|floats| floats.as_mut_ptr());
    for _ in 0..2 {
        // SAFETY: all memory is as the fields say, and a launch of this driver has ended when it returns.
        unsafe { kernels.launch(Dtype::Float32, &launch, groups.len(), ptr::null_mut::<c_void>()) }.unwrap();
    }

    let expected = 1.0 + 2.0 * 1.5 * x[2 * COLUMNS..3 * COLUMNS].iter().sum::<f32>();
    assert!(y[..2 * ROWS].iter().all(|y| *y == 1.0), "a token of the base, and one of an empty slot");
    assert!(y[3 * ROWS..].iter().all(|y| *y == 1.0), "a token of a slot beyond the table");
    assert!(y[2 * ROWS..3 * ROWS].iter().all(|y| (y - expected).abs() < 1e-4 * expected), "{} {expected}", y[2 * ROWS]);
}

/// The same weights, of which rows 298 and 299 are added and row 300 is not there.
#[test]
fn a_launch_adds_rows() {
    const ROWS: usize = 300;
    const COLUMNS: usize = 40;
    let kernels = Kernels::load(host_driver(), 0, &[IMAGE]).unwrap();
    let (codes, scales) = (vec![u128::MAX; COLUMNS / 4 * 320 / 16], [0x3c00u16; ROWS]);
    let mut slots = [Slot::EMPTY, Slot { part_count: 1, unit: 2.0, ..Slot::EMPTY }];
    let part = Part::new(2, 1.5, 7, ROWS, COLUMNS).unwrap();
    let scales_of_groups = scales.repeat(COLUMNS.div_ceil(7));
    slots[1].parts[0] = Part { codes: codes.as_ptr().cast(), scales: scales_of_groups.as_ptr(), ..part };
    let mut y = vec![1f32; 3 * COLUMNS];
    let launch = RowsLaunch {
        slots: slots.as_ptr(),
        slot_of: ptr::null(),
        ids: ptr::null(),
        y: y.as_mut_ptr().cast(),
        y_stride: COLUMNS as i64,
        count: 3,
        rows: ROWS as i32,
        columns: COLUMNS as i32,
        slot: 0,
        first: 298,
        slot_count: 1,
    };
    // SAFETY: all memory is as the fields say, and a launch of this driver has ended when it returns.
    unsafe { kernels.launch_rows(Dtype::Float32, &launch, ptr::null_mut::<c_void>()) }.unwrap();
    assert!(y[..2 * COLUMNS].iter().all(|y| *y == 1.0 + 2.0 * 1.5), "{:?}", &y[..2 * COLUMNS]);
    assert!(y[2 * COLUMNS..].iter().all(|y| *y == 1.0));
}

#[test]
fn codes_that_kernels_do_not_take_are_refused() {
    let said = |bits, zero| Part::new(bits, zero, 8, 8, 8).unwrap_err().to_string();
    assert_eq!(said(5, 0.0), "expected 1, 2, 3, 4 or 8 bits and a zero in halves, found 5 bits and 0");
    assert_eq!(said(2, 1.25), "expected 1, 2, 3, 4 or 8 bits and a zero in halves, found 2 bits and 1.25");
    assert!(said(2, f32::NAN).ends_with("NaN"));
    assert_eq!(Part::new(8, 128.0, 0, 1, 0).map(|part| (part.twice_zero, part.group_size)), Ok((256, 1)));
}

#[test]
fn what_the_driver_refuses_is_said() {
    let driver = host_driver();
    let said = |outcome: Result<Kernels, Error>| outcome.map(drop).unwrap_err().to_string();
    let refused = "to succeed, found CUDA_ERROR_";
    assert_eq!(said(Kernels::load(driver, 1, &[IMAGE])), format!("expected cuDeviceGet {refused}NO_DEVICE (100)"));
    let text = Image { name: "text", bytes: b"no fat binary" };
    assert_eq!(
        said(Kernels::load(driver, 0, &[text])),
        format!("expected cuModuleLoadData {refused}INVALID_IMAGE (200)")
    );
    assert_eq!(said(Kernels::load(driver, 0, &[])), format!("expected cuModuleGetFunction {refused}NOT_FOUND (500)"));
}

#[test]
fn a_driver_is_described() {
    let driver = host_driver();
    assert_eq!(driver.version(), Ok((13, 0)));
    let devices = driver.devices().unwrap();
    assert_eq!(devices.len(), 1);
    assert_eq!((devices[0].name.as_str(), devices[0].capability), ("a CPU in place of a GPU", (8, 6)));
}

#[test]
fn what_is_no_driver_is_refused_with_a_reason() {
    // SAFETY: there is no such library, and libc has no initialisers that matter.
    let (missing, libc) = unsafe { (Driver::open(c"libnothing.so.1"), Driver::open(c"libc.so.6")) };
    let (missing, libc) = (missing.unwrap_err().to_string(), libc.unwrap_err().to_string());
    assert!(missing.starts_with("expected the CUDA driver, found none: libnothing.so.1"), "{missing}");
    assert!(libc.contains("cuInit"), "{libc}");
    assert_eq!(driver::driver().err(), driver::driver().err(), "the machine's own driver is looked for once");
}

#[test]
fn embedded_images_are_fat_binaries_or_absent_with_a_reason() {
    match image::embedded() {
        Err(Error::NoKernels(reason)) => {
            assert!(reason.contains("nvcc") || reason.contains("MESWITCH_CUDA=off"), "{reason}");
        }
        Err(other) => panic!("{other}"),
        Ok(built) => {
            assert!(built.compiler.starts_with("nvcc "));
            for image in built.images {
                assert_eq!(image.bytes[..4], FAT_BINARY.0[..4], "{}", image.name);
                assert_eq!(image.bytes.as_ptr().align_offset(64), 0, "{}", image.name);
            }
        }
    }
}

#[test]
fn tokens_are_grouped_by_slot() {
    let (groups, order) = groups(&[2, -1, 0, 2, 2, 2, 2, 0]);
    assert_eq!(order, [2, 7, 0, 3, 4, 5, 6]);
    let group = |slot, first, count| Group { slot, first, count };
    assert_eq!(groups, [group(0, 0, 2), group(2, 2, 4), group(2, 6, 1)]);
}

#[test]
fn shapes_decide_how_columns_are_divided() {
    let found = [(4096, 4096), (1024, 4096), (64, 2048), (1, 1)].map(|(rows, columns)| splits(rows, columns));
    assert_eq!(found, [1, 4, 2, 1]);
}

#[test]
fn counts_that_kernels_do_not_take_are_refused() {
    let said = |change: fn(&mut Launch), groups| {
        let mut launch = launch_of(8, 8);
        change(&mut launch);
        launch.workspace(groups).unwrap_err().to_string()
    };
    assert_eq!(said(|launch| launch.site_count = 5, 1), "sites: expected 1 to 4, found 5");
    assert_eq!(said(|launch| launch.columns = -1, 1), "columns: expected 1 to 16777216, found -1");
    assert_eq!(said(|launch| launch.splits = 0, 1), "splits: expected 1 to 64, found 0");
    let many = said(|launch| launch.site_count = 2, 257);
    assert_eq!(many, "expected at most 512 groups times sites, found 257 times 2");
}
