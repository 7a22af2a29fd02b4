//! What is in memory: units (a delta directory's tensors, a packed base, one MoE expert), loaded under a byte budget.

pub mod policy;
