//! The store against a plain map, through random lists of actions.

mod plain;
mod reference;

use std::collections::BTreeMap;

use paramstate::{
    Adam, Bounds, Error, Gradient, NewValue, NormLimit, ParamId, Reach, RowChange, StepOptions,
    Store, clip_coefficient,
};
use plain::{Plain, Row, clamp};
use proptest::prelude::*;
use reference::{any_adam, any_bounds, numbers};

#[derive(Clone, Debug)]
enum Action {
    Register { name: Option<usize>, id: Option<u64>, len: usize, seed: u64 },
    Alias { which: usize, name: usize },
    Rename { old: usize, new: usize },
    Remove { which: usize },
    SetBounds { which: usize, bounds: Bounds },
    Clip { which: usize, bounds: Bounds },
    ClipWith { which: usize, factor: f32 },
    Reset { which: usize },
    SetLimits { which: usize, sides: [bool; 2], seed: u64 },
    ClipEach { which: usize, sides: [bool; 2], seed: u64 },
    SetNorm { which: usize, limit: Option<NormLimit> },
    Hold { which: usize, reach: Reach },
    Freeze { which: usize, frozen: bool },
    FreezeRows { which: usize, rows: Vec<usize> },
    UnfreezeRows { which: usize, rows: Option<Vec<usize>> },
    Rows { which: usize, change: Change, filler: f32 },
    Step { seed: u64, adam: Box<Adam>, max_grad_norm: Option<f64> },
}

/// A change of rows; indices beyond the rows are taken modulo their number, but for one in eight.
#[derive(Clone, Debug)]
enum Change {
    Gather(Vec<usize>),
    Reset(Vec<usize>),
    Append(usize),
    Pad(usize, usize),
    Resize(usize),
    From(Vec<(Option<usize>, Option<usize>)>),
}

fn any_change() -> impl Strategy<Value = Change> {
    let rows = || prop::collection::vec(0usize..80, 0..6);
    let source = || prop::option::weighted(0.8, 0usize..40);
    prop_oneof![
        2 => rows().prop_map(Change::Gather),
        2 => rows().prop_map(Change::Reset),
        1 => (0usize..4).prop_map(Change::Append),
        1 => (0usize..3, 0usize..3).prop_map(|(before, after)| Change::Pad(before, after)),
        1 => (0usize..40).prop_map(Change::Resize),
        1 => prop::collection::vec((source(), source()), 0..8).prop_map(Change::From),
    ]
}

fn any_limit() -> impl Strategy<Value = NormLimit> {
    let limit = || prop::sample::select(vec![0.0, 0.3, 1.0]);
    prop_oneof![limit().prop_map(NormLimit::AtMost), limit().prop_map(NormLimit::Exactly)]
}

fn any_action() -> impl Strategy<Value = Action> {
    prop_oneof![3 => any_plain_action(), 2 => any_row_action()]
}

fn any_row_action() -> impl Strategy<Value = Action> {
    let which = || 0usize..8;
    let rows = || prop::collection::vec(0usize..80, 0..6);
    let sides = || prop::array::uniform2(any::<bool>());
    prop_oneof![
        1 => (which(), sides(), any::<u64>())
            .prop_map(|(which, sides, seed)| Action::SetLimits { which, sides, seed }),
        1 => (which(), sides(), any::<u64>())
            .prop_map(|(which, sides, seed)| Action::ClipEach { which, sides, seed }),
        1 => (which(), prop::option::weighted(0.8, any_limit()))
            .prop_map(|(which, limit)| Action::SetNorm { which, limit }),
        1 => (which(), prop::sample::select(vec![Reach::All, Reach::Unfrozen]))
            .prop_map(|(which, reach)| Action::Hold { which, reach }),
        1 => (which(), any::<bool>()).prop_map(|(which, frozen)| Action::Freeze { which, frozen }),
        3 => (which(), rows()).prop_map(|(which, rows)| Action::FreezeRows { which, rows }),
        1 => (which(), prop::option::of(rows()))
            .prop_map(|(which, rows)| Action::UnfreezeRows { which, rows }),
        6 => (which(), any_change(), -1.0f32..1.0)
            .prop_map(|(which, change, filler)| Action::Rows { which, change, filler }),
    ]
}

fn any_plain_action() -> impl Strategy<Value = Action> {
    let which = || 0usize..8;
    let name = || 0usize..6;
    let id = prop::option::weighted(0.3, 1u64..5);
    prop_oneof![
        4 => (prop::option::weighted(0.8, name()), id, 0usize..40, any::<u64>())
            .prop_map(|(name, id, len, seed)| Action::Register { name, id, len, seed }),
        1 => (which(), name()).prop_map(|(which, name)| Action::Alias { which, name }),
        2 => (name(), name()).prop_map(|(old, new)| Action::Rename { old, new }),
        1 => which().prop_map(|which| Action::Remove { which }),
        1 => (which(), any_bounds()).prop_map(|(which, bounds)| Action::SetBounds { which, bounds }),
        1 => (which(), any_bounds()).prop_map(|(which, bounds)| Action::Clip { which, bounds }),
        1 => (which(), -1.0..1.0f32).prop_map(|(which, factor)| Action::ClipWith { which, factor }),
        1 => which().prop_map(|which| Action::Reset { which }),
        5 => (any::<u64>(), any_adam(), prop::option::of(0.1..2.0f64)).prop_map(
            |(seed, adam, max_grad_norm)| Action::Step { seed, adam: Box::new(adam), max_grad_norm }
        ),
    ]
}

fn name_of(index: usize) -> String {
    format!("layers.{index}.weight")
}

fn finite(seed: u64, len: usize) -> Vec<f32> {
    numbers(seed, len)
        .map(|x| if x.is_finite() { x.clamp(-1.0, 1.0) as f32 } else { 0.5 })
        .collect()
}

/// Bounds of each element on these sides, the upper ones never below the lower.
fn limits(seed: u64, len: usize, sides: [bool; 2]) -> [Option<Vec<f32>>; 2] {
    let low = finite(seed, len);
    let high = low.iter().zip(finite(!seed, len)).map(|(low, x)| low + x.abs() / 2.0).collect();
    [sides[0].then_some(low), sides[1].then_some(high)]
}

/// The store and the map, changed together.
#[derive(Default)]
struct Pair {
    store: Store,
    model: BTreeMap<ParamId, Plain>,
    /// Registration order.
    order: Vec<ParamId>,
}

impl Pair {
    fn by_name(&self, name: &str) -> Option<ParamId> {
        let named = |plain: &Plain| plain.names.iter().any(|held| held == name);
        self.model.iter().find(|(_, plain)| named(plain)).map(|(id, _)| *id)
    }

    fn pick(&self, which: usize) -> Option<ParamId> {
        (!self.order.is_empty()).then(|| self.order[which % self.order.len()])
    }

    fn apply(&mut self, action: Action) {
        match action {
            Action::Register { name, id, len, seed } => self.register(name, id, len, seed),
            Action::Step { seed, adam, max_grad_norm } => self.step(seed, &adam, max_grad_norm),
            Action::Rename { old, new } => self.rename(&name_of(old), &name_of(new)),
            Action::Alias { which, .. }
            | Action::Remove { which }
            | Action::SetBounds { which, .. }
            | Action::Clip { which, .. }
            | Action::ClipWith { which, .. }
            | Action::Reset { which } => {
                if let Some(id) = self.pick(which) {
                    self.change(id, action);
                }
            }
            Action::SetLimits { which, .. }
            | Action::ClipEach { which, .. }
            | Action::SetNorm { which, .. }
            | Action::Hold { which, .. }
            | Action::Freeze { which, .. } => {
                if let Some(id) = self.pick(which) {
                    self.declare(id, action);
                }
            }
            Action::FreezeRows { which, .. } | Action::UnfreezeRows { which, .. } => {
                if let Some(id) = self.pick(which) {
                    self.rest(id, action);
                }
            }
            Action::Rows { which, change, filler } => {
                if let Some(id) = self.pick(which) {
                    self.move_rows(id, &change, filler);
                }
            }
        }
    }

    fn register(&mut self, name: Option<usize>, id: Option<u64>, len: usize, seed: u64) {
        let (name, id) = (name.map(name_of), id.map(|id| ParamId::new(id).unwrap()));
        let value = finite(seed, len);
        let taken = name.as_ref().and_then(|name| self.by_name(name));
        let result = self.store.register_values(name.as_deref(), id, &[len], &value);
        if taken.is_some() {
            assert!(
                matches!(result, Err(Error::NameTaken { owner, .. }) if Some(owner.id) == taken)
            );
        } else if let Some(id) = id.filter(|id| self.model.contains_key(id)) {
            assert!(matches!(result, Err(Error::IdTaken { owner }) if owner.id == id));
        } else {
            let got = result.unwrap();
            assert!(id.is_none_or(|id| id == got) && !self.model.contains_key(&got));
            let names = name.into_iter().collect();
            self.model.insert(got, Plain::new(names, &value));
            self.order.push(got);
        }
    }

    fn rename(&mut self, old: &str, new: &str) {
        let (id, taken) = (self.by_name(old), self.by_name(new));
        let result = self.store.rename(old, new);
        match (id, taken) {
            (None, _) => assert!(matches!(result, Err(Error::UnknownName { name }) if name == old)),
            (Some(_), Some(_)) if old != new => {
                assert!(matches!(result, Err(Error::NameTaken { name, .. }) if name == new));
            }
            (Some(id), _) => {
                result.unwrap();
                let names = &mut self.model.get_mut(&id).unwrap().names;
                *names.iter_mut().find(|name| *name == old).unwrap() = new.to_owned();
            }
        }
    }

    fn change(&mut self, id: ParamId, action: Action) {
        let owner = if let Action::Alias { name, .. } = action {
            self.by_name(&name_of(name))
        } else {
            None
        };
        let plain = self.model.get_mut(&id).unwrap();
        match action {
            Action::Alias { name, .. } => match (self.store.alias(id, &name_of(name)), owner) {
                (Ok(()), None) => plain.names.push(name_of(name)),
                (Err(Error::NameTaken { owner: held, .. }), Some(owner)) if held.id == owner => {}
                (result, _) => panic!("{result:?}"),
            },
            Action::Remove { .. } => {
                assert_eq!(self.store.remove(id).unwrap().names(), plain.names);
                self.model.remove(&id);
                self.order.retain(|held| *held != id);
            }
            Action::SetBounds { bounds, .. } => {
                self.store.set_bounds(id, bounds).unwrap();
                plain.bounds = bounds;
                plain.norm = plain.norm.filter(|_| bounds.is_none());
            }
            Action::Clip { bounds, .. } => {
                self.store.clip(id, bounds).unwrap();
                plain.rows.iter_mut().for_each(|row| row.value = clamp(row.value, bounds));
            }
            Action::ClipWith { factor, .. } => {
                let scale = |values: &mut [f32]| values.iter_mut().for_each(|x| *x *= factor);
                self.store.clip_with(id, scale).unwrap();
                plain.rows.iter_mut().for_each(|row| row.value *= factor);
            }
            Action::Reset { .. } => {
                self.store.reset(id).unwrap();
                (plain.has_moments, plain.has_max) = (false, false);
                for row in &mut plain.rows {
                    *row = row.with_state_of(Row::new(0.0));
                }
            }
            _ => unreachable!(),
        }
    }

    fn declare(&mut self, id: ParamId, action: Action) {
        let plain = self.model.get_mut(&id).unwrap();
        let len = plain.rows.len();
        match action {
            Action::SetLimits { sides, seed, .. } => {
                let limits = limits(seed, len, sides);
                let [min, max] = limits.each_ref().map(Option::as_deref);
                self.store.set_element_bounds(id, min, max).unwrap();
                plain.norm = plain.norm.filter(|_| sides == [false; 2]);
                plain.limited = sides;
                for (i, row) in plain.rows.iter_mut().enumerate() {
                    row.limits =
                        limits.each_ref().map(|limit| limit.as_ref().map(|limit| limit[i]));
                }
            }
            Action::ClipEach { sides, seed, .. } => {
                let limits = limits(seed, len, sides);
                let [min, max] = limits.each_ref().map(Option::as_deref);
                self.store.clip_each(id, min, max).unwrap();
                for (i, row) in plain.rows.iter_mut().enumerate() {
                    let [min, max] =
                        limits.each_ref().map(|limit| limit.as_ref().map(|x| x[i].into()));
                    row.value = clamp(row.value, Bounds { min, max });
                }
            }
            Action::SetNorm { limit, .. } => {
                self.store.set_norm(id, limit, &[]).unwrap();
                plain.norm = limit;
                if limit.is_some() {
                    (plain.bounds, plain.limited) = (Bounds::default(), [false; 2]);
                    plain.rows.iter_mut().for_each(|row| row.limits = [None, None]);
                }
            }
            Action::Hold { reach, .. } => {
                self.store.hold(id, reach).unwrap();
                match reach {
                    Reach::All => plain.hold(&vec![true; len]),
                    Reach::Unfrozen if plain.frozen => {}
                    Reach::Unfrozen => plain.hold(&plain.takes_part(None)),
                }
            }
            Action::Freeze { frozen, .. } => {
                if frozen { self.store.freeze(id) } else { self.store.unfreeze(id) }.unwrap();
                plain.frozen = frozen;
            }
            _ => unreachable!(),
        }
    }

    /// Rows are frozen, or go on; refused where one is not there.
    fn rest(&mut self, id: ParamId, action: Action) {
        let plain = self.model.get_mut(&id).unwrap();
        let count = plain.rows.len();
        let (result, rows, frozen) = match action {
            Action::FreezeRows { rows, .. } => {
                let rows = fitted(&rows, count);
                (self.store.freeze_rows(&[id], 0, &rows), Some(rows), true)
            }
            Action::UnfreezeRows { rows, .. } => {
                let rows = rows.map(|rows| fitted(&rows, count));
                (self.store.unfreeze_rows(&[id], rows.as_deref()), rows, false)
            }
            _ => unreachable!(),
        };
        let rows = rows.unwrap_or_else(|| (0..count).collect());
        let none_frozen = plain.rows.iter().all(|row| !row.frozen);
        match rows.iter().find(|&&row| row >= count) {
            Some(&row) if frozen || !none_frozen => {
                assert!(matches!(result, Err(Error::NoSuchRow { row: got, .. }) if got == row));
            }
            Some(_) => result.unwrap(), // nothing was frozen, and nothing is looked at
            None => {
                result.unwrap();
                rows.iter().for_each(|&row| plain.rows[row].frozen = frozen);
            }
        }
    }

    fn move_rows(&mut self, id: ParamId, change: &Change, filler: f32) {
        let plain = self.model.get_mut(&id).unwrap();
        let count = plain.rows.len();
        let all = || (0..count).map(|row| (Some(row), Some(row)));
        let new = |count| vec![(None, None); count];
        let index = match change {
            Change::Gather(index) | Change::Reset(index) => fitted(index, count),
            _ => Vec::new(),
        };
        let fit = |row: Option<usize>| row.filter(|_| count > 0).map(|row| row % count);
        let sources = match change {
            Change::From(rows) => rows.iter().map(|(a, b)| (fit(*a), fit(*b))).collect(),
            _ => Vec::new(),
        };
        let (values, state): (Vec<Option<usize>>, Vec<Option<usize>>) =
            sources.iter().copied().unzip();
        let (row_change, moved) = match change {
            Change::Gather(_) => (
                RowChange::Gather(&index),
                index.iter().map(|&row| (Some(row), Some(row))).collect(),
            ),
            Change::Reset(_) => {
                let state = |row: usize| (!index.contains(&row)).then_some(row);
                let moved = (0..count).map(|row| (Some(row), state(row))).collect();
                (RowChange::Reset(&index), moved)
            }
            Change::Append(added) => {
                (RowChange::Append(*added), all().chain(new(*added)).collect())
            }
            Change::Pad(before, after) => (
                RowChange::Pad { before: *before, after: *after },
                new(*before).into_iter().chain(all()).chain(new(*after)).collect(),
            ),
            Change::Resize(size) => {
                (RowChange::Resize(*size), all().chain(new(40)).take(*size).collect::<Vec<_>>())
            }
            Change::From(_) => (RowChange::From { values: &values, state: &state }, sources),
        };
        let result =
            self.store.edit_rows(vec![(id, NewValue::Filled(filler.into()))], 0, row_change);
        if index.iter().any(|&row| row >= count) {
            assert!(matches!(result, Err(Error::NoSuchRow { .. })), "{result:?}");
            return;
        }
        match plain.moved(&moved, filler) {
            Some(new) => {
                result.unwrap();
                *plain = new;
            }
            None => assert!(matches!(result, Err(Error::BoundsOfNewRows { .. })), "{result:?}"),
        }
    }

    /// Of every other parameter, chosen by the seed.
    fn step(&mut self, seed: u64, adam: &Adam, max_grad_norm: Option<f64>) {
        let chosen = self.order.iter().enumerate().filter(|(i, _)| seed >> (i % 60) & 1 == 0);
        let grads: Vec<(ParamId, Vec<f32>)> = chosen
            .map(|(i, id)| (*id, finite(seed ^ i as u64, self.model[id].rows.len())))
            .collect();
        // Of some of them only some rows.
        let named: Vec<Option<Vec<bool>>> = grads
            .iter()
            .map(|(id, grad)| {
                let flags = || numbers(seed ^ id.get(), grad.len()).map(|x| x < 0.2).collect();
                (seed.rotate_left(id.get() as u32 % 64) & 3 == 0).then(flags)
            })
            .collect();
        let lent: Vec<(ParamId, Gradient<'_>)> = grads
            .iter()
            .zip(&named)
            .map(|((id, grad), named)| match named {
                Some(rows) => (*id, Gradient::from(grad).of_rows(0, rows)),
                None => (*id, grad.into()),
            })
            .collect();
        let options = StepOptions { max_grad_norm, ..StepOptions::default() };
        let report = self.store.step(&lent, adam, &options).unwrap();
        let mut steps: Vec<_> = grads.iter().zip(&named).collect();
        steps.retain(|((id, _), _)| !self.model[id].frozen);
        assert_eq!(report.updated, steps.len());
        let squares = steps.iter().flat_map(|((id, grad), named)| {
            let takes_part = self.model[id].takes_part(named.as_deref());
            grad.iter().zip(takes_part).map(|(g, on)| if on { f64::from(*g).powi(2) } else { 0.0 })
        });
        let norm = squares.sum::<f64>().sqrt();
        assert_eq!(report.grad_norm.is_some(), max_grad_norm.is_some());
        // The store's own norm, which is summed in another order, goes on.
        let coefficient = match (report.grad_norm, max_grad_norm) {
            (Some(got), Some(max_norm)) => {
                assert!((got - norm).abs() <= 1e-12 * norm, "{got} {norm}");
                clip_coefficient(got, max_norm)
            }
            _ => 1.0,
        };
        for ((id, grad), named) in steps {
            self.model.get_mut(id).unwrap().step(grad, adam, coefficient, named.as_deref());
        }
    }

    fn check(&self) {
        assert_eq!(self.store.ids().collect::<Vec<_>>(), self.order);
        assert_eq!(self.store.len(), self.order.len());
        let mut bytes = 0;
        for (id, plain) in &self.model {
            assert_eq!(self.store.names(*id).unwrap(), plain.names);
            assert!(plain.names.iter().all(|name| self.store.id(name) == Some(*id)));
            assert_eq!(self.store.bounds(*id).unwrap(), plain.bounds);
            // Every NaN stands for every other.
            let bits_of = |x: &f32| if x.is_nan() { f32::NAN } else { *x }.to_bits();
            let bits = |x: &[f32]| x.iter().map(bits_of).collect::<Vec<_>>();
            assert_eq!(self.store.norm(*id).unwrap().map(|(limit, _)| limit), plain.norm);
            assert_eq!(bits(self.store.values(*id).unwrap()), bits(&plain.all(|row| row.value)));
            let state = self.store.state::<f32>(*id).unwrap();
            assert_eq!(state.is_some(), plain.has_moments);
            if let Some(state) = state {
                assert_eq!(bits(state.exp_avg), bits(&plain.all(|row| row.exp_avg)));
                assert_eq!(bits(state.exp_avg_sq), bits(&plain.all(|row| row.exp_avg_sq)));
                let max = plain.has_max.then(|| bits(&plain.all(|row| row.max)));
                assert_eq!(state.max_exp_avg_sq.map(bits), max);
            }
            self.check_rows(*id, plain);
            let buffers = 1 + 2 * usize::from(plain.has_moments) + usize::from(plain.has_max);
            assert_eq!(self.store.memory_bytes_of(*id), Ok(4 * buffers * plain.rows.len()));
            bytes += 4 * buffers * plain.rows.len();
        }
        assert_eq!(self.store.memory_bytes(), bytes);
        for index in 0..6 {
            assert_eq!(self.store.id(&name_of(index)), self.by_name(&name_of(index)));
        }
    }

    /// What rows have of their own; where that is nothing, the parameter's step is theirs.
    fn check_rows(&self, id: ParamId, plain: &Plain) {
        assert_eq!(self.store.is_frozen(id), Ok(plain.frozen));
        let frozen: Vec<bool> = plain.rows.iter().map(|row| row.frozen).collect();
        let expected = frozen.contains(&true).then_some((0, &frozen[..]));
        assert_eq!(self.store.frozen_rows(id).unwrap(), expected);
        let taken: Vec<u64> = plain.rows.iter().map(|row| row.taken).collect();
        let step = self.store.steps(id).unwrap();
        match self.store.row_steps(id).unwrap() {
            Some(steps) => assert_eq!(steps, (0, taken.clone())),
            None => assert!(taken.iter().all(|taken| *taken == step), "{taken:?} {step}"),
        }
        if expected.is_none() && taken.iter().all(|steps| *steps == taken[0]) {
            assert_eq!(self.store.row_steps(id).unwrap(), None);
        }
        for (side, limits) in self.store.element_bounds::<f32>(id).into_iter().enumerate() {
            let held = plain.rows.iter().map(|row| row.limits[side].unwrap_or(f32::NAN)).collect();
            assert_eq!(limits.map(<[f32]>::to_vec), plain.limited[side].then_some(held));
        }
    }
}

/// Rows by their number modulo that of the rows, but for some that are not there.
fn fitted(index: &[usize], count: usize) -> Vec<usize> {
    let fit = |row: &usize| if row % 16 == 15 || count == 0 { *row } else { row % count };
    index.iter().map(fit).collect()
}

proptest! {
    #[test]
    fn the_store_behaves_as_a_plain_map(actions in prop::collection::vec(any_action(), 0..40)) {
        let mut pair = Pair::default();
        for action in actions {
            pair.apply(action);
            pair.check();
        }
    }
}
