//! The store against a plain map, through random lists of actions.

mod reference;

use std::collections::BTreeMap;

use paramstate::{
    Adam, Bounds, Error, Gradient, ParamId, SecondMoment, StepOptions, Store, clip_coefficient,
};
use proptest::prelude::*;
use reference::{Point, any_adam, any_bounds, numbers};

/// One parameter of the model: what the store should hold.
#[derive(Clone, Debug, Default)]
struct Plain {
    names: Vec<String>,
    value: Vec<f32>,
    moments: Option<[Vec<f32>; 2]>,
    max: Option<Vec<f32>>,
    step: u64,
    bounds: Bounds,
}

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
    Step { seed: u64, adam: Box<Adam>, max_grad_norm: Option<f64> },
}

fn any_action() -> impl Strategy<Value = Action> {
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

fn clamp(x: f32, bounds: Bounds) -> f32 {
    if x.is_nan() {
        return x;
    }
    let x = bounds.min.map_or(x, |min| x.max(min as f32));
    bounds.max.map_or(x, |max| x.min(max as f32))
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
            self.model.insert(got, Plain { names, value, ..Plain::default() });
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
            }
            Action::Clip { bounds, .. } => {
                self.store.clip(id, bounds).unwrap();
                plain.value.iter_mut().for_each(|x| *x = clamp(*x, bounds));
            }
            Action::ClipWith { factor, .. } => {
                let scale = |values: &mut [f32]| values.iter_mut().for_each(|x| *x *= factor);
                self.store.clip_with(id, scale).unwrap();
                scale(&mut plain.value);
            }
            Action::Reset { .. } => {
                self.store.reset(id).unwrap();
                (plain.moments, plain.max, plain.step) = (None, None, 0);
            }
            Action::Register { .. } | Action::Rename { .. } | Action::Step { .. } => unreachable!(),
        }
    }

    /// Of every other parameter, chosen by the seed.
    fn step(&mut self, seed: u64, adam: &Adam, max_grad_norm: Option<f64>) {
        let chosen = self.order.iter().enumerate().filter(|(i, _)| seed >> (i % 60) & 1 == 0);
        let grads: Vec<(ParamId, Vec<f32>)> = chosen
            .map(|(i, id)| (*id, finite(seed ^ i as u64, self.model[id].value.len())))
            .collect();
        let lent: Vec<(ParamId, Gradient<'_>)> =
            grads.iter().map(|(id, grad)| (*id, grad.into())).collect();
        let options = StepOptions { max_grad_norm, ..StepOptions::default() };
        let report = self.store.step(&lent, adam, &options).unwrap();
        assert_eq!(report.updated, grads.len());
        let squares = grads.iter().flat_map(|(_, grad)| grad).map(|g| f64::from(*g).powi(2));
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
        for (id, grad) in grads {
            self.model.get_mut(&id).unwrap().step(&grad, adam, coefficient);
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
            assert_eq!(bits(self.store.values(*id).unwrap()), bits(&plain.value));
            let state = self.store.state::<f32>(*id).unwrap();
            assert_eq!(state.is_some(), plain.moments.is_some());
            if let (Some(state), Some([exp_avg, exp_avg_sq])) = (state, &plain.moments) {
                assert_eq!(state.step, plain.step);
                assert_eq!(bits(state.exp_avg), bits(exp_avg));
                assert_eq!(bits(state.exp_avg_sq), bits(exp_avg_sq));
                assert_eq!(state.max_exp_avg_sq.map(bits), plain.max.as_deref().map(bits));
            }
            let buffers =
                1 + 2 * usize::from(plain.moments.is_some()) + usize::from(plain.max.is_some());
            assert_eq!(self.store.memory_bytes_of(*id), Ok(4 * buffers * plain.value.len()));
            bytes += 4 * buffers * plain.value.len();
        }
        assert_eq!(self.store.memory_bytes(), bytes);
        for index in 0..6 {
            assert_eq!(self.store.id(&name_of(index)), self.by_name(&name_of(index)));
        }
    }
}

impl Plain {
    fn step(&mut self, grad: &[f32], adam: &Adam, coefficient: f64) {
        self.step += 1;
        let zeros = || vec![0.0; grad.len()];
        let maximal = adam.second_moment == SecondMoment::Maximum;
        let [exp_avg, exp_avg_sq] = self.moments.get_or_insert_with(|| [zeros(), zeros()]);
        let mut max = maximal.then(|| self.max.get_or_insert_with(zeros));
        for i in 0..grad.len() {
            let point = Point {
                value: self.value[i].into(),
                grad: grad[i].into(),
                exp_avg: exp_avg[i].into(),
                exp_avg_sq: exp_avg_sq[i].into(),
                max_exp_avg_sq: max.as_ref().map(|max| max[i].into()),
            };
            let new =
                reference::step(point, adam, self.step as f64, coefficient, self.bounds, false);
            self.value[i] = new.value as f32;
            exp_avg[i] = new.exp_avg as f32;
            exp_avg_sq[i] = new.exp_avg_sq as f32;
            if let (Some(max), Some(new)) = (&mut max, new.max_exp_avg_sq) {
                max[i] = new as f32;
            }
        }
    }
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
