//! Memory lent to torch by DLPack: who receives a capsule keeps the memory until it calls the capsule's deleter.

use std::ffi::{CStr, c_void};
use std::sync::Arc;
use std::thread;

use pyo3::ffi;
use pyo3::prelude::*;

/// The name of a capsule that nobody has received yet; a receiver renames it.
const NAME: &CStr = c"dltensor";
/// Memory of the host.
const CPU: i32 = 1;
/// Unsigned integers.
const UNSIGNED: u8 = 1;

#[repr(C)]
struct Device {
    kind: i32,
    number: i32,
}

#[repr(C)]
struct DataType {
    code: u8,
    bits: u8,
    lanes: u16,
}

/// DLPack's `DLTensor`.
#[repr(C)]
struct Tensor {
    data: *mut c_void,
    device: Device,
    dimensions: i32,
    dtype: DataType,
    shape: *mut i64,
    strides: *mut i64,
    byte_offset: u64,
}

/// DLPack's `DLManagedTensor`.
#[repr(C)]
struct Managed {
    tensor: Tensor,
    context: *mut c_void,
    deleter: unsafe extern "C" fn(*mut Managed),
}

/// Memory that stays where it is as long as it lives.
type Memory = dyn AsRef<[u8]> + Send + Sync;

/// What a capsule points to, and what it keeps alive.
struct Lent {
    managed: Managed,
    length: i64,
    /// Taken when it is dropped.
    memory: Option<Arc<Memory>>,
}

/// From so many bytes on, memory is given back by a thread of its own: a gigabyte takes a tenth of a second, and whoever
/// drops the last tensor may have steps to run.
const MANY_BYTES: usize = 1 << 24;

impl Drop for Lent {
    fn drop(&mut self) {
        let is_last = |memory: &Arc<Memory>| Arc::strong_count(memory) == 1 && (**memory).as_ref().len() >= MANY_BYTES;
        if let Some(memory) = self.memory.take().filter(is_last) {
            // Where there can be no thread, it is dropped here.
            let _ = thread::Builder::new().name("meswitch-free".to_owned()).spawn(move || drop(memory));
        }
    }
}

/// A capsule of memory as a tensor of bytes.
pub fn capsule(py: Python<'_>, memory: Arc<Memory>) -> PyResult<Bound<'_, PyAny>> {
    let bytes = (*memory).as_ref();
    let length = bytes.len() as i64;
    let tensor = Tensor {
        data: bytes.as_ptr().cast_mut().cast(),
        device: Device { kind: CPU, number: 0 },
        dimensions: 1,
        dtype: DataType { code: UNSIGNED, bits: 8, lanes: 1 },
        shape: std::ptr::null_mut(),
        strides: std::ptr::null_mut(),
        byte_offset: 0,
    };
    let managed = Managed { tensor, context: std::ptr::null_mut(), deleter: delete };
    let lent = Box::into_raw(Box::new(Lent { managed, length, memory: Some(memory) }));
    // SAFETY: `lent` was just allocated and nobody else has it; the capsule gets a pointer that stays valid until
    // `delete`, which whoever receives the capsule, or else `abandon`, calls once.
    unsafe {
        (*lent).managed.tensor.shape = &raw mut (*lent).length;
        (*lent).managed.context = lent.cast();
        let capsule = ffi::PyCapsule_New((&raw mut (*lent).managed).cast(), NAME.as_ptr(), Some(abandon));
        let capsule = Bound::from_owned_ptr_or_err(py, capsule);
        if capsule.is_err() {
            drop(Box::from_raw(lent));
        }
        capsule
    }
}

/// Gives the memory back.
///
/// # Safety
/// `managed` must come from [`capsule`], and must not be used afterwards.
unsafe extern "C" fn delete(managed: *mut Managed) {
    // SAFETY: the caller guarantees it; the context is the `Lent` that it lies in.
    drop(unsafe { Box::from_raw((*managed).context.cast::<Lent>()) });
}

/// Gives back the memory of a capsule that nobody has received.
///
/// # Safety
/// `object` must be a capsule that is being freed.
unsafe extern "C" fn abandon(object: *mut ffi::PyObject) {
    // SAFETY: a capsule of this name holds a pointer that [`capsule`] put there, and nobody has deleted it.
    unsafe {
        if ffi::PyCapsule_IsValid(object, NAME.as_ptr()) == 1 {
            delete(ffi::PyCapsule_GetPointer(object, NAME.as_ptr()).cast());
        }
    }
}
