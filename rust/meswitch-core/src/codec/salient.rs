//! Salient channels: the input channels whose quantization costs the most (ME-Switch, arXiv 2406.09041, section 4.1).

/// The at most `count` channels with the largest `importance · error` above 0, rising.
pub(super) fn choose(error: &[f64], importance: &[f32], count: usize) -> Vec<u32> {
    let cost = |i: &u32| error[*i as usize] * f64::from(importance[*i as usize]);
    let mut channels: Vec<u32> = (0..error.len() as u32).filter(|i| cost(i) > 0.0).collect();
    channels.sort_by(|a, b| cost(b).total_cmp(&cost(a)).then(a.cmp(b)));
    channels.truncate(count);
    channels.sort_unstable();
    channels
}

#[cfg(test)]
mod tests {
    use super::choose;

    #[test]
    fn the_costliest_channels_are_chosen() {
        assert_eq!(choose(&[1.0, 9.0, 0.0, 4.0], &[10.0, 1.0, 5.0, 1.0], 2), [0, 1]);
        assert_eq!(choose(&[1.0, 9.0, 0.0, 4.0], &[1.0; 4], 9), [0, 1, 3]);
        assert!(choose(&[1.0], &[1.0], 0).is_empty());
    }
}
