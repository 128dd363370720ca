//! Rows of a store's parameters against rows that are parameters of their own.

use std::num::NonZeroUsize;

use paramstate::{
    Adam, AdamTask, Bounds, DType, Decay, Error, Execution, Gradient, Layout, NewValue, NormLimit,
    Operand, Order, ParamId, Reach, RowChange, SecondMoment, StepOptions, Store, adam_step,
};
use proptest::prelude::*;

const INNER: usize = 3;

/// What is done to the rows, or a step.
#[derive(Clone, Debug)]
enum Action {
    Step(u8),
    /// Of the rows whose bit is set.
    StepOf(u8, u16),
    Gather(Vec<usize>),
    Append(usize),
    Pad(usize, usize),
    Resize(usize),
    Reset(Vec<usize>),
    Freeze(bool),
    FreezeRows(Vec<usize>),
    UnfreezeRows(Option<Vec<usize>>),
}

fn any_action() -> impl Strategy<Value = Action> {
    let rows = || prop::collection::vec(0usize..100, 0..6);
    prop_oneof![
        4 => any::<u8>().prop_map(Action::Step),
        1 => rows().prop_map(Action::Gather),
        2 => (any::<u8>(), any::<u16>()).prop_map(|(seed, bits)| Action::StepOf(seed, bits)),
        1 => (0usize..4).prop_map(Action::Append),
        1 => (0usize..3, 0usize..3).prop_map(|(before, after)| Action::Pad(before, after)),
        1 => (0usize..9).prop_map(Action::Resize),
        2 => rows().prop_map(Action::FreezeRows),
        1 => prop::option::of(rows()).prop_map(Action::UnfreezeRows),
        1 => rows().prop_map(Action::Reset),
        1 => any::<bool>().prop_map(Action::Freeze),
    ]
}

/// One row by itself: its value, its moments, the steps that it has taken, and whether it is frozen.
type Row = (Vec<f32>, Vec<Vec<f32>>, u64, bool);

fn new_row(value: Vec<f32>) -> Row {
    (value, vec![vec![0.0; INNER]; 3], 0, false)
}

fn grad_of(seed: u8, row: usize) -> Vec<f32> {
    (0..INNER).map(|i| ((row * 7 + i * 3 + usize::from(seed)) % 11) as f32 * 0.1 - 0.5).collect()
}

proptest! {
    /// `dim` 0 is [rows, INNER]; `dim` 1 is [INNER, rows].
    #[test]
    fn a_row_does_what_a_parameter_of_its_own_does(
        actions in prop::collection::vec(any_action(), 1..25),
        dim in 0usize..2,
        amsgrad in any::<bool>(),
    ) {
        let second_moment = if amsgrad { SecondMoment::Maximum } else { SecondMoment::Running };
        let adam = Adam {
            lr: 0.1, weight_decay: 0.01, decay: Decay::Decoupled, second_moment, ..Adam::default()
        };
        let mut rows: Vec<Row> =
            (0..4).map(|row| new_row(grad_of(9, row))).collect();
        let mut store = Store::new();
        let flat = |rows: &[Vec<f32>]| -> Vec<f32> {
            if dim == 0 { rows.concat() } else {
                (0..INNER).flat_map(|i| rows.iter().map(move |row| row[i])).collect()
            }
        };
        let shape = |rows: usize| if dim == 0 { [rows, INNER] } else { [INNER, rows] };
        let values: Vec<Vec<f32>> = rows.iter().map(|(value, ..)| value.clone()).collect();
        let id = store.register_values(Some("w"), None, &shape(4), &flat(&values)).unwrap();
        // Another parameter that lives through the same.
        let other = store.register_values(Some("v"), None, &[4], &[0.0f32; 4]).unwrap();
        let (mut frozen, ids) = (false, [id, other]);
        for action in actions {
            let flags: Vec<bool>;
            let count = rows.len();
            let fit = |index: Vec<usize>| -> Vec<usize> {
                if count == 0 { Vec::new() } else { index.into_iter().map(|row| row % count).collect() }
            };
            match action {
                Action::Step(seed) | Action::StepOf(seed, _) => {
                    let grads: Vec<Vec<f32>> = (0..count).map(|row| grad_of(seed, row)).collect();
                    let grads_flat = flat(&grads);
                    let gradient = Gradient::from(&grads_flat);
                    let (named, gradient) = match action {
                        Action::StepOf(_, bits) => {
                            flags = (0..count).map(|row| bits >> (row % 16) & 1 == 1).collect();
                            (flags.clone(), gradient.of_rows(dim, &flags))
                        }
                        _ => (vec![true; count], gradient),
                    };
                    let options = StepOptions { max_grad_norm: Some(1e9), ..StepOptions::default() };
                    let report = store.step(&[(id, gradient)], &adam, &options).unwrap();
                    prop_assert_eq!(report.updated, usize::from(!frozen));
                    let mut squares = 0.0;
                    for ((row, grad), named) in rows.iter_mut().zip(&grads).zip(named) {
                        if !frozen && !row.3 && named {
                            *row = stepped(row, grad, &adam);
                            squares += grad.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
                        }
                    }
                    let norm = report.grad_norm.unwrap();
                    prop_assert!((norm - squares.sqrt()).abs() < 1e-9, "{} {}", norm, squares.sqrt());
                }
                Action::Gather(index) => {
                    let index = fit(index);
                    if dim == 0 { store.gather_rows(&ids, 0, &index).unwrap() }
                    else { store.gather_rows(&[id], 1, &index).unwrap() }
                    rows = index.iter().map(|&row| rows[row].clone()).collect();
                }
                Action::Append(new) => {
                    let values: Vec<Vec<f32>> = (0..new).map(|row| grad_of(3, row)).collect();
                    let added = flat(&values);
                    store.append_rows(dim, new, &[(id, added.as_slice().into())]).unwrap();
                    if dim == 0 {
                        let edits = vec![(other, NewValue::Follows)];
                        store.edit_rows(edits, 0, RowChange::Append(new)).unwrap();
                    }
                    rows.extend(values.into_iter().map(new_row));
                }
                Action::Pad(before, after) => {
                    let ids = if dim == 0 { &ids[..] } else { &ids[..1] };
                    store.pad_rows(ids, dim, (before, after), 0.5).unwrap();
                    let filled = |count| vec![new_row(vec![0.5; INNER]); count];
                    rows = [filled(before), rows, filled(after)].concat();
                }
                Action::Resize(size) => {
                    let ids = if dim == 0 { &ids[..] } else { &ids[..1] };
                    store.resize_rows(ids, dim, size, -0.5).unwrap();
                    rows.resize(size, new_row(vec![-0.5; INNER]));
                }
                Action::FreezeRows(index) => {
                    let index = fit(index);
                    store.freeze_rows(&[id], dim, &index).unwrap();
                    index.iter().for_each(|&row| rows[row].3 = true);
                }
                Action::UnfreezeRows(index) => {
                    let index = index.map(fit);
                    store.unfreeze_rows(&[id], index.as_deref()).unwrap();
                    let index = index.unwrap_or_else(|| (0..count).collect());
                    index.iter().for_each(|&row| rows[row].3 = false);
                }
                Action::Reset(index) => {
                    let index = fit(index);
                    store.reset_rows(&[id], dim, &index).unwrap();
                    for row in index { (rows[row].1, rows[row].2) = (vec![vec![0.0; INNER]; 3], 0); }
                }
                Action::Freeze(now) => {
                    if now { store.freeze(id).unwrap() } else { store.unfreeze(id).unwrap() }
                    frozen = now;
                }
            }
            prop_assert_eq!(store.shape(id).unwrap(), Some(&shape(rows.len())[..]));
            let of = |part: fn(&Row) -> Vec<f32>| -> Vec<f32> {
                flat(&rows.iter().map(part).collect::<Vec<_>>())
            };
            prop_assert_eq!(store.values::<f32>(id).unwrap(), of(|row| row.0.clone()));
            if let Some(state) = store.state::<f32>(id).unwrap() {
                prop_assert_eq!(state.exp_avg, of(|row| row.1[0].clone()));
                prop_assert_eq!(state.exp_avg_sq, of(|row| row.1[1].clone()));
                if let Some(max) = state.max_exp_avg_sq {
                    prop_assert_eq!(max, of(|row| row.1[2].clone()));
                }
            }
            if !rows.is_empty() {
                let steps: Vec<u64> = rows.iter().map(|row| row.2).collect();
                match store.row_steps(id).unwrap() {
                    Some((held, of_rows)) => {
                        prop_assert_eq!((held, &of_rows), (dim, &steps));
                        let differ = of_rows.iter().any(|step| *step != of_rows[0]);
                        prop_assert!(differ || rows.iter().any(|row| row.3));
                    }
                    None => prop_assert_eq!(vec![store.steps(id).unwrap(); rows.len()], steps),
                }
                let resting: Vec<bool> = rows.iter().map(|row| row.3).collect();
                let expected = resting.contains(&true).then_some((dim, &resting[..]));
                prop_assert_eq!(store.frozen_rows(id).unwrap(), expected);
            }
        }
    }
}

/// One step of one row, which is a parameter of its own for that long.
fn stepped((value, moments, step, frozen): &Row, grad: &[f32], adam: &Adam) -> Row {
    let (mut value, mut moments, mut grad) = (value.clone(), moments.clone(), grad.to_vec());
    let operand = |x: &mut Vec<f32>| Operand { ptr: x.as_mut_ptr().cast(), dtype: DType::F32 };
    let [m, v, max] = moments.as_mut_slice() else { panic!("three moments") };
    let task = AdamTask {
        value: operand(&mut value),
        grad: operand(&mut grad),
        exp_avg: operand(m),
        exp_avg_sq: operand(v),
        max_exp_avg_sq: (adam.second_moment == SecondMoment::Maximum).then(|| operand(max)),
        layout: Layout::Flat { len: INNER },
        scalars: adam.scalars((step + 1) as f64, 1.0),
        bounds: Bounds::default(),
        particulars: None,
        precision: None,
    };
    // SAFETY: vectors of as many elements, which live until the end.
    unsafe { adam_step(&[task], Order::Parallel, &Execution::new(NonZeroUsize::MIN)) };
    (value, moments, step + 1, *frozen)
}

fn two() -> (Store, ParamId, ParamId) {
    let mut store = Store::new();
    let w = store.register_values(Some("w"), None, &[3, 2], &[1.0f32; 6]).unwrap();
    let v = store.register_values(Some("v"), None, &[2], &[1.0f32; 2]).unwrap();
    let grads = [(w, (&[1.0f32; 6]).into()), (v, (&[1.0f32; 2]).into())];
    store.step(&grads, &Adam::default(), &StepOptions::default()).unwrap();
    (store, w, v)
}

#[test]
fn one_parameter_that_cannot_follow_stops_all() {
    let (mut store, w, v) = two();
    let before = format!("{store:?}");
    let values =
        (store.values::<f32>(w).unwrap().to_vec(), store.values::<f32>(v).unwrap().to_vec());
    let label = |id| store.entry(id).unwrap().names()[0].clone();
    assert_eq!((label(w), label(v)), ("w".to_owned(), "v".to_owned()));
    let refused = |result: Result<(), Error>, words: &str| {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(words), "{message}");
    };
    refused(store.gather_rows(&[w, v], 0, &[2]), "'v' (ID");
    refused(store.gather_rows(&[w, v], 0, &[2]), "none is number 2");
    refused(store.reset_rows(&[w, v], 1, &[0]), "has no dimension 1");
    refused(store.gather_rows(&[w, w], 0, &[0]), "named twice");
    refused(store.keep_rows(&[w, v], 0, &[true; 3]), "3 were given for its rows, and 2 are needed");
    refused(store.permute_rows(&[w], 0, &[0, 1, 1]), "does not name every row once");
    refused(
        store.append_rows(0, 1, &[(w, (&[1.0f32; 2]).into()), (v, (&[1.0f32; 2]).into())]),
        "2 were given",
    );
    refused(store.append_rows(0, 1, &[(w, (&[1.0f64; 2]).into())]), "float32, not float64");
    assert_eq!(format!("{store:?}"), before);
    assert_eq!(
        (store.values::<f32>(w).unwrap(), store.values::<f32>(v).unwrap()),
        (&values.0[..], &values.1[..])
    );
}

#[test]
fn rows_along_a_second_dimension_get_no_steps_of_their_own() {
    let (mut store, w, _) = two();
    store.reset_rows(&[w], 0, &[1]).unwrap();
    let error = store.append_rows(1, 1, &[(w, (&[1.0f32; 3]).into())]).unwrap_err();
    assert!(matches!(error, Error::RowDimension { held: 0, dim: 1, .. }), "{error}");
    store.gather_rows(&[w], 1, &[1, 0, 1]).unwrap(); // each row is as old as it was
    assert_eq!(store.row_steps(w).unwrap(), Some((0, vec![1, 0, 1])));
    assert_eq!(store.shape(w).unwrap(), Some(&[3, 3][..]));
    store.step(&[(w, (&[1.0f32; 9]).into())], &Adam::default(), &StepOptions::default()).unwrap();
    store.reset(w).unwrap();
    assert_eq!(store.row_steps(w).unwrap(), None);
}

#[test]
fn bounds_of_each_element_hold_and_follow_their_rows() {
    let (mut store, w, _) = two();
    let max = [9.0f32, 0.0, 9.0, 0.5, 9.0, f32::INFINITY];
    store.set_element_bounds(w, None, Some(&max)).unwrap();
    store.gather_rows(&[w], 0, &[2, 0, 1]).unwrap();
    store.step(&[(w, (&[-1.0f32; 6]).into())], &Adam::default(), &StepOptions::default()).unwrap();
    let values = store.values::<f32>(w).unwrap();
    assert_eq!((values[3], values[5]), (0.0, 0.5));
    assert!(values[1] > 0.9);
    let error = store.append_rows(0, 1, &[(w, (&[1.0f32; 2]).into())]).unwrap_err();
    assert!(matches!(error, Error::BoundsOfNewRows { .. }), "{error}");
    let error = store.set_element_bounds(w, Some(&[1.0f32; 5]), None).unwrap_err();
    assert!(matches!(error, Error::ShapeMismatch { .. }), "{error}");
    let error = store.set_element_bounds(w, Some(&[1.0f32; 6]), Some(&max)).unwrap_err();
    assert!(
        error.to_string().contains("between 1 and 0, the bounds of its element [0, 1]"),
        "{error}"
    );
    let error = store.set_element_bounds(w, None, Some(&[f32::NAN; 6])).unwrap_err();
    assert!(matches!(error, Error::InvalidElementBounds { .. }), "{error}");
}

#[test]
fn a_frozen_parameter_s_gradient_is_not_in_the_norm() {
    let (mut store, w, v) = two();
    store.freeze(w).unwrap();
    let options = StepOptions { max_grad_norm: Some(1.0), ..StepOptions::default() };
    let grads = [(w, (&[9.0f32; 6]).into()), (v, (&[3.0f32, 4.0]).into())];
    let report = store.step(&grads, &Adam::default(), &options).unwrap();
    assert_eq!((report.grad_norm, report.updated), (Some(5.0), 1));
    assert_eq!((store.steps(w).unwrap(), store.steps(v).unwrap()), (1, 2));
    assert!(store.is_frozen(w).unwrap());
}

#[test]
fn a_frozen_row_keeps_its_bits_through_a_thousand_steps_and_goes_on_from_its_state() {
    for dim in [0, 1] {
        let adam = Adam { lr: 0.1, weight_decay: 0.1, decay: Decay::Decoupled, ..Adam::default() };
        let grad = |seed: u8| -> Vec<f32> { (0..4).flat_map(|row| grad_of(seed, row)).collect() };
        let stepped = |store: &mut Store, id, seed| {
            let grad = grad(seed);
            let grads = [(id, Gradient::from(&grad))];
            store.step(&grads, &adam, &StepOptions::default()).unwrap();
        };
        let mut stores = [Store::new(), Store::new()];
        let [id, twin] = stores.each_mut().map(|store| {
            let id = store.register_values(None, None, &[4, 3], &grad(7)).unwrap();
            (0..3).for_each(|seed| stepped(store, id, seed));
            id
        });
        let [store, other] = &mut stores;
        store.freeze_rows(&[id], dim, &[0, 2]).unwrap();
        let of_frozen = |store: &Store| -> Vec<u32> {
            let state = store.state::<f32>(id).unwrap().unwrap();
            let all = [store.values::<f32>(id).unwrap(), state.exp_avg, state.exp_avg_sq];
            let at = |i: usize| if dim == 0 { i / 3 } else { i % 3 };
            let frozen = |values: &[f32]| -> Vec<u32> {
                (0..12).filter(|&i| at(i) % 2 == 0).map(|i| values[i].to_bits()).collect()
            };
            all.into_iter().flat_map(frozen).collect()
        };
        let before = of_frozen(store);
        (0..1000u32).for_each(|step| stepped(store, id, (step % 251) as u8));
        assert_eq!(of_frozen(store), before);
        let steps = store.row_steps(id).unwrap().unwrap();
        assert_eq!((steps.0, &steps.1[..3]), (dim, &[3, 1003, 3][..]));
        store.unfreeze_rows(&[id], None).unwrap();
        stepped(store, id, 3);
        stepped(other, twin, 3); // which has rested all the time
        let row = |store: &Store, id| store.values::<f32>(id).unwrap()[..1].to_vec();
        assert_eq!(row(store, id), row(other, twin));
    }
}

#[test]
fn frozen_rows_follow_their_values_and_a_second_dimension_is_refused() {
    let (mut store, w, v) = two();
    store.freeze_rows(&[w], 0, &[1]).unwrap();
    let before = format!("{store:?}");
    for result in [
        store.freeze_rows(&[v, w], 1, &[0]),
        store.freeze_rows(&[w], 1, &[0]),
        store.freeze_rows(&[v, w], 0, &[2]),
        store.unfreeze_rows(&[v, w], Some(&[3])),
        store.reset_rows(&[w], 1, &[0]),
        store
            .step(
                &[(w, Gradient::from(&[1.0f32; 6]).of_rows(1, &[true; 2]))],
                &Adam::default(),
                &StepOptions::default(),
            )
            .map(|_| ()),
        store
            .step(
                &[(w, Gradient::from(&[1.0f32; 6]).of_rows(0, &[true; 2]))],
                &Adam::default(),
                &StepOptions::default(),
            )
            .map(|_| ()),
        store
            .step(
                &[
                    (v, (&[1.0f32; 2]).into()),
                    (w, Gradient::from(&[1.0f32; 6]).of_rows(2, &[true; 2])),
                ],
                &Adam::default(),
                &StepOptions::default(),
            )
            .map(|_| ()),
    ] {
        let error = result.unwrap_err();
        assert!(error.to_string().contains("ID"), "{error}");
        assert_eq!(format!("{store:?}"), before);
    }
    let error = store.freeze_rows(&[w], 1, &[0]).unwrap_err();
    assert!(matches!(error, Error::RowDimension { held: 0, dim: 1, .. }), "{error}");
    // The copy of a frozen row is frozen; a new row with the state of one is not.
    let values = [Some(2), Some(1), Some(1), None];
    let state = [Some(2), Some(1), None, Some(1)];
    let change = RowChange::From { values: &values, state: &state };
    store.edit_rows(vec![(w, NewValue::Follows)], 0, change).unwrap();
    assert_eq!(store.frozen_rows(w).unwrap(), Some((0, &[false, true, true, false][..])));
    assert_eq!(store.row_steps(w).unwrap(), Some((0, vec![1, 1, 0, 1])));
    store.gather_rows(&[w], 1, &[1]).unwrap(); // along another dimension rows may move
    store.reset(w).unwrap();
    assert_eq!(store.frozen_rows(w).unwrap(), Some((0, &[false, true, true, false][..])));
    store.unfreeze_rows(&[w], None).unwrap();
    assert_eq!(store.row_steps(w).unwrap(), None);
}

#[test]
fn a_norm_holds_along_its_dimensions_and_leaves_frozen_rows() {
    let (mut store, w, v) = two();
    store.set_bounds(w, Bounds::new(Some(0.0), None).unwrap()).unwrap();
    store.set_norm(w, Some(NormLimit::AtMost(0.5)), &[1]).unwrap();
    assert!(store.bounds(w).unwrap().is_none(), "a norm takes the place of bounds");
    store.freeze_rows(&[w], 0, &[0]).unwrap();
    let frozen = store.values::<f32>(w).unwrap()[..2].to_vec();
    let norms = |store: &Store| -> Vec<f32> {
        let values = store.values::<f32>(w).unwrap().chunks(2);
        values.map(|row| row[0].hypot(row[1])).collect()
    };
    store.hold(w, Reach::Unfrozen).unwrap();
    assert!(
        norms(&store)[0] > 1.0 && norms(&store)[1..].iter().all(|norm| (norm - 0.5).abs() < 1e-6)
    );
    store
        .step(
            &[(w, (&[-1.0f32; 6]).into())],
            &Adam { lr: 0.1, ..Adam::default() },
            &StepOptions::default(),
        )
        .unwrap();
    assert!(norms(&store)[1..].iter().all(|norm| (norm - 0.5).abs() < 1e-6));
    assert_eq!(store.values::<f32>(w).unwrap()[..2], frozen);
    store.append_rows(0, 1, &[(w, (&[3.0f32, 4.0]).into())]).unwrap(); // held at once
    assert!((norms(&store)[3] - 0.5).abs() < 1e-6);
    let error = store.set_norm(v, Some(NormLimit::AtMost(1.0)), &[1]).unwrap_err();
    assert!(matches!(error, Error::NoSuchDimension { dim: 1, .. }), "{error}");
    let error = store.set_norm(w, Some(NormLimit::AtMost(1.0)), &[1, 0, 1]).unwrap_err();
    assert!(matches!(error, Error::RepeatedDimension { dim: 1, .. }), "{error}");
    let error = store.set_norm(w, Some(NormLimit::Exactly(f64::NAN)), &[]).unwrap_err();
    assert!(
        error.to_string().contains("'w' (ID") && error.to_string().contains("finite"),
        "{error}"
    );
    store.set_bounds(w, Bounds::new(None, Some(0.1)).unwrap()).unwrap();
    assert_eq!(store.norm(w).unwrap(), None);
}
