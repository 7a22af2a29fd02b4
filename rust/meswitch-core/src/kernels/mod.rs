//! Arithmetic, dispatched once per process to what the processor has.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod backend;
pub mod dense;
pub mod floats;
mod input;
pub mod linear;
mod lookup;
pub mod matrix;
#[cfg(target_arch = "aarch64")]
mod neon;
mod parts;
pub mod rows;
mod scalar;
pub mod sparse;
mod tables;
pub mod team;
pub mod unpack;

pub use backend::{Backend, available, backend, check, features};

/// Compiles one body for every instruction set and calls the one that the processor runs.
///
/// The body is the scalar truth; the compiler vectorises it under wider features. Sums keep sixteen lanes in a fixed
/// order and nothing is contracted, so every instruction set gives the same bits.
macro_rules! by_backend {
    ($(#[$doc:meta])* pub fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:path) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        pub fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c,bmi2")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? { $body($($arg),*) }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? { $body($($arg),*) }
                match $crate::kernels::backend() {
                    // SAFETY: `backend` names an instruction set only after the processor said that it has it.
                    $crate::kernels::Backend::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: as above.
                    $crate::kernels::Backend::Avx2 => return unsafe { avx2($($arg),*) },
                    _ => {}
                }
            }
            $body($($arg),*)
        }
    };
}
pub(crate) use by_backend;
