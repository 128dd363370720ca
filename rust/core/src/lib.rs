//! Optimizer state that belongs to a parameter.
//!
//! The moments of Adam and AdamW live under a stable [`ParamId`] in a [`Store`]: whatever happens to
//! a parameter's value, its name or the order of a model, the state follows the ID. The update, the
//! clip by the global norm and the bounds run in one pass over memory.
//!
//! ```
//! use paramstate::{Adam, Bounds, ParamId, Store, StepOptions};
//!
//! let mut store = Store::new();
//! // Under an ID of one's own, or (`None`) under one derived from the name.
//! let weight = store.register_values(Some("weight"), Some(ParamId::new(7)?), &[2, 2], &[0.5f32; 4])?;
//! let bias = store.register_values(Some("bias"), None, &[2], &[0.0f32; 2])?;
//!
//! let grads = [(weight, (&[0.1f32, -0.2, 0.3, -0.4]).into()), (bias, (&[1.0f32, -1.0]).into())];
//! let adam = Adam { lr: 0.01, ..Adam::default() };
//! let report = store.step(&grads, &adam, &StepOptions { max_grad_norm: Some(1.0), ..Default::default() })?;
//! assert_eq!(report.updated, 2);
//! assert!(report.grad_norm.is_some_and(|norm| norm > 1.0));
//!
//! // Clipping keeps the moments: by bounds, or by a closure over the values.
//! store.clip(bias, Bounds::new(Some(0.0), None)?)?;
//! store.clip_with(weight, |values: &mut [f32]| {
//!     for x in values {
//!         *x = x.min(0.5);
//!     }
//! })?;
//! assert_eq!(store.values::<f32>(bias)?, [0.0, 0.01]);
//! let moments = store.state::<f32>(weight)?.expect("it was stepped");
//! assert_eq!((moments.step, moments.exp_avg.len()), (1, 4));
//!
//! // A rename changes the name, never the ID.
//! store.rename("weight", "proj.weight")?;
//! assert_eq!(store.id("proj.weight"), Some(weight));
//! // Rows come and go with their state; new ones are bias-corrected as a fresh parameter is.
//! store.append_rows(0, 1, &[(weight, (&[0.0f32, 0.0]).into())])?;
//! assert_eq!(store.row_steps(weight)?, Some((0, vec![1, 1, 0])));
//! # Ok::<(), paramstate::Error>(())
//! ```
//!
//! A framework that makes a new parameter of each change of a value, as Burn's `Param` does, keeps
//! its own ID beside the store's and loses no moments:
//!
//! ```
//! use paramstate::{Adam, ParamId, Store, StepOptions};
//!
//! # let (burn_id, mut weights, grads) = (41u64, vec![0.2f32, 0.9], vec![1.0f32, -1.0]);
//! let mut store = Store::new();
//! let id = ParamId::new(burn_id)?;
//! store.register_values(Some("linear.weight"), Some(id), &[2], &weights)?;
//! for _ in 0..3 {
//!     store.step(&[(id, (&grads).into())], &Adam::default(), &StepOptions::default())?;
//!     store.clip_with(id, |values: &mut [f32]| {
//!         values[0] = values[0].clamp(0.1, 1.0);
//!         values[1] = values[1].min(2.0 * values[0]); // a bound that depends on another value
//!     })?;
//!     weights.copy_from_slice(store.values(id)?);
//! }
//! assert!(weights[1] <= 2.0 * weights[0]);
//! assert_eq!(store.steps(id)?, 3); // the moments are those of three steps, not of one
//! # Ok::<(), paramstate::Error>(())
//! ```
//!
//! Another framework's memory is lent through [`Buffer::Borrowed`]; a binding that keeps the work
//! list by itself calls the kernels below the store: [`adam_step`], [`sum_of_squares`], [`scale`],
//! [`clamp`], and [`overlapping`] to check what it was given.

mod along;
mod blockwise;
mod bounds;
mod buffer;
mod codec;
mod cohorts;
mod element;
mod elementwise;
mod entry;
mod error;
mod float_mode;
mod frozen_rows;
mod fused;
mod helpers_gate;
mod hold;

mod id;
mod isa;
mod kahan;
mod layout;
mod limits;
#[cfg(target_arch = "x86_64")]
mod mixed_rows;
mod norm;
mod norm_groups;
mod norm_order;
mod norms;
mod operands;
mod overlap;
mod pairs;
mod parallel;
mod particulars;
mod precision;
mod prefetch;
mod prepared;
mod project;
mod random;
mod row_change;
#[cfg(target_arch = "x86_64")]
mod row_chunks;
mod row_edit;
#[cfg(target_arch = "x86_64")]
mod row_lanes;
mod row_strip;
mod row_traits;
mod row_walk;
mod rows;
mod side;
mod slices;
mod step;
mod store;
mod task;
mod update;
mod values;
mod varied;

pub use blockwise::BLOCK_LEN;
pub use bounds::Bounds;
pub use buffer::{Buffer, Lender, Lent, OwnedBuffer};
pub use cohorts::Cohorts;
pub use element::{DType, Element};
pub use elementwise::{clamp, scale};
pub use entry::Entry;
pub use error::{Error, Label, Result};
pub use half::{bf16, f16};
pub use hold::Reach;
pub use id::ParamId;
pub use isa::Isa;
pub use layout::{Layout, Operand, StridedLayout, View, ViewLayout, row_major};
pub use norm::{clip_coefficient, gradient_squares, sum_of_squares};
pub use overlap::{Extent, overlapping, overlaps_itself};
pub use parallel::Execution;
pub use particulars::{Particulars, WhenBound};
pub use precision::{Precision, Rounding, Scales};
pub use prefetch::prefetch;
pub use project::{NormLimit, Projection, project};
pub use random::Stream;
pub use row_change::RowChange;
pub use row_edit::{NewValue, Values};
pub use rows::RowSteps;
pub use step::{Gradient, StepOptions, StepReport};
pub use store::Store;
pub use task::{AdamTask, Order, adam_step};
pub use update::{Adam, AdamScalars, Decay, Direction, SecondMoment};
pub use values::Moments;
