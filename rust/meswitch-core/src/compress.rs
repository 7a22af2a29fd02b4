//! Base and fine-tune to a delta directory, a site at a time.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use half::f16;
use serde_json::Value;

use crate::checkpoint::{Checkpoint, View};
use crate::codec::{Pair, Quantized, Settings, quantize};
use crate::delta::{
    Assembly, BaseEntry, Delta, FileEntry, Kind, PartEntry, Progress, SiteEntry, SparseEntry, TensorSpec, Writer,
    checksum, hex, weigh,
};
use crate::error::{Error, Result};
use crate::fingerprint::sample;
use crate::layout::{row_bytes, tile};

/// What is to be done with one site.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The parameter's name in the fine-tune's checkpoint.
    pub name: String,
    /// Whether its delta's matrix is the parameter transposed.
    pub transposed: bool,
    /// How it is quantized; stored whole where none.
    pub quantize: Option<Settings>,
    /// E[x²] of its input channels, where known.
    pub moments: Option<Vec<f32>>,
}

/// What gives the values of a [`crate::codec::Factor`], by a site's name.
pub type FactorOf<'a> = dyn FnMut(&str) -> Result<Option<Vec<f32>>> + 'a;

/// The whole job.
pub struct Job<'a> {
    /// The base.
    pub base: &'a Checkpoint,
    /// The fine-tune.
    pub finetune: &'a Checkpoint,
    /// Every parameter of the fine-tune, in the order in which a model runs them.
    pub plans: &'a [Plan],
    /// Where the delta directory goes.
    pub out: &'a Path,
    /// Files to lie beside the tensors.
    pub files: &'a [PathBuf],
    /// What the manifest says of the settings.
    pub settings: Value,
    /// What the manifest calls the base.
    pub base_name: &'a str,
}

impl Job<'_> {
    /// Runs the job, or the rest of it after an interruption. `progress` is asked before every site and stops the job by
    /// returning false; `factor` gives the values of a [`crate::codec::Factor`] for a site that takes codes, or none. The
    /// job's other fields must decide what it gives.
    ///
    /// # Errors
    /// [`Error::Architecture`] before any work where the two do not match; [`Error::NonFinite`]: nothing is left behind
    /// then. [`Error::Io`], [`Error::Interrupted`]: the same job goes on after the last whole site. Those of `factor`.
    pub fn run(&self, progress: &mut dyn FnMut(Progress<'_>) -> bool, factor: &mut FactorOf<'_>) -> Result<Delta> {
        self.check()?;
        let sizes =
            self.plans.iter().map(|plan| Ok((plan.name.as_str(), self.finetune.view(&plan.name)?.len() as u64)));
        let sizes = sizes.collect::<Result<Vec<_>>>()?;
        self.assembly().write(Some(&self.key()?), &sizes, &self.specs()?, progress, &mut |at, writer| {
            self.site(&self.plans[at], writer, factor)
        })
    }

    /// The hash of everything that decides what the job writes; of the checkpoints, a sample and when they were written.
    fn key(&self) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        let mut add = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
        };
        add(env!("CARGO_PKG_VERSION").as_bytes());
        add(self.base_name.as_bytes());
        add(self.settings.to_string().as_bytes());
        for checkpoint in [self.base, self.finetune] {
            add(sample(checkpoint)?.as_bytes());
            for file in checkpoint.files() {
                let found = fs::metadata(file).map_err(Error::io(file))?;
                add(format!("{} {} {}", found.len(), found.mtime(), found.mtime_nsec()).as_bytes());
            }
        }
        for file in self.files {
            add(file.file_name().unwrap_or_default().as_encoded_bytes());
            add(&fs::read(file).map_err(Error::io(file))?);
        }
        for Plan { name, transposed, quantize, moments } in self.plans {
            add(format!("{name:?} {transposed} {quantize:?} {}", moments.is_some()).as_bytes());
            add(&moments.iter().flatten().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>());
        }
        Ok(hex(hasher.finalize().as_bytes()))
    }

    /// Everything that can be refused before any work.
    fn check(&self) -> Result<()> {
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
            let finetune = self.finetune.view(&plan.name)?;
            if !self.base.has(&plan.name) {
                return Err(Error::Architecture(format!(
                    "expected only parameters of the base, found {} in the fine-tune",
                    plan.name
                )));
            }
            let base = self.base.view(&plan.name)?;
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
            } else if base.shape != finetune.shape && !grown(&base, &finetune) {
                return Err(Error::Architecture(format!(
                    "expected {} in the base's shape {:?}, found {:?}",
                    plan.name, base.shape, finetune.shape
                )));
            }
        }
        Ok(())
    }

    /// What the job's files will weigh, but for a few bytes too much, if the sites named in `shared` are bit-equal and no
    /// others. A plan that skips unchanged rows may take less.
    ///
    /// # Errors
    /// Those of [`Job::run`] before any work.
    pub fn weigh(&self, shared: &HashSet<String>) -> Result<u64> {
        self.check()?;
        let mut sites = Vec::new();
        for plan in self.plans {
            sites.push(if shared.contains(&plan.name) {
                blank(plan, &self.finetune.view(&plan.name)?)
            } else {
                self.outline(plan)?
            });
        }
        let mut files = BTreeMap::new();
        for file in self.files {
            let bytes = fs::metadata(file).map_err(Error::io(file))?.len();
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            files.insert(name, FileEntry { bytes, checksum: checksum(&[]) });
        }
        let base = BaseEntry { fingerprint: "0".repeat(64), sample: "0".repeat(64), name: self.base_name.to_owned() };
        weigh(self.assembly().manifest(base, files, sites), &self.specs()?)
    }

    /// The entry that a site will have, but for what only its weights say.
    fn outline(&self, plan: &Plan) -> Result<SiteEntry> {
        let (base, finetune) = (self.base.view(&plan.name)?, self.finetune.view(&plan.name)?);
        let replaced = SiteEntry { kind: Kind::Replaced, transposed: false, ..blank(plan, &finetune) };
        let Some(settings) = &plan.quantize else { return Ok(replaced) };
        let whole = finetune.data.len();
        let entry = outline(plan, settings, &Pair::new(&plan.name, base, finetune, plan.transposed)?);
        let size: usize = entry.specs()?.iter().map(TensorSpec::size).sum();
        Ok(if size < whole { entry } else { replaced })
    }

    fn assembly(&self) -> Assembly<'_> {
        Assembly {
            base: self.base,
            out: self.out,
            files: self.files,
            settings: self.settings.clone(),
            base_name: self.base_name,
        }
    }

    /// The tensors that may come, for the header's room.
    fn specs(&self) -> Result<Vec<TensorSpec>> {
        let mut specs = Vec::new();
        for plan in self.plans {
            let view = self.finetune.view(&plan.name)?;
            let mut add = |role: &str, dtype: &str, dimensions: usize| {
                specs.push(TensorSpec {
                    role: format!("{}/{role}", plan.name),
                    dtype: dtype.to_owned(),
                    shape: vec![0; dimensions],
                });
            };
            add("whole", &view.dtype.to_string(), view.shape.len());
            if let Some(settings) = &plan.quantize {
                for at in 0..=settings.classes.len() {
                    add(&format!("codes.{at}"), "I32", 2);
                    add(&format!("scales.{at}"), "F16", 2);
                    add(&format!("rows.{at}"), "I32", 1);
                }
                if settings.sparse {
                    add("sparse_starts", "I32", 1);
                    add("sparse_gaps", "U8", 1);
                    add("sparse_values", "F8_E5M2", 1);
                }
                let (salient, low_rank) = (settings.salient > 0, settings.rank > 0);
                let wanted = [settings.column_scales, salient, salient, low_rank, low_rank, true];
                for (role, wanted) in ROLES.into_iter().zip(wanted) {
                    if wanted {
                        add(role, "F16", 2);
                    }
                }
            }
        }
        Ok(specs)
    }

    fn site(&self, plan: &Plan, writer: &mut Writer, factor: &mut FactorOf<'_>) -> Result<SiteEntry> {
        let (base, finetune) = (self.base.view(&plan.name)?, self.finetune.view(&plan.name)?);
        let mut entry = blank(plan, &finetune);
        if same(&base, &finetune) {
            base.finite(&plan.name)?;
            return Ok(entry);
        }
        if let Some(settings) = &plan.quantize {
            let pair = Pair::new(&plan.name, base, finetune.clone(), plan.transposed)?;
            let quantized = quantize(&pair, plan.moments.as_deref(), settings, &mut || factor(&plan.name))?;
            if let Some(tensors) = Tensors::of(&mut entry, &pair, quantized, finetune.data.len()) {
                writer.site(&mut entry, &tensors.slices())?;
                return Ok(entry);
            }
        }
        finetune.finite(&plan.name)?;
        entry.kind = Kind::Replaced;
        entry.transposed = false;
        writer.site(&mut entry, &[finetune.data])?;
        Ok(entry)
    }
}

/// A site's tensors beside those of its parts.
const ROLES: [&str; 6] = ["column_scales", "salient_index", "salient", "u", "v", "added"];

/// Whether the fine-tune's tensor only has more rows.
fn grown(base: &View<'_>, finetune: &View<'_>) -> bool {
    base.shape.len() == finetune.shape.len()
        && base.shape[1..] == finetune.shape[1..]
        && finetune.shape[0] > base.shape[0]
}

/// Whether two tensors are bit-equal.
#[must_use]
pub fn same(a: &View<'_>, b: &View<'_>) -> bool {
    use rayon::prelude::*;
    let content = || a.data.par_chunks(1 << 20).zip(b.data.par_chunks(1 << 20)).all(|(a, b)| a == b);
    a.dtype == b.dtype && a.shape == b.shape && content()
}

/// A parameter of which nothing is known but what it is.
fn blank(plan: &Plan, finetune: &View<'_>) -> SiteEntry {
    SiteEntry {
        name: plan.name.clone(),
        kind: Kind::Shared,
        shape: finetune.shape.clone(),
        dtype: finetune.dtype.to_string(),
        bytes: 0,
        bpw: 0.0,
        relative_error: 0.0,
        transposed: plan.transposed,
        exponent: 0,
        parts: Vec::new(),
        column_scales: false,
        salient: 0,
        rank: 0,
        sparse: None,
        added: 0,
        tensors: BTreeMap::new(),
    }
}

/// The part of no rows: a site is left as the base has it, but for what its other fields say.
const NOTHING: PartEntry = PartEntry { bits: 1, zero: 0.5, group_size: None, rows: Some(0), tiled: true };

/// The entry that a site quantized by these settings will have, but for what only its weights say.
fn outline(plan: &Plan, settings: &Settings, pair: &Pair<'_>) -> SiteEntry {
    let mut counts = BTreeMap::new();
    for bits in settings.widths(pair.rows).into_iter().flatten() {
        *counts.entry(bits).or_insert(0) += 1;
    }
    let part = |(bits, count): (u32, usize)| PartEntry {
        bits,
        zero: 127.5,
        group_size: settings.group_size,
        rows: (count < pair.rows).then_some(count),
        tiled: true,
    };
    let mut entry = SiteEntry {
        kind: Kind::Quantized,
        parts: counts.into_iter().map(part).collect(),
        column_scales: settings.column_scales && settings.widths(pair.rows).iter().any(Option::is_some),
        salient: settings.salient.min(pair.columns),
        rank: settings.rank.min(pair.rows).min(pair.columns),
        added: pair.added(),
        ..blank(plan, &pair.finetune)
    };
    settle(&mut entry);
    entry
}

/// Says what a site without codes is: its low-rank part, or what the base has.
fn settle(entry: &mut SiteEntry) {
    if entry.parts.is_empty() && entry.rank > 0 {
        entry.kind = Kind::LowRank;
    } else if entry.parts.is_empty() && entry.sparse.is_none() {
        entry.parts.push(NOTHING);
    }
}

/// A quantized site's tensors as the bytes that go to disk, in the order of its entry's specs.
struct Tensors<'a> {
    owned: Vec<Vec<u8>>,
    added: Option<&'a [u8]>,
}

impl<'a> Tensors<'a> {
    /// Fills the entry in. None where storing the parameter whole takes no more.
    fn of(entry: &mut SiteEntry, pair: &Pair<'a>, quantized: Option<Quantized>, whole: usize) -> Option<Self> {
        let added = pair.added();
        let mut draft = SiteEntry { kind: Kind::Quantized, added, ..entry.clone() };
        let mut owned = Vec::new();
        for part in quantized.iter().flat_map(|q| &q.parts) {
            let rows = part.rows.as_ref().map_or(pair.rows, Vec::len);
            debug_assert_eq!(part.codes.len(), rows * row_bytes(part.bits, pair.columns));
            draft.parts.push(PartEntry {
                bits: part.bits,
                zero: part.zero,
                group_size: part.group_size,
                rows: part.rows.as_ref().map(Vec::len),
                tiled: true,
            });
        }
        if let Some(mut quantized) = quantized {
            quantized.column_scales.take_if(|_| quantized.parts.is_empty());
            draft.exponent = quantized.exponent;
            draft.relative_error = quantized.relative_error;
            draft.column_scales = quantized.column_scales.is_some();
            draft.salient = quantized.salient_index.len();
            draft.rank = quantized.low_rank.as_ref().map_or(0, |(_, v)| v.len() / pair.columns.max(1));
            for part in quantized.parts {
                owned.push(tile(&part.codes, row_bytes(part.bits, pair.columns)));
                owned.push(halves(&part.scales));
                owned.extend(part.rows.as_deref().map(indices));
            }
            owned.extend(quantized.column_scales.as_deref().map(halves));
            if draft.salient > 0 {
                owned.push(indices(&quantized.salient_index));
                owned.push(halves(&quantized.salient));
            }
            if let Some((u, v)) = quantized.low_rank {
                owned.push(halves(&u));
                owned.push(halves(&v));
            }
            if let Some(sparse) = quantized.sparse {
                draft.sparse = Some(SparseEntry { entries: sparse.gaps.len(), changed: sparse.changed });
                owned.extend([indices(&sparse.starts), sparse.gaps, sparse.values]);
            }
        }
        settle(&mut draft);
        if draft.parts == [NOTHING] {
            owned.splice(0..0, [Vec::new(), Vec::new(), Vec::new()]);
        }
        let whole_rows = pair.rows + added;
        let tensors = Self { owned, added: (added > 0).then(|| pair.finetune.row_slice(pair.rows, whole_rows)) };
        if tensors.slices().iter().map(|bytes| bytes.len()).sum::<usize>() >= whole {
            return None;
        }
        *entry = draft;
        Some(tensors)
    }

    fn slices(&self) -> Vec<&[u8]> {
        self.owned.iter().map(Vec::as_slice).chain(self.added).collect()
    }
}

fn halves(values: &[f16]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn indices(values: &[u32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
