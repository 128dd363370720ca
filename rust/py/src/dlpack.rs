//! DLPack's C exchange table, as `ATen/dlpack.h` lays it out: how another framework's tensor is described through one C
//! call, without taking part in its ownership.
//!
//! Only what is used is spelled out. The table lives as long as the process (DLPack demands it of the framework), so a
//! reference to it is `'static`.

use std::ffi::{CStr, c_int, c_void};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;

/// The major version whose memory layout the structures below are.
const MAJOR: u32 = 1;
const CAPSULE: &CStr = c"dlpack_exchange_api";

/// `kDLCPU`.
pub const CPU: i32 = 1;

#[repr(C)]
struct Version {
    major: u32,
    minor: u32,
}

#[repr(C)]
struct Header {
    version: Version,
    previous: *const Header,
}

#[repr(C)]
struct Table {
    header: Header,
    managed_tensor_allocator: *const c_void,
    managed_tensor_from_py_object_no_sync: *const c_void,
    managed_tensor_to_py_object_no_sync: *const c_void,
    dltensor_from_py_object_no_sync: Option<Describe>,
    current_work_stream: *const c_void,
}

/// Fills in a description of a tensor of the table's framework; -1 with a Python exception set where it cannot.
pub type Describe = unsafe extern "C" fn(object: *mut c_void, out: *mut DlTensor) -> c_int;

/// `DLDevice`.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DlDevice {
    pub kind: i32,
    pub index: i32,
}

/// `DLDataType`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct DlDataType {
    pub code: u8,
    pub bits: u8,
    pub lanes: u16,
}

impl DlDataType {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        (self.bits as usize * self.lanes as usize).div_ceil(8)
    }
}

/// `DLTensor`: the memory belongs to the producer, and so do the arrays behind `shape` and `strides`.
#[repr(C)]
pub struct DlTensor {
    pub data: *mut c_void,
    pub device: DlDevice,
    pub ndim: i32,
    pub dtype: DlDataType,
    pub shape: *const i64,
    pub strides: *const i64,
    pub byte_offset: u64,
}

impl DlTensor {
    /// A description yet to be filled in.
    pub const fn empty() -> Self {
        Self {
            data: std::ptr::null_mut(),
            device: DlDevice { kind: 0, index: 0 },
            ndim: 0,
            dtype: DlDataType { code: 0, bits: 0, lanes: 0 },
            shape: std::ptr::null(),
            strides: std::ptr::null(),
            byte_offset: 0,
        }
    }
}

/// Finds the describing function in the capsule that a framework publishes as `__dlpack_c_exchange_api__`.
///
/// A framework may publish a newer major version and chain the older ones behind it; the chain is followed to the one
/// that is known here.
pub fn describe_function(capsule: &Bound<'_, PyAny>) -> PyResult<Describe> {
    let pointer = capsule.cast::<PyCapsule>()?.pointer_checked(Some(CAPSULE))?;
    let mut header: *const Header = pointer.as_ptr().cast_const().cast();
    let mut versions = String::new();
    while !header.is_null() {
        // SAFETY: the capsule's name says that this is an exchange table, every version of which starts with `Header`;
        // the chain's end is NULL, tested above, and DLPack keeps each table alive for the whole process.
        let head = unsafe { &*header };
        if head.version.major == MAJOR {
            // SAFETY: the major version just read is the one whose layout `Table` declares.
            let table = unsafe { &*header.cast::<Table>() };
            return table.dltensor_from_py_object_no_sync.ok_or_else(|| {
                PyRuntimeError::new_err(
                    "this framework's DLPack exchange table cannot describe a tensor; upgrade it",
                )
            });
        }
        versions.push_str(&format!(" {}.{}", head.version.major, head.version.minor));
        header = head.previous;
    }
    Err(PyRuntimeError::new_err(format!(
        "the DLPack exchange table has version{versions}, and {MAJOR}.x is needed; upgrade paramstate"
    )))
}
