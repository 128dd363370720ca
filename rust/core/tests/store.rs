//! What the store refuses, and what it does with memory that is lent to it.

use std::sync::{Arc, Mutex};

use paramstate::{
    Adam, Bounds, Buffer, DType, Error, Gradient, Lender, Lent, NewValue, NormLimit, Operand,
    ParamId, Reach, RowChange, StepOptions, Store, View, ViewLayout,
};

fn id(number: u64) -> ParamId {
    ParamId::new(number).unwrap()
}

#[test]
fn a_derived_id_that_a_renamed_parameter_still_has_is_derived_again() {
    let mut store = Store::new();
    let first = store.register(Some("weight"), None).unwrap();
    store.rename("weight", "old").unwrap();
    let second = store.register(Some("weight"), None).unwrap();
    assert_eq!((first, second), (ParamId::derive("weight", 0), ParamId::derive("weight", 1)));
    assert_eq!(store.id("old"), Some(first));
}

#[test]
fn an_error_in_one_gradient_leaves_all_parameters_as_they_were() {
    let mut store = Store::new();
    let a = store.register_values(Some("a"), None, &[2, 3], &[1.0f32; 6]).unwrap();
    let b = store.register_values(Some("b"), None, &[2], &[1.0f32; 2]).unwrap();
    let bare = store.register(Some("bare"), None).unwrap();
    let good = [0.5f32; 6];
    let (adam, options) = (Adam::default(), StepOptions::default());
    let second = [
        (b, [0.5f32; 3].to_vec(), "shape [3], the value has [2]"),
        (a, good.to_vec(), "two gradients"),
        (id(99), good.to_vec(), "no parameter has ID 99"),
        (bare, good.to_vec(), "no buffer 'value'"),
    ];
    for (other, grad, text) in second {
        let grads = [(a, (&good).into()), (other, (&grad).into())];
        let error = store.step(&grads, &adam, &options).unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(store.values::<f32>(a).unwrap(), [1.0; 6]);
        assert_eq!(store.state::<f32>(a), Ok(None));
        assert_eq!(store.steps(a), Ok(0));
    }
    let wild = Adam { beta1: 1.0, ..adam };
    let error = store.step(&[(a, (&good).into())], &wild, &options).unwrap_err();
    assert_eq!(error.to_string(), "beta1 is 1; it must be at least 0 and less than 1");
}

#[test]
fn a_value_has_as_many_elements_as_its_shape() {
    let mut store = Store::new();
    let error = store.register_values(Some("w"), None, &[2, 2], &[0.0f32; 3]).unwrap_err();
    assert_eq!(error, Error::ValueLength { shape: vec![2, 2], expected: 4, got: 3 });
    assert!(store.register_values(None, None, &[usize::MAX, 2], &[0.0f32; 3]).is_err());
    assert!(store.register_values(None, None, &[usize::MAX, 2, 0], &[0.0f32; 0]).is_ok());
    assert_eq!(store.id("w"), None);
}

#[test]
fn values_are_asked_for_in_their_own_dtype() {
    let mut store = Store::new();
    let a = store.register_values(Some("a"), None, &[1], &[0.0f32]).unwrap();
    let error = store.values::<f64>(a).unwrap_err();
    assert!(error.to_string().contains("holds float32, not float64"), "{error}");
    assert!(store.clip_with(a, |_: &mut [f64]| ()).is_err());
}

/// Memory that a test lends, until it lets go.
struct Shared {
    memory: Arc<Mutex<Option<Vec<f32>>>>,
    first: usize,
    layout: ViewLayout,
}

// SAFETY: the vectors live as long as the tests that lend them, which use them only between calls.
unsafe impl Lender for Shared {
    fn describe(&self) -> Option<Lent> {
        let mut memory = self.memory.lock().unwrap();
        let ptr = memory.as_mut()?[self.first..].as_mut_ptr().cast();
        Some(Lent { operand: Operand { ptr, dtype: DType::F32 }, layout: self.layout.clone() })
    }

    fn size_bytes(&self) -> usize {
        if self.memory.lock().unwrap().is_some() { 4 * self.layout.len() } else { 0 }
    }
}

fn strided(shape: [usize; 2], strides: [isize; 2]) -> ViewLayout {
    ViewLayout::Strided { shape: shape.into(), strides: strides.into() }
}

fn lend(
    store: &mut Store,
    name: &str,
    memory: &Arc<Mutex<Option<Vec<f32>>>>,
    first: usize,
    layout: ViewLayout,
) -> ParamId {
    let id = store.register(Some(name), None).unwrap();
    let lender = Shared { memory: memory.clone(), first, layout };
    store.set_buffer(id, "value", Buffer::Borrowed(Box::new(lender))).unwrap();
    id
}

#[test]
fn a_lent_value_is_stepped_and_clipped_where_it_lies() {
    let memory = Arc::new(Mutex::new(Some(vec![1.0f32; 12])));
    let mut store = Store::new();
    // Every other column of a 3 x 4 matrix, transposed.
    let id = lend(&mut store, "columns", &memory, 0, strided([2, 3], [2, 4]));
    let grad = [0.5f32, -0.5];
    let operand = Operand { ptr: grad.as_ptr().cast_mut().cast(), dtype: DType::F32 };
    let view = View { operand, layout: strided([2, 3], [1, 0]) }; // one number for each column
    // SAFETY: two numbers that live until the end, and that nobody writes.
    let gradient = unsafe { Gradient::from_view(view) };
    let adam = Adam { lr: 0.25, eps: 0.0, ..Adam::default() };
    store.step(&[(id, gradient)], &adam, &StepOptions::default()).unwrap();
    let near = |x: f32, y: f32| (x - y).abs() < 1e-6;
    {
        let memory = memory.lock().unwrap();
        let expected = [0.75, 1.0, 1.25, 1.0].repeat(3);
        assert!(memory.as_ref().unwrap().iter().zip(expected).all(|(x, y)| near(*x, y)));
    }
    let moments = store.state::<f32>(id).unwrap().unwrap();
    assert!(
        moments
            .exp_avg
            .iter()
            .zip([0.05, 0.05, 0.05, -0.05, -0.05, -0.05])
            .all(|(x, y)| near(*x, y))
    );

    store.clip(id, Bounds::new(Some(1.0), None).unwrap()).unwrap();
    store.clip_with(id, |values: &mut [f32]| values[5] = 7.0).unwrap();
    assert_eq!(memory.lock().unwrap().as_ref().unwrap()[..2], [1.0, 1.0]);
    assert_eq!(memory.lock().unwrap().as_ref().unwrap()[10], 7.0);
    assert!(matches!(store.values::<f32>(id), Err(Error::NotOwned { .. })));
    assert_eq!(store.memory_bytes_of(id), Ok(3 * 24));

    *memory.lock().unwrap() = None;
    let error = store.clip(id, Bounds::default()).unwrap_err();
    assert!(error.to_string().contains("is gone"), "{error}");
}

#[test]
fn lent_values_may_interleave_but_not_share() {
    let memory = Arc::new(Mutex::new(Some(vec![1.0f32; 12])));
    let mut store = Store::new();
    let even = lend(&mut store, "even", &memory, 0, strided([3, 2], [4, 2]));
    let odd = lend(&mut store, "odd", &memory, 1, strided([3, 2], [4, 2]));
    let all = lend(&mut store, "all", &memory, 0, ViewLayout::Flat { len: 12 });
    let expanded = lend(&mut store, "expanded", &memory, 0, strided([3, 2], [0, 1]));
    let (six, twelve) = ([0.5f32; 6], [0.5f32; 12]);
    let (adam, options) = (Adam::default(), StepOptions::default());
    let apart = [(even, (&six).into()), (odd, (&six).into())];
    assert_eq!(store.step(&apart, &adam, &options).unwrap().updated, 2);
    let shared = [(odd, (&six).into()), (all, (&twelve).into())];
    let error = store.step(&shared, &adam, &options).unwrap_err();
    assert!(
        matches!(error, Error::Overlap { first, second } if first.id == odd && second.id == all)
    );
    let error = store.step(&[(expanded, (&six).into())], &adam, &options).unwrap_err();
    assert!(matches!(error, Error::Expanded { parameter, .. } if parameter.id == expanded));
}

#[test]
fn strides_tell_the_shape_of_a_lent_value_and_its_rows() {
    let memory = Arc::new(Mutex::new(Some(vec![1.0f32; 12])));
    let mut store = Store::new();
    // Every other column of a 3 x 4 matrix, as a 3 x 2 one.
    let id = lend(&mut store, "w", &memory, 0, strided([3, 2], [4, 2]));
    let held = || memory.lock().unwrap().clone().unwrap();
    let (adam, options) = (Adam { lr: 0.5, eps: 0.0, ..Adam::default() }, StepOptions::default());
    store.set_norm(id, Some(NormLimit::AtMost(2.0)), &[0]).unwrap();
    store.freeze_rows(&[id], 1, &[1]).unwrap();
    let gradient = Gradient::from(&[1.0f32; 6]);
    store.step(&[(id, gradient.clone())], &adam, &options).unwrap();
    let expected = [0.5, 1.0, 1.0, 1.0].repeat(3);
    assert!(held().iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-6), "{:?}", held());
    assert_eq!(store.row_steps(id).unwrap(), Some((1, vec![1, 0])));
    store.set_norm(id, Some(NormLimit::Exactly(3.0)), &[0]).unwrap();
    store.hold(id, Reach::Unfrozen).unwrap();
    let expected = [3.0f32.sqrt(), 1.0, 1.0, 1.0].repeat(3);
    assert!(held().iter().zip(expected).all(|(x, y)| (x - y).abs() < 1e-6), "{:?}", held());
    // The values stay where they are, or others take their place.
    let edit = |value| vec![(id, value)];
    store.edit_rows(edit(NewValue::Stays), 1, RowChange::Reset(&[0])).unwrap();
    let error = store.edit_rows(edit(NewValue::Stays), 1, RowChange::Gather(&[0])).unwrap_err();
    assert!(matches!(error, Error::NotOwned { .. }), "{error}");
    let lent = |layout| {
        let lender = Shared { memory: memory.clone(), first: 0, layout };
        NewValue::Replaced(Buffer::Borrowed(Box::new(lender)))
    };
    let gather = RowChange::Gather(&[0]);
    let error = store.edit_rows(edit(lent(strided([3, 2], [4, 2]))), 1, gather).unwrap_err();
    assert!(error.to_string().contains("shape [3, 2], the value has [3, 1]"), "{error}");
    let error = store.edit_rows(edit(lent(strided([3, 1], [0, 1]))), 1, gather).unwrap_err();
    assert!(matches!(error, Error::Expanded { .. }), "{error}");
    store.edit_rows(edit(lent(strided([3, 1], [4, 1]))), 1, gather).unwrap();
    assert_eq!(store.frozen_rows(id).unwrap(), None);
    assert_eq!(store.steps(id).unwrap(), 0);
    // A value of another shape takes its place without a word.
    store.set_norm(id, Some(NormLimit::AtMost(9.0)), &[1]).unwrap();
    store.freeze_rows(&[id], 1, &[0]).unwrap();
    let layout = ViewLayout::Flat { len: 3 };
    let lender = Shared { memory: memory.clone(), first: 0, layout };
    store.set_buffer(id, "value", Buffer::Borrowed(Box::new(lender))).unwrap();
    let gradient = || Gradient::from(&[1.0f32; 3]);
    let error = store.step(&[(id, gradient())], &adam, &options).unwrap_err();
    assert!(error.to_string().contains("'rows' has shape [3, 1], the value has [3]"), "{error}");
    store.reset(id).unwrap();
    assert_eq!(store.frozen_rows(id).unwrap(), None);
    let error = store.step(&[(id, gradient())], &adam, &options).unwrap_err();
    assert!(matches!(error, Error::NoSuchDimension { dim: 1, .. }), "its norm: {error}");
    store.set_norm(id, None, &[]).unwrap();
    store.step(&[(id, gradient())], &adam, &options).unwrap();
}
