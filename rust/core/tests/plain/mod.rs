//! What a store should keep for one parameter of one dimension, row by row, without the store's ways
//! of keeping it: every row has its own steps, bounds and flag.

use paramstate::{Adam, Bounds, NormLimit, SecondMoment};

use crate::reference::{self, Point};

/// One row: one element.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Row {
    pub value: f32,
    pub exp_avg: f32,
    pub exp_avg_sq: f32,
    pub max: f32,
    pub taken: u64,
    pub frozen: bool,
    /// Bounds of its own.
    pub limits: [Option<f32>; 2],
}

impl Row {
    pub fn new(value: f32) -> Self {
        let (exp_avg, exp_avg_sq, max) = (0.0, 0.0, 0.0);
        Self { value, exp_avg, exp_avg_sq, max, taken: 0, frozen: false, limits: [None, None] }
    }

    pub fn with_state_of(self, other: Row) -> Self {
        let Row { exp_avg, exp_avg_sq, max, taken, .. } = other;
        Self { exp_avg, exp_avg_sq, max, taken, ..self }
    }

    fn bounds(&self, all: Bounds) -> Bounds {
        let [min, max] = self.limits;
        Bounds { min: min.map(f64::from).or(all.min), max: max.map(f64::from).or(all.max) }
    }
}

/// One parameter of the model.
#[derive(Clone, Debug, Default)]
pub struct Plain {
    pub names: Vec<String>,
    pub rows: Vec<Row>,
    pub bounds: Bounds,
    pub norm: Option<NormLimit>,
    /// On which sides rows have bounds of their own, also where there is no row.
    pub limited: [bool; 2],
    pub frozen: bool,
    pub has_moments: bool,
    pub has_max: bool,
}

impl Plain {
    pub fn new(names: Vec<String>, values: &[f32]) -> Self {
        Self { names, rows: values.iter().copied().map(Row::new).collect(), ..Self::default() }
    }

    pub fn all(&self, of: impl Fn(&Row) -> f32) -> Vec<f32> {
        self.rows.iter().map(of).collect()
    }

    /// The rows that a step updates.
    pub fn takes_part(&self, named: Option<&[bool]>) -> Vec<bool> {
        let named = |row: usize| named.is_none_or(|named| named[row]);
        self.rows.iter().enumerate().map(|(at, row)| !row.frozen && named(at)).collect()
    }

    pub fn step(&mut self, grad: &[f32], adam: &Adam, coefficient: f64, named: Option<&[bool]>) {
        let takes_part = self.takes_part(named);
        self.has_moments = true;
        let maximal = adam.second_moment == SecondMoment::Maximum;
        self.has_max |= maximal;
        for ((row, grad), _) in
            self.rows.iter_mut().zip(grad).zip(&takes_part).filter(|(_, on)| **on)
        {
            row.taken += 1;
            let point = Point {
                value: row.value.into(),
                grad: (*grad).into(),
                exp_avg: row.exp_avg.into(),
                exp_avg_sq: row.exp_avg_sq.into(),
                max_exp_avg_sq: maximal.then(|| row.max.into()),
            };
            let bounds = row.bounds(self.bounds);
            let new = reference::step(point, adam, row.taken as f64, coefficient, bounds, false);
            row.value = new.value as f32;
            row.exp_avg = new.exp_avg as f32;
            row.exp_avg_sq = new.exp_avg_sq as f32;
            row.max = new.max_exp_avg_sq.map_or(row.max, |max| max as f32);
        }
        self.hold_norm(&takes_part);
    }

    /// What is declared, held in these rows.
    pub fn hold(&mut self, reached: &[bool]) {
        for (row, _) in self.rows.iter_mut().zip(reached).filter(|(_, reached)| **reached) {
            row.value = clamp(row.value, row.bounds(self.bounds));
        }
        self.hold_norm(reached);
    }

    fn hold_norm(&mut self, reached: &[bool]) {
        let Some(limit) = self.norm else { return };
        let add = |sum: f64, row: &Row| f64::from(row.value).mul_add(row.value.into(), sum);
        let norm = self.rows.iter().fold(0.0, add).sqrt();
        let (limit, beyond) = match limit {
            NormLimit::AtMost(limit) => (limit, norm > limit),
            NormLimit::Exactly(limit) => (limit, norm > 0.0),
        };
        if !beyond || norm == f64::INFINITY {
            return;
        }
        for (row, _) in self.rows.iter_mut().zip(reached).filter(|(_, reached)| **reached) {
            row.value = (f64::from(row.value) * (limit / norm)) as f32;
        }
    }

    /// The rows that there are to be, each by the row of its value and the row of its state; `None`
    /// where a new row has no bounds.
    pub fn moved(&self, rows: &[(Option<usize>, Option<usize>)], filler: f32) -> Option<Self> {
        let row = |&(value, state): &(Option<usize>, Option<usize>)| {
            let known = value.or(state).map(|row| self.rows[row].limits);
            if known.is_none() && self.limited != [false; 2] {
                return None;
            }
            let kept = value.map(|row| self.rows[row]);
            let new = Row::new(kept.map_or(filler, |row| row.value));
            let new = state.map_or(new, |state| new.with_state_of(self.rows[state]));
            let (frozen, limits) = (kept.is_some_and(|row| row.frozen), known.unwrap_or_default());
            Some(Row { frozen, limits, ..new })
        };
        let mut new = self.clone();
        new.rows = rows.iter().map(row).collect::<Option<_>>()?;
        // What is declared holds at once for values that moved.
        if !rows.iter().map(|(value, _)| *value).eq((0..self.rows.len()).map(Some)) && !self.frozen
        {
            new.hold(&new.takes_part(None));
        }
        Some(new)
    }
}

pub fn clamp(x: f32, bounds: Bounds) -> f32 {
    if x.is_nan() {
        return x;
    }
    let x = bounds.min.map_or(x, |min| if x < min as f32 { min as f32 } else { x });
    bounds.max.map_or(x, |max| if x > max as f32 { max as f32 } else { x })
}
