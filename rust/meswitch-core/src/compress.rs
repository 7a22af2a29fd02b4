//! Compressing a fine-tune into a delta directory, one site at a time.

mod site;

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::Dtype;
use serde_json::Value;

use self::site::{quantized_entry, quantized_site, shared_entry};
use crate::checkpoint::{Checkpoint, View};
use crate::codec::{Pair, Settings, quantize};
use crate::delta::{
    Assembly, BaseEntry, Delta, FileEntry, Kind, Owner, Progress, Role, SiteEntry, SiteKind, TensorSpec, Writer,
    check_copied_files, check_site_name, checksum, estimated_bytes, hex,
};
use crate::error::{Error, Result};

/// How one parameter is compressed.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The parameter's name in the fine-tune's checkpoint.
    pub name: String,
    /// Whether its delta's matrix is the parameter transposed.
    pub transposed: bool,
    /// The part of the model that it belongs to, where there is one.
    pub owner: Option<Owner>,
    /// How it is quantized; `None` to store it whole where it differs from the base's.
    pub quantize: Option<Settings>,
    /// E\[x²\] of its input channels, where known.
    pub moments: Option<Vec<f32>>,
}

/// Returns the factor for error compensation of a site, given its name: the upper triangular U `[columns, columns]`
/// with H⁻¹ = UᵀU, where H = E\[x xᵀ\] of the input channels, row by row. `None` for no compensation.
pub type FactorFn<'a> = dyn FnMut(&str) -> Result<Option<Vec<f32>>> + 'a;

/// A fine-tune to be compressed into a delta directory, or a whole model to be quantized.
pub struct Job<'a> {
    /// What is written.
    pub kind: Kind,
    /// The base. Where a base is written, zeros ([`Checkpoint::zeros`]).
    pub base: &'a Checkpoint,
    /// The fine-tune, or the model.
    pub finetune: &'a Checkpoint,
    /// Every parameter of the fine-tune, in execution order.
    pub plans: &'a [Plan],
    /// The path of the delta directory.
    pub out: &'a Path,
    /// Files to copy into it.
    pub files: &'a [PathBuf],
    /// The manifest's settings.
    pub settings: Value,
    /// The base's name in the manifest.
    pub base_name: &'a str,
}

impl Job<'_> {
    /// Runs the job, or the rest of it after an interruption, on rayon's pool. A directory at `out` is replaced when
    /// the new one is complete.
    ///
    /// `progress` is called before every site and stops the job by returning false. `factor` is called for each site
    /// that gets codes; it must depend on the job's own fields only, since a resumed job does not call it for finished
    /// sites. Both run on the calling thread.
    ///
    /// # Errors
    /// [`Error::Architecture`] or [`Error::Argument`] before any work where checkpoints and plans do not match;
    /// [`Error::NonFinite`]; those of `factor`. These leave nothing behind. After [`Error::Io`] and
    /// [`Error::Interrupted`], the same job continues after the last finished site.
    pub fn run(&self, progress: &mut dyn FnMut(Progress<'_>) -> bool, factor: &mut FactorFn<'_>) -> Result<Delta> {
        self.check()?;
        let sizes =
            self.plans.iter().map(|plan| Ok((plan.name.as_str(), self.finetune.outline(&plan.name)?.len() as u64)));
        let sizes = sizes.collect::<Result<Vec<_>>>()?;
        self.assembly().write(Some(&self.key()?), &sizes, &self.possible_tensors()?, progress, &mut |index, writer| {
            self.write_site(&self.plans[index], writer, factor)
        })
    }

    /// The hash of everything that decides what the job writes. Of the checkpoints it includes a sample and the files'
    /// sizes and times.
    fn key(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        let mut add = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        };
        add(env!("CARGO_PKG_VERSION").as_bytes());
        add(self.base_name.as_bytes());
        add(self.kind.to_string().as_bytes());
        add(self.settings.to_string().as_bytes());
        for checkpoint in [self.base, self.finetune] {
            add(checkpoint.sample()?.as_bytes());
            for file in checkpoint.files() {
                let metadata = fs::metadata(file).map_err(Error::io(file))?;
                add(format!("{} {} {}", metadata.len(), metadata.mtime(), metadata.mtime_nsec()).as_bytes());
            }
        }
        for file in self.files {
            add(file.file_name().unwrap_or_default().as_encoded_bytes());
            add(&fs::read(file).map_err(Error::io(file))?);
        }
        for Plan { name, transposed, owner, quantize, moments } in self.plans {
            add(format!("{name:?} {transposed} {owner:?} {quantize:?} {}", moments.is_some()).as_bytes());
            add(&moments.iter().flatten().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>());
        }
        Ok(hex(hasher.finalize().as_bytes()))
    }

    /// Checks everything that can be checked before any work.
    fn check(&self) -> Result<()> {
        check_copied_files(self.files)?;
        let planned: HashSet<&str> = self.plans.iter().map(|plan| plan.name.as_str()).collect();
        if let Some(name) = self.finetune.names().iter().find(|name| !planned.contains(name.as_str())) {
            return Err(Error::Argument(format!("expected a plan for every parameter, found none for {name}")));
        }
        if let Some(name) = self.base.names().iter().find(|name| !self.finetune.has(name)) {
            return Err(Error::Architecture(format!(
                "expected the base's parameter {name} in the fine-tune, found none"
            )));
        }
        for plan in self.plans {
            check_site_name(&plan.name)?;
            let finetune = self.finetune.outline(&plan.name)?;
            if !self.base.has(&plan.name) {
                return Err(Error::Architecture(format!(
                    "expected only parameters of the base, found {} in the fine-tune",
                    plan.name
                )));
            }
            let base = self.base.outline(&plan.name)?;
            let columns = base.shape.last().copied().unwrap_or(1);
            if let Some(moments) = &plan.moments {
                let wanted = if plan.transposed { base.shape.first().copied().unwrap_or(1) } else { columns };
                if moments.len() != wanted || moments.iter().any(|value| !value.is_finite() || *value < 0.0) {
                    return Err(Error::Argument(format!(
                        "expected {wanted} finite second moments for {}, found {}",
                        plan.name,
                        moments.len()
                    )));
                }
            }
            if plan.quantize.is_some() {
                Pair::new(&plan.name, base, finetune, plan.transposed)?;
            } else if base.shape != finetune.shape && !has_more_rows(&base, &finetune) {
                return Err(Error::Architecture(format!(
                    "expected {} in the base's shape {:?}, found {:?}",
                    plan.name, base.shape, finetune.shape
                )));
            }
        }
        Ok(())
    }

    /// An upper bound of the size of manifest and tensors, if the sites named in `shared` are the base's
    /// and no others are. It exceeds the size by a few bytes, and by what skipping unchanged rows saves.
    ///
    /// # Errors
    /// Those of [`Job::run`] before any work.
    pub fn estimated_bytes(&self, shared: &HashSet<String>) -> Result<u64> {
        self.check()?;
        let mut sites = Vec::new();
        for plan in self.plans {
            sites.push(if shared.contains(&plan.name) {
                shared_entry(plan, &self.finetune.outline(&plan.name)?)
            } else {
                self.planned_entry(plan)?
            });
        }
        let mut files = BTreeMap::new();
        for file in self.files {
            let bytes = fs::metadata(file).map_err(Error::io(file))?.len();
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            files.insert(name, FileEntry { bytes, checksum: checksum(&[]) });
        }
        let base = BaseEntry { fingerprint: "0".repeat(64), sample: "0".repeat(64), name: self.base_name.to_owned() };
        estimated_bytes(self.assembly().manifest(base, files, sites), &self.possible_tensors()?)
    }

    /// The entry that a changed site gets, without what depends on its weights.
    fn planned_entry(&self, plan: &Plan) -> Result<SiteEntry> {
        let (base, finetune) = (self.base.outline(&plan.name)?, self.finetune.outline(&plan.name)?);
        let replaced = SiteEntry { kind: SiteKind::Replaced, transposed: false, ..shared_entry(plan, &finetune) };
        let Some(settings) = &plan.quantize else { return Ok(replaced) };
        let whole = finetune.nbytes();
        let quantized = quantized_entry(plan, settings, &Pair::new(&plan.name, base, finetune, plan.transposed)?);
        let size: usize = quantized.tensor_specs()?.iter().map(TensorSpec::size).sum();
        Ok(if size < whole { quantized } else { replaced })
    }

    fn assembly(&self) -> Assembly<'_> {
        Assembly {
            kind: self.kind,
            base: if self.kind == Kind::Base { self.finetune } else { self.base },
            out: self.out,
            files: self.files,
            settings: self.settings.clone(),
            base_name: self.base_name,
        }
    }

    /// All tensors that may be written, by full name, with their numbers of dimensions. They decide how many bytes are
    /// reserved for the header.
    fn possible_tensors(&self) -> Result<Vec<TensorSpec>> {
        let mut specs = Vec::new();
        for plan in self.plans {
            let view = self.finetune.outline(&plan.name)?;
            // The size of the reservation is part of the file, so it must not depend on the dtype of added rows.
            let mut add = |role: Role, dimensions: usize| {
                let dtype = if role == Role::Added { Dtype::F16 } else { view.dtype };
                specs.extend(role.spec(dtype, &vec![0; dimensions]).map(|spec| spec.of_site(&plan.name)));
            };
            add(Role::Whole, view.shape.len());
            if let Some(settings) = &plan.quantize {
                for part in 0..=settings.classes.len() {
                    add(Role::Codes(part), 2);
                    add(Role::Scales(part), 2);
                    add(Role::Rows(part), 1);
                }
                if settings.sparse {
                    add(Role::SparseStarts, 1);
                    add(Role::SparseGaps, 1);
                    add(Role::SparseValues, 1);
                }
                let (salient, low_rank) = (settings.salient > 0, settings.rank > 0);
                let others = [
                    (settings.column_scales, Role::ColumnScales),
                    (salient, Role::SalientIndex),
                    (salient, Role::Salient),
                    (low_rank, Role::U),
                    (low_rank, Role::V),
                    (true, Role::Added),
                ];
                others.into_iter().filter(|(present, _)| *present).for_each(|(_, role)| add(role, 2));
            }
        }
        Ok(specs)
    }

    /// Writes one site and returns its entry.
    fn write_site(&self, plan: &Plan, writer: &mut Writer, factor: &mut FactorFn<'_>) -> Result<SiteEntry> {
        let (base, finetune) = (self.base.view(&plan.name)?, self.finetune.view(&plan.name)?);
        let shared = shared_entry(plan, &finetune);
        if is_shared(&base, &finetune) {
            finetune.check_finite(&plan.name)?;
            return Ok(shared);
        }
        if let Some(settings) = &plan.quantize {
            let pair = Pair::new(&plan.name, base, finetune.clone(), plan.transposed)?;
            let quantized = quantize(&pair, plan.moments.as_deref(), settings, &mut || factor(&plan.name))?;
            let (mut entry, tensors) = quantized_site(&shared, &pair, quantized);
            if tensors.size() < finetune.data.len() {
                writer.write_site(&mut entry, &tensors.slices())?;
                return Ok(entry);
            }
        }
        finetune.check_finite(&plan.name)?;
        let mut entry = SiteEntry { kind: SiteKind::Replaced, transposed: false, ..shared };
        writer.write_site(&mut entry, &[&finetune.data])?;
        Ok(entry)
    }
}

/// Whether the fine-tune's tensor only has more rows.
fn has_more_rows(base: &View<'_>, finetune: &View<'_>) -> bool {
    base.shape.len() == finetune.shape.len()
        && base.shape[1..] == finetune.shape[1..]
        && finetune.shape[0] > base.shape[0]
}

/// Whether a fine-tune's tensor is the base's, as it is or cast to the fine-tune's dtype. Runs on rayon's pool.
#[must_use]
pub fn is_shared(base: &View<'_>, finetune: &View<'_>) -> bool {
    use rayon::prelude::*;
    const CHUNK: usize = 1 << 16;
    if base.shape != finetune.shape {
        return false;
    }
    if base.dtype == finetune.dtype {
        return base.data.par_chunks(CHUNK).zip(finetune.data.par_chunks(CHUNK)).all(|(a, b)| a == b);
    }
    let (size, chunks) = (finetune.dtype.bitsize() / 8, finetune.len().div_ceil(CHUNK));
    base.is_float()
        && finetune.is_float()
        && (0..chunks).into_par_iter().all(|chunk| {
            let (start, end) = (chunk * CHUNK, ((chunk + 1) * CHUNK).min(finetune.len()));
            let mut values = vec![0f32; end - start];
            base.read(start, &mut values);
            is_cast(&values, finetune.dtype, &finetune.data[start * size..end * size])
        })
}

/// Whether little-endian floats of this dtype are these values, rounded to the nearest.
fn is_cast(values: &[f32], dtype: Dtype, bytes: &[u8]) -> bool {
    let pairs = || values.iter().zip(bytes.as_chunks::<2>().0);
    match dtype {
        Dtype::BF16 => pairs().all(|(value, stored)| bf16::from_f32(*value).to_le_bytes() == *stored),
        Dtype::F16 => pairs().all(|(value, stored)| f16::from_f32(*value).to_le_bytes() == *stored),
        _ => values.iter().zip(bytes.as_chunks::<4>().0).all(|(value, stored)| value.to_le_bytes() == *stored),
    }
}
