//! Products with deltas on the CPU.
//!
//! A [`Matrix`] is the delta of one weight. [`delta_linear`] multiplies it with activations; [`dense_rows`] writes it
//! as floats. Functions that take [`Rows`] work in place on memory that the caller lends.
//!
//! Code for the best instruction set is chosen once per process (see [`backend`]). Every instruction set gives the same
//! bits.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod backend;
mod dense;
pub(crate) mod floats;
mod input;
mod linear;
mod lookup;
mod matrix;
#[cfg(target_arch = "aarch64")]
mod neon;
mod parts;
mod rows;
mod scalar;
pub(crate) mod sparse;
mod tables;
pub mod threads;
mod unpack;

pub use backend::{Backend, available, backend, check, features};
pub use dense::{BaseWeight, MAX_BASE_TOKENS, has_base_kernel};
pub use linear::{Product, Site, add_products, delta_linear, linear};
pub use matrix::{Matrix, Part, Terms};
pub use rows::{ElementType, Rows};
#[cfg(feature = "compress")]
pub(crate) use rows::{widen_bf16, widen_f16};
pub use sparse::SparseEntries;
pub use unpack::{add_row, dense_rows, merged, summed};

/// Defines a function that compiles one body for every instruction set and calls the one in use.
///
/// The body is portable code, which the compiler vectorises for each set of features. Bodies must keep their partial
/// sums in a fixed order, and the compiler fuses no multiply-adds; so every instruction set gives the same bits.
macro_rules! by_backend {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:path) => {
        $(#[$doc])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c,bmi2")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? { $body($($arg),*) }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi2")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? { $body($($arg),*) }
                match $crate::kernels::backend() {
                    // SAFETY: `backend` names only instruction sets that the processor has.
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
