//! The methods of `paramstate.Store`: what each does, said and shown, and a call.
//!
//! They stand in one block, because pyo3 takes several only with a dependency more; what they do is in the files that
//! they call.

use std::num::NonZeroUsize;
use std::sync::Mutex;

use numpy::PyUntypedArray;
use paramstate::{Adam, Decay, Direction, ParamId, SecondMoment, StepOptions};
use pyo3::gc::{PyTraverseError, PyVisit};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyMapping};

use crate::array_norms::{Dims, NormLimit};
use crate::error::to_python;
use crate::lookup::{Key, all_names, known};
use crate::store::Store;
use crate::{array_bounds, array_norms, array_rows, arrays};

#[pymethods]
impl Store {
    #[new]
    fn new() -> Self {
        Self { loans: Mutex::default() }
    }

    /// Registers a parameter and returns its ID.
    ///
    /// Args:
    ///     name: its name; without one only the ID finds it.
    ///     value: a writable array of any shape and strides, float64, float32 or float16. It is kept, and updated in
    ///         place. Without one, the parameter is an identity alone.
    ///     id: the ID to register under; by default derived from the name, or random without one.
    ///
    /// Raises:
    ///     TypeError: the value is no array, or of another dtype.
    ///     ValueError: the name or the ID is taken, or the value is read-only.
    ///
    /// >>> store = Store()
    /// >>> store.register("bias", np.zeros(3), id=7)
    /// 7
    #[pyo3(signature = (name=None, value=None, *, id=None))]
    fn register(
        &self,
        py: Python<'_>,
        name: Option<&str>,
        value: Option<Bound<'_, PyAny>>,
        id: Option<u64>,
    ) -> PyResult<u64> {
        let id = id.map(ParamId::new).transpose().map_err(to_python)?;
        let loan = value.map(|value| arrays::borrow(value, name)).transpose()?;
        let mut loans = self.lock(py);
        let id = loans.core.register(name, id).map_err(to_python)?;
        if loan.is_some() {
            loans.exchange(id, "value", loan).map_err(to_python)?;
        }
        loans.revise();
        Ok(id.get())
    }

    /// The ID of a name.
    ///
    /// Raises:
    ///     KeyError: nothing is called so; the message has the nearest names.
    ///
    /// >>> store = Store()
    /// >>> store.register("weight", np.zeros(3), id=7)
    /// 7
    /// >>> store.id("weight")
    /// 7
    fn id(&self, py: Python<'_>, name: String) -> PyResult<u64> {
        self.find(py, &Key::Name(name)).map(ParamId::get)
    }

    /// The names of an ID: the main name first, then its aliases.
    ///
    /// Raises:
    ///     KeyError: the ID is unknown.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("encoder.weight", id=7)
    /// >>> store.alias(7, "decoder.weight")
    /// >>> store.names(7)
    /// ['encoder.weight', 'decoder.weight']
    fn names(&self, py: Python<'_>, id: u64) -> PyResult<Vec<String>> {
        let id = self.find(py, &Key::Id(id))?;
        let names = self.lock(py).core.names(id).map(<[String]>::to_vec);
        names.map_err(to_python)
    }

    /// Adds a name, as a tied parameter has several.
    ///
    /// Raises:
    ///     KeyError: the ID is unknown.
    ///     ValueError: the name is taken.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("encoder.weight", id=7)
    /// >>> store.alias(7, "decoder.weight")
    /// >>> store.id("decoder.weight")
    /// 7
    fn alias(&self, py: Python<'_>, id: u64, name: &str) -> PyResult<()> {
        let id = self.find(py, &Key::Id(id))?;
        self.lock(py).core.alias(id, name).map_err(to_python)
    }

    /// Changes a name; the ID stays, and with it the state.
    ///
    /// Raises:
    ///     KeyError: the old name is unknown.
    ///     ValueError: the new one is taken.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("fc.weight", id=7)
    /// >>> store.rename("fc.weight", "head.weight")
    /// >>> store.ids()
    /// {'head.weight': 7}
    fn rename(&self, py: Python<'_>, old: String, new: &str) -> PyResult<()> {
        self.find(py, &Key::Name(old.clone()))?;
        self.lock(py).core.rename(&old, new).map_err(to_python)
    }

    /// Takes one name away; the ID stays.
    ///
    /// Raises:
    ///     KeyError: the name is unknown.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("encoder.weight", id=7)
    /// >>> store.alias(7, "decoder.weight")
    /// >>> store.unalias("encoder.weight")
    /// >>> store.names(7)
    /// ['decoder.weight']
    fn unalias(&self, py: Python<'_>, name: String) -> PyResult<()> {
        self.find(py, &Key::Name(name.clone()))?;
        self.lock(py).core.unalias(&name).map_err(to_python)
    }

    /// The keys under which something is kept for a parameter: "value", and the names of state tensors.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.zeros(2))
    /// >>> store.keys("w")
    /// ['value']
    /// >>> store.step({"w": np.ones(2)})
    /// >>> sorted(store.keys("w"))
    /// ['exp_avg', 'exp_avg_sq', 'value']
    fn keys(&self, py: Python<'_>, key: Key) -> PyResult<Vec<String>> {
        let id = self.find(py, &key)?;
        let loans = self.lock(py);
        let keys = loans.core.keys(id).map(|keys| keys.map(str::to_owned).collect());
        keys.map_err(to_python)
    }

    /// Forgets a parameter with all its names and its state. The array stays as it is.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.zeros(2))
    /// >>> store.remove("w")
    /// >>> "w" in store, len(store)
    /// (False, 0)
    fn remove(&self, py: Python<'_>, key: Key) -> PyResult<()> {
        let id = self.find(py, &key)?;
        let removed = {
            let mut loans = self.lock(py);
            loans.revise();
            (loans.core.remove(id), loans.take_all(id))
        };
        removed.0.map(drop).map_err(to_python)
    }

    /// Every name with its ID, aliases too, in the order of registration.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", id=7), store.register("b", id=8)
    /// >>> store.ids()
    /// {'w': 7, 'b': 8}
    fn ids(&self, py: Python<'_>) -> PyResult<Py<PyDict>> {
        let names = all_names(&self.lock(py));
        let ids = PyDict::new(py);
        for (name, id) in names {
            ids.set_item(name, id.get())?;
        }
        Ok(ids.unbind())
    }

    fn __len__(&self, py: Python<'_>) -> usize {
        self.lock(py).core.len()
    }

    fn __contains__(&self, py: Python<'_>, key: &Bound<'_, PyAny>) -> bool {
        let key = key.extract::<Key>();
        key.is_ok_and(|key| known(&self.lock(py), &key).is_some())
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        let loans = self.lock(py);
        format!("Store({} parameters)", loans.core.len())
    }

    /// Where a buffer lies now; None where the parameter has no such buffer in the host's memory.
    ///
    /// Args:
    ///     key: a name or an ID.
    ///     name: "value", or the name of a state tensor.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown.
    ///
    /// >>> store, weight = Store(), np.zeros(2)
    /// >>> _ = store.register("w", weight)
    /// >>> store.address("w") == weight.ctypes.data, store.address("w", "exp_avg")
    /// (True, None)
    #[pyo3(signature = (key, name="value"))]
    fn address(&self, py: Python<'_>, key: Key, name: &str) -> PyResult<Option<usize>> {
        let id = self.find(py, &key)?;
        let loans = self.lock(py);
        let lent = loans.core.buffer(id, name).and_then(paramstate::Buffer::describe);
        Ok(lent.map(|lent| lent.operand.ptr.addr()))
    }

    /// The object that lends a buffer (an array, or a tensor); None where the store owns it or there is none.
    ///
    /// Args:
    ///     key: a name or an ID.
    ///     name: "value", or the name of a state tensor.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown.
    ///
    /// >>> store, weight = Store(), np.zeros(2)
    /// >>> _ = store.register("w", weight)
    /// >>> store.lent("w", "value") is weight
    /// True
    fn lent(&self, py: Python<'_>, key: Key, name: &str) -> PyResult<Option<Py<PyAny>>> {
        let id = self.find(py, &key)?;
        let loan = self.lock(py).loan(id, name).cloned();
        Ok(loan.map(|loan| loan.object().clone_ref(py)))
    }

    /// The bytes of all buffers, lent ones included; of one parameter, or of all.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.zeros(2)), store.register("b", np.zeros(1))
    /// >>> store.memory_bytes("w"), store.memory_bytes()
    /// (16, 24)
    #[pyo3(signature = (key=None))]
    fn memory_bytes(&self, py: Python<'_>, key: Option<Key>) -> PyResult<usize> {
        let Some(key) = key else { return Ok(self.lock(py).core.memory_bytes()) };
        let id = self.find(py, &key)?;
        self.lock(py).core.memory_bytes_of(id).map_err(to_python)
    }

    /// Declares bounds that hold from now on: after every step, and for a registered array at once.
    ///
    /// They take the place of a norm. What is frozen is not moved.
    ///
    /// Args:
    ///     key: a name or an ID.
    ///     min, max: numbers, or for a registered array an array that broadcasts to its shape: then each element has
    ///         bounds of its own. None means no bound.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown.
    ///     ValueError: a bound is NaN, min is greater than max, or an array does not broadcast.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.array([-2.0, 0.5]))
    /// >>> store.set_bounds("w", 0.0, None)
    /// >>> store.value("w")
    /// array([0. , 0.5])
    fn set_bounds(
        &self,
        py: Python<'_>,
        key: Key,
        min: Option<Bound<'_, PyAny>>,
        max: Option<Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let id = self.find(py, &key)?;
        array_bounds::set(py, self, id, [min, max])
    }

    /// The declared bounds, (min, max); None means no bound, or one of each element.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.zeros(2))
    /// >>> store.set_bounds("w", -1.0, None)
    /// >>> store.bounds("w")
    /// (-1.0, None)
    fn bounds(&self, py: Python<'_>, key: Key) -> PyResult<(Option<f64>, Option<f64>)> {
        let id = self.find(py, &key)?;
        let bounds = self.lock(py).core.bounds(id).map_err(to_python)?;
        Ok((bounds.min, bounds.max))
    }

    /// Copies of the bounds of each element, (min, max), in the value's shape; None where there are none.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.zeros((2, 2)))
    /// >>> store.set_bounds("w", np.array([0.0, -1.0]), None)
    /// >>> store.element_bounds("w")
    /// (array([[ 0., -1.],
    ///        [ 0., -1.]]), None)
    fn element_bounds(&self, py: Python<'_>, key: Key) -> PyResult<array_bounds::Arrays> {
        let id = self.find(py, &key)?;
        array_bounds::get(py, self, id)
    }

    /// Declares that norms stay at or below a maximum: after every step, and at once. What is longer is scaled down.
    ///
    /// It takes the place of all bounds. A norm over frozen and free rows scales the free ones only, and so may stay above
    /// its maximum.
    ///
    /// Args:
    ///     key: a name or an ID.
    ///     max: the greatest Euclidean norm allowed; None takes the norm away that is declared, of either kind.
    ///     dim: over which dimension or dimensions the norms are taken; None takes one norm of the whole value.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown, or has no array.
    ///     ValueError: the maximum is negative or not finite, a dimension is not there or named twice.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.array([[3.0, 4.0], [0.3, 0.4]]))
    /// >>> store.set_max_norm("w", 1.0, dim=1)
    /// >>> store.value("w")
    /// array([[0.6, 0.8],
    ///        [0.3, 0.4]])
    #[pyo3(signature = (key, max, *, dim=None))]
    fn set_max_norm(
        &self,
        py: Python<'_>,
        key: Key,
        max: Option<f64>,
        dim: Option<Dims>,
    ) -> PyResult<()> {
        let id = self.find(py, &key)?;
        array_norms::set(py, self, id, max.map(NormLimit::AtMost), dim)
    }

    /// Declares that norms stay 1: after every step, and at once. A norm of 0 is left alone.
    ///
    /// It takes the place of all bounds; `set_max_norm` with None takes it away. A norm over frozen and free rows scales
    /// the free ones only, and so may not be 1.
    ///
    /// Args:
    ///     key: a name or an ID.
    ///     dim: over which dimension or dimensions the norms are taken; None takes one norm of the whole value.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown, or has no array.
    ///     ValueError: a dimension is not there, or named twice.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.array([3.0, 4.0]))
    /// >>> store.set_unit_norm("w")
    /// >>> store.value("w")
    /// array([0.6, 0.8])
    #[pyo3(signature = (key, *, dim=None))]
    fn set_unit_norm(&self, py: Python<'_>, key: Key, dim: Option<Dims>) -> PyResult<()> {
        let id = self.find(py, &key)?;
        array_norms::set(py, self, id, Some(NormLimit::Exactly(1.0)), dim)
    }

    /// What norms are held to: "at_most" or "exactly", the limit, and the dimensions that they are taken over (None for
    /// one norm of the whole value). None where no norm is declared.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.zeros((2, 2)))
    /// >>> store.set_max_norm("w", 1.0, dim=-1)
    /// >>> store.norm_limit("w")
    /// ('at_most', 1.0, [1])
    fn norm_limit(&self, py: Python<'_>, key: Key) -> PyResult<Option<array_norms::Declared>> {
        let id = self.find(py, &key)?;
        array_norms::get(py, self, id)
    }

    /// The array that was registered; after a change of rows, the one that took its place.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown, or the parameter has no array.
    ///
    /// >>> store, weight = Store(), np.zeros(2)
    /// >>> _ = store.register("w", weight)
    /// >>> store.value("w") is weight
    /// True
    fn value(&self, py: Python<'_>, key: Key) -> PyResult<Py<PyUntypedArray>> {
        let id = self.find(py, &key)?;
        Ok(arrays::value(py, self, id)?.unbind())
    }

    /// Copies of the state tensors under torch's names, of the value's shape and dtype, and "step" as a float.
    ///
    /// It is {} where there was no step yet.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.zeros(2))
    /// >>> store.state("w")
    /// {}
    /// >>> store.step({"w": np.array([1.0, -2.0])})
    /// >>> store.state("w")["step"], store.state("w")["exp_avg"]
    /// (1.0, array([ 0.1, -0.2]))
    fn state(&self, py: Python<'_>, key: Key) -> PyResult<Py<PyDict>> {
        let id = self.find(py, &key)?;
        Ok(arrays::state(py, self, id)?.unbind())
    }

    /// One step of Adam for the parameters that have a gradient here, in place.
    ///
    /// Args:
    ///     grads: from names or IDs to arrays of the value's shape, float64, float32 or float16; only read.
    ///     lr, betas, eps, weight_decay, decoupled_weight_decay, amsgrad, maximize: as in torch.optim.Adam;
    ///         `decoupled_weight_decay=True` is AdamW.
    ///     max_grad_norm: where given, the gradients are clipped by their global norm as they are read.
    ///     rows: from names or IDs to a mask or indices: only these rows are updated this time. The others are not
    ///         touched, grow no older, and are not in the global norm.
    ///     dim: the dimension of the rows in `rows`.
    ///     threads: how many threads may run; by default as many as there are processors.
    ///
    /// Returns:
    ///     The global norm of the gradients where `max_grad_norm` was given, else None.
    ///
    /// Raises:
    ///     KeyError: a name or an ID is unknown, or has no value.
    ///     TypeError, ValueError: a gradient or a setting cannot be used. Nothing was written then.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.zeros(2))
    /// >>> store.step({"w": np.array([3.0, 4.0])}, lr=0.1, max_grad_norm=1.0)
    /// 5.0
    /// >>> store.value("w")
    /// array([-0.1, -0.1])
    /// >>> store.step({"w": np.array([1.0, 1.0])}, lr=0.1, rows={"w": [0]})
    /// >>> store.row_steps("w")
    /// [2, 1]
    #[pyo3(signature = (grads, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled_weight_decay=false, amsgrad=false, maximize=false, max_grad_norm=None, rows=None, dim=0, threads=None),
        text_signature = "($self, grads, *, lr=0.001, betas=(0.9, 0.999), eps=1e-08, weight_decay=0.0, decoupled_weight_decay=False, amsgrad=False, maximize=False, max_grad_norm=None, rows=None, dim=0, threads=None)")]
    #[expect(clippy::too_many_arguments, reason = "they are torch's keywords")]
    fn step(
        &self,
        py: Python<'_>,
        grads: &Bound<'_, PyMapping>,
        lr: f64,
        betas: (f64, f64),
        eps: f64,
        weight_decay: f64,
        decoupled_weight_decay: bool,
        amsgrad: bool,
        maximize: bool,
        max_grad_norm: Option<f64>,
        rows: Option<&Bound<'_, PyMapping>>,
        dim: isize,
        threads: Option<NonZeroUsize>,
    ) -> PyResult<Option<f64>> {
        let adam = Adam {
            lr,
            beta1: betas.0,
            beta2: betas.1,
            eps,
            weight_decay,
            decay: if decoupled_weight_decay { Decay::Decoupled } else { Decay::L2 },
            direction: if maximize { Direction::Maximize } else { Direction::Minimize },
            second_moment: if amsgrad { SecondMoment::Maximum } else { SecondMoment::Running },
        };
        let default = StepOptions::default();
        let options = StepOptions { max_grad_norm, threads: threads.unwrap_or(default.threads) };
        let chosen = array_rows::chosen(py, self, rows, dim)?;
        arrays::step(py, self, grads, &chosen, &adam, &options)
    }

    /// Clips a value in place; its ID, moments and step count stay.
    ///
    /// Called with bounds, with a function (from a copy of the value to an array of the same shape), or with neither:
    /// then with what was declared. It moves what is frozen, too.
    ///
    /// Args:
    ///     key: a name or an ID.
    ///     min: the lower bound, a number or an array that broadcasts to the value; or the function.
    ///     max: the upper bound, likewise.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown, or has no array.
    ///     ValueError: no number lies between the bounds somewhere, an array does not broadcast, the function returned
    ///         another shape, or nothing was given and nothing is declared. Nothing was changed then.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.array([-1.0, 0.5, 2.0]))
    /// >>> store.clip("w", 0.0, 1.0)
    /// >>> store.clip("w", lambda values: values / 2)
    /// >>> store.value("w")
    /// array([0.  , 0.25, 0.5 ])
    /// >>> store.clip("w", np.array([0.1, 0.0, 0.0]), 0.4)
    /// >>> store.value("w")
    /// array([0.1 , 0.25, 0.4 ])
    #[pyo3(signature = (key, min=None, max=None))]
    fn clip(
        &self,
        py: Python<'_>,
        key: Key,
        min: Option<Bound<'_, PyAny>>,
        max: Option<Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let id = self.find(py, &key)?;
        array_bounds::clip(py, self, id, [min, max])
    }

    /// Keeps the rows whose flag is true, and drops the others, of several parameters or of none.
    ///
    /// Arrays cannot change their size in place: `value` gives the new ones. All state follows, and so do bounds of each
    /// element, the steps of rows, and whether they are frozen; what is declared holds at once. So it is with every change
    /// of rows.
    ///
    /// Args:
    ///     keys: names or IDs of parameters that have the same rows.
    ///     mask: one bool for each row.
    ///     dim: the dimension of the rows.
    ///
    /// Raises:
    ///     KeyError: a name or an ID is unknown.
    ///     ValueError: the mask is not as long as there are rows, or there is no such dimension. Nothing was changed then.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    /// >>> store.keep_rows(["w"], [True, False, True])
    /// >>> store.value("w")
    /// array([[1., 2.],
    ///        [5., 6.]])
    #[pyo3(signature = (keys, mask, *, dim=0))]
    fn keep_rows(
        &self,
        py: Python<'_>,
        keys: Vec<Key>,
        mask: &Bound<'_, PyAny>,
        dim: isize,
    ) -> PyResult<()> {
        array_rows::keep(py, self, &keys, mask, dim)
    }

    /// Puts these rows in the place of all, in this order; a row may be there more than once. See `keep_rows`.
    ///
    /// Raises:
    ///     KeyError: a name or an ID is unknown.
    ///     ValueError: a row is not there. Nothing was changed then.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.array([1.0, 2.0, 3.0]))
    /// >>> store.gather_rows(["w"], [2, 0, 0])
    /// >>> store.value("w")
    /// array([3., 1., 1.])
    #[pyo3(signature = (keys, index, *, dim=0))]
    fn gather_rows(
        &self,
        py: Python<'_>,
        keys: Vec<Key>,
        index: &Bound<'_, PyAny>,
        dim: isize,
    ) -> PyResult<()> {
        let index = array_rows::indices(py, index)?;
        array_rows::gather(py, self, &keys, &index, dim)
    }

    /// As `gather_rows`, where every row has to be there once.
    ///
    /// Raises:
    ///     KeyError: a name or an ID is unknown.
    ///     ValueError: a row is left out, or named twice. Nothing was changed then.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.array([1.0, 2.0, 3.0]))
    /// >>> store.permute_rows(["w"], [2, 0, 1])
    /// >>> store.value("w")
    /// array([3., 1., 2.])
    #[pyo3(signature = (keys, order, *, dim=0))]
    fn permute_rows(
        &self,
        py: Python<'_>,
        keys: Vec<Key>,
        order: &Bound<'_, PyAny>,
        dim: isize,
    ) -> PyResult<()> {
        let order = array_rows::indices(py, order)?;
        array_rows::permute(py, self, &keys, &order, dim)
    }

    /// Resets the state of these rows: their next step is a first step, bias correction included. The values stay.
    ///
    /// Args:
    ///     keys: names or IDs of parameters that have the same rows.
    ///     rows: a mask with a flag for each row, or indices; negative ones count from the end.
    ///     dim: the dimension of the rows.
    ///
    /// Raises:
    ///     KeyError: a name or an ID is unknown.
    ///     ValueError: a row is not there, or rows along another dimension differ. Nothing was changed then.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.zeros(3))
    /// >>> store.step({"w": np.ones(3)})
    /// >>> store.reset_rows(["w"], [1])
    /// >>> store.row_steps("w")
    /// [1, 0, 1]
    #[pyo3(signature = (keys, rows, *, dim=0))]
    fn reset_rows(
        &self,
        py: Python<'_>,
        keys: Vec<Key>,
        rows: &Bound<'_, PyAny>,
        dim: isize,
    ) -> PyResult<()> {
        array_rows::reset(py, self, &keys, rows, dim)
    }

    /// Adds rows at the end. Their first step is bias-corrected as a first step. See `keep_rows`.
    ///
    /// Args:
    ///     rows: from names or IDs to arrays of the value's dtype, or to a number of rows of zeros: as many for all. With
    ///         `copy_of`, only the names or IDs.
    ///     dim: the dimension of the rows.
    ///     copy_of: a mask or indices: copies of these rows are added. A copy of a frozen row is frozen.
    ///     state_of: a mask or indices, as many as rows are new: these are the rows whose state the new ones copy.
    ///
    /// Raises:
    ///     KeyError: a name or an ID is unknown.
    ///     TypeError: new rows have another dtype.
    ///     ValueError: rows do not have the shape of those that are there, or their bounds are not known. Nothing was
    ///         changed then.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.array([1.0]))
    /// >>> store.step({"w": np.array([5.0])})
    /// >>> store.append_rows({"w": np.array([2.0, 3.0])})
    /// >>> store.row_steps("w")
    /// [1, 0, 0]
    /// >>> store.append_rows(["w"], copy_of=[1], state_of=[0])
    /// >>> store.value("w")[3:], store.row_steps("w")
    /// (array([2.]), [1, 0, 0, 1])
    #[pyo3(signature = (rows, *, dim=0, copy_of=None, state_of=None))]
    fn append_rows(
        &self,
        py: Python<'_>,
        rows: &Bound<'_, PyAny>,
        dim: isize,
        copy_of: Option<&Bound<'_, PyAny>>,
        state_of: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        array_rows::append(py, self, rows, dim, [copy_of, state_of])
    }

    /// Adds rows of one number in front of the others and behind them, with state as new. See `keep_rows`.
    ///
    /// Args:
    ///     keys: names or IDs of parameters.
    ///     before, after: how many rows.
    ///     value: what they hold.
    ///     dim: the dimension of the rows.
    ///
    /// Raises:
    ///     KeyError: a name or an ID is unknown.
    ///     ValueError: a number of rows is negative, or bounds of each element say nothing of new rows. Nothing was
    ///         changed then.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.array([1.0, 2.0]))
    /// >>> store.pad_rows(["w"], before=1, after=2, value=7.0)
    /// >>> store.value("w")
    /// array([7., 1., 2., 7., 7.])
    #[pyo3(signature = (keys, before=0, after=0, *, value=0.0, dim=0))]
    fn pad_rows(
        &self,
        py: Python<'_>,
        keys: Vec<Key>,
        before: isize,
        after: isize,
        value: f64,
        dim: isize,
    ) -> PyResult<()> {
        array_rows::pad(py, self, &keys, [before, after], value, dim)
    }

    /// Lets there be so many rows: the last ones go, or rows of one number come behind, with state as new. See
    /// `keep_rows`.
    ///
    /// Args:
    ///     keys: names or IDs of parameters.
    ///     size: how many rows there are to be.
    ///     value: what new rows hold.
    ///     dim: the dimension of the rows.
    ///
    /// Raises:
    ///     KeyError: a name or an ID is unknown.
    ///     ValueError: the size is negative, or bounds of each element say nothing of new rows. Nothing was changed then.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.array([1.0, 2.0]))
    /// >>> store.resize_rows(["w"], 3, value=7.0)
    /// >>> store.value("w")
    /// array([1., 2., 7.])
    #[pyo3(signature = (keys, size, *, value=0.0, dim=0))]
    fn resize_rows(
        &self,
        py: Python<'_>,
        keys: Vec<Key>,
        size: isize,
        value: f64,
        dim: isize,
    ) -> PyResult<()> {
        array_rows::resize(py, self, &keys, size, value, dim)
    }

    /// Freezes rows: no update, no decay, no momentum, whatever their gradient, until `unfreeze_rows`.
    ///
    /// They grow no older, their gradients are not in the global norm, and nothing that is declared moves them. The
    /// parameters are all frozen so, or none is.
    ///
    /// Args:
    ///     keys: names or IDs of parameters that have the same rows.
    ///     rows: a mask with a flag for each row, or indices; negative ones count from the end.
    ///     dim: the dimension of the rows.
    ///
    /// Raises:
    ///     KeyError: a name or an ID is unknown, or has no array.
    ///     ValueError: a row is not there, or rows along another dimension differ. Nothing is frozen then.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.zeros(3))
    /// >>> store.freeze_rows(["w"], [0, 2])
    /// >>> store.step({"w": np.ones(3)}, lr=0.5)
    /// >>> store.value("w"), store.row_steps("w")
    /// (array([ 0. , -0.5,  0. ]), [0, 1, 0])
    #[pyo3(signature = (keys, rows, *, dim=0))]
    fn freeze_rows(
        &self,
        py: Python<'_>,
        keys: Vec<Key>,
        rows: &Bound<'_, PyAny>,
        dim: isize,
    ) -> PyResult<()> {
        array_rows::freeze(py, self, &keys, rows, dim)
    }

    /// Ends what `freeze_rows` began: the rows go on from the state that they had.
    ///
    /// Args:
    ///     keys: names or IDs of parameters that have the same rows.
    ///     rows: a mask with a flag for each row, or indices, along the dimension of the frozen ones; None stands for all.
    ///
    /// Raises:
    ///     KeyError: a name or an ID is unknown.
    ///     ValueError: a row is not there. Nothing was changed then.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.zeros(3))
    /// >>> store.freeze_rows(["w"], [0, 2])
    /// >>> store.unfreeze_rows(["w"], [2])
    /// >>> store.frozen_rows("w")
    /// [True, False, False]
    #[pyo3(signature = (keys, rows=None))]
    fn unfreeze_rows(
        &self,
        py: Python<'_>,
        keys: Vec<Key>,
        rows: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        array_rows::unfreeze(py, self, &keys, rows)
    }

    /// For each row, whether it is frozen; None where none is.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.zeros(3))
    /// >>> store.frozen_rows("w") is None
    /// True
    /// >>> store.freeze_rows(["w"], np.array([False, True, False]))
    /// >>> store.frozen_rows("w")
    /// [False, True, False]
    fn frozen_rows(&self, py: Python<'_>, key: Key) -> PyResult<Option<Vec<bool>>> {
        let id = self.find(py, &key)?;
        let loans = self.lock(py);
        let frozen = loans.core.frozen_rows(id).map_err(to_python)?;
        Ok(frozen.map(|(_, frozen)| frozen.to_vec()))
    }

    /// The steps that each row has taken; None where all have taken as many as the parameter.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.zeros(2))
    /// >>> store.step({"w": np.ones(2)})
    /// >>> store.row_steps("w") is None
    /// True
    /// >>> store.append_rows({"w": np.zeros(1)})
    /// >>> store.row_steps("w")
    /// [1, 1, 0]
    fn row_steps(&self, py: Python<'_>, key: Key) -> PyResult<Option<Vec<u64>>> {
        let id = self.find(py, &key)?;
        let steps = self.lock(py).core.row_steps(id).map_err(to_python)?;
        Ok(steps.map(|(_, steps)| steps))
    }

    /// Freezes a parameter: a step treats it as if it had no gradient, until `unfreeze`.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.zeros(2))
    /// >>> store.freeze("w")
    /// >>> store.step({"w": np.ones(2)})
    /// >>> store.value("w")
    /// array([0., 0.])
    fn freeze(&self, py: Python<'_>, key: Key) -> PyResult<()> {
        let id = self.find(py, &key)?;
        self.lock(py).core.freeze(id).map_err(to_python)
    }

    /// Ends what `freeze` began: the moments go on where they were.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.zeros(2))
    /// >>> store.freeze("w")
    /// >>> store.unfreeze("w")
    /// >>> store.is_frozen("w")
    /// False
    fn unfreeze(&self, py: Python<'_>, key: Key) -> PyResult<()> {
        let id = self.find(py, &key)?;
        self.lock(py).core.unfreeze(id).map_err(to_python)
    }

    /// Whether a parameter is frozen.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w")
    /// >>> store.freeze("w")
    /// >>> store.is_frozen("w")
    /// True
    fn is_frozen(&self, py: Python<'_>, key: Key) -> PyResult<bool> {
        let id = self.find(py, &key)?;
        self.lock(py).core.is_frozen(id).map_err(to_python)
    }

    /// State as if never stepped; the value stays.
    ///
    /// Raises:
    ///     KeyError: the name or the ID is unknown.
    ///
    /// >>> store = Store()
    /// >>> _ = store.register("w", np.zeros(2))
    /// >>> store.step({"w": np.ones(2)})
    /// >>> store.reset("w")
    /// >>> store.state("w")
    /// {}
    fn reset(&self, py: Python<'_>, key: Key) -> PyResult<()> {
        let id = self.find(py, &key)?;
        let returned = {
            let mut loans = self.lock(py);
            loans.revise();
            loans.reset(id)
        };
        returned.map(drop).map_err(to_python)
    }

    fn __traverse__(&self, visit: PyVisit<'_>) -> Result<(), PyTraverseError> {
        // Whoever holds the lock is using these objects: they are not garbage.
        let Ok(loans) = self.loans.try_lock() else { return Ok(()) };
        loans.all().try_for_each(|loan| visit.call(loan.object()))
    }

    fn __clear__(&self) {
        let loans = self.loans.try_lock().map(|mut loans| std::mem::take(&mut *loans));
        drop(loans);
    }
}
