"""Adam and AdamW: torch's classes, with state that belongs to parameters and a step on the compiled kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim.optimizer import ParamsT, _use_grad_for_differentiable

from . import _core
from .declared.constraints import AnyConstraint
from .declared.rows import RowIndex
from .errors import UnsupportedError, listed
from .identified import IdentifiedOptimizer
from .identity.shared import Shared
from .identity.tables import OnReplace
from .precision.state_dtype import COMPENSATION, StateDType
from .selection.selecting import Selection
from .step.dry_steps import is_asked_for_state_alone
from .step.fresh_state import MOMENTS, initial_state, is_compensated
from .step.functional import Undo, adam_step, gather
from .step.host import HostStep
from .step.plain_precision import require_plain
from .torch_releases import check_graph_capture

Rounding = Literal["nearest", "stochastic", "kahan"]
"""How a new value is rounded to 16 bits."""

Constraints = AnyConstraint | Mapping[Any, AnyConstraint]
"""Keys are names, parameters or selections; a mapping's key type is invariant, so ``dict[str, Box]`` must fit too."""


class Adam(IdentifiedOptimizer, torch.optim.Adam):
    """Adam (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1), a drop-in for :class:`torch.optim.Adam`.

    State belongs to a parameter, under an ID that stays when its tensor object is replaced, moved, renamed or reloaded.

    Args:
        params: what torch takes, the model itself, or a selection. A group's ``"params"`` may be those, too.
        lr, betas, eps, weight_decay, amsgrad, foreach, maximize, capturable, differentiable, fused,
            decoupled_weight_decay: as in :class:`torch.optim.Adam`. On the host ``foreach`` and ``fused`` choose no
            kernel; ``fused=True`` only makes a gradient scaler leave unscaling to the step.
        model: the model that the parameters belong to, where ``params`` is not the model. With it the optimizer knows
            names, and a parameter that leaves the model is followed or raised.
        store: the ``store`` of an earlier optimizer: IDs and state continue under the same names.
        max_grad_norm: clip the global norm of all gradients to this inside the step, as
            ``clip_grad_norm_(params, max_grad_norm)`` before it would; the gradients are left as they are, the norm is
            in :attr:`grad_norm` afterwards.
        constraints: one constraint for all parameters (:class:`Box`, :func:`NonNegative`, :class:`MaxNorm`,
            :class:`UnitNorm`, or a function of the values), or a mapping from names, patterns or selections to one.
            Holds after every step.
        on_replace: what happens to the state of a parameter whose tensor was replaced: ``"keep"`` it, ``"reset"`` it,
            or raise an ``"error"``.
        state_dtype: in what dtype moments are kept on the host: ``torch.float32``, ``torch.bfloat16`` (half of that) or
            ``"8bit"`` (a quarter), for all parameters or as a mapping from names, patterns or selections; by default as
            torch keeps them. See :mod:`paramstate.precision.state_dtype`.
        rounding: how new values of bfloat16 and float16 parameters are rounded on the host: to the ``"nearest"``, as
            torch does, which loses updates of less than half a place; ``"stochastic"``, which keeps them on average
            (Gupta et al. 2015, arXiv:1502.02551), moments as well; or ``"kahan"``, which keeps what rounding left over
            in the state ``compensation``, two more bytes a parameter (Zamirai et al. 2020, arXiv:2010.06192).
        rounding_seed: of what is random, at least 0. With the parameter's ID, its step and the index of the element it
            fixes every choice: results depend neither on threads nor on the order of work.

    Raises:
        ValueError, TypeError: an argument is wrong, with torch's texts.
        OverlapError: two parameters share memory, or one is ``expand()``ed.
        UnknownParameterError: ``constraints`` names an unknown parameter.

    Example:
        >>> import torch
        >>> from paramstate import Adam
        >>> model = torch.nn.Linear(2, 1)
        >>> opt = Adam(model, lr=0.1)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> opt.step()
        >>> model.weight = torch.nn.Parameter(model.weight.detach().clamp(-1, 1))  # a new tensor object
        >>> opt.state_of(model.weight)["step"]                                      # with the old one's state
        tensor(1.)
    """

    _shaped_state = (*MOMENTS, COMPENSATION)
    _gathers_itself = False
    """Whether a subclass has an ``_init_group`` of its own."""
    _max_grad_norm: float | None = None
    _rounding: tuple[Rounding, int] = ("nearest", 0)
    _grad_norm = Shared[Tensor | None](None)

    def __init__(
        self,
        params: ParamsT | nn.Module | Selection,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        model: nn.Module | None = None,
        store: _core.Store | None = None,
        max_grad_norm: float | None = None,
        constraints: Constraints | None = None,
        on_replace: OnReplace = "keep",
        state_dtype: StateDType | Mapping[Any, StateDType] | None = None,
        rounding: Rounding = "nearest",
        rounding_seed: int = 0,
    ) -> None:
        self._rounding = _rounding(rounding, rounding_seed)
        if max_grad_norm is not None and not max_grad_norm >= 0.0:
            raise ValueError(f"Invalid max_grad_norm value: {max_grad_norm}")
        given = self._begin_identity(params, model, store, on_replace)
        torch.optim.Adam.__init__(
            self,
            given,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        self._max_grad_norm = max_grad_norm
        self._end_identity()
        self._begin_state_dtype(state_dtype)
        if isinstance(constraints, Mapping):
            self._declare(constraints.items())
        elif constraints is not None:
            self._sync()
            self._declare([([entry.param for entry in self._table], constraints)])

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Not by comparing with torch's function: torch.compile puts another into each of torch's classes.
        owners = [owner for owner in cls.__mro__ if "_init_group" in vars(owner)]
        cls._gathers_itself = not owners[0].__module__.startswith("torch.")

    @property
    def grad_norm(self) -> Tensor | None:
        """The global norm of the gradients, 0-dim, that the last step with ``max_grad_norm`` saw; ``None`` before.

        Example:
            >>> import torch
            >>> from paramstate import Adam
            >>> weight = torch.nn.Parameter(torch.zeros(2))
            >>> opt = Adam([weight], max_grad_norm=1.0)
            >>> weight.grad = torch.tensor([3.0, 4.0])
            >>> opt.step()
            >>> opt.grad_norm
            tensor(5., dtype=torch.float64)
        """
        return self._grad_norm

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None, *, rows: Mapping[Any, RowIndex] | None = None) -> Any:
        """Take one step.

        Args:
            closure: reevaluates the model and returns the loss; called with gradients enabled, before they are read.
            rows: parameter (or name, or selection) to the rows along dim 0, as a bool mask or indices, that are updated
                this time; its other rows are not touched and their state does not age. A parameter that is not named is
                updated whole.

        Returns:
            What the closure returned, else ``None``.

        Raises:
            ReplacedParameterError: the model changed in a way that only the user can decide.
            StateShapeError: a value, its gradient or its state have different shapes.
            OverlapError: parameters share memory.
            RowIndexError, SelectionError: ``rows`` names rows that are not there, or a parameter twice.
            ConstraintError: a constraint that is a function failed. The step was taken then; the message says which
                parameter's constraint was not applied.

        After any other error values, moments and steps are as they were.

        Example:
            >>> import torch
            >>> from paramstate import Adam
            >>> table = torch.nn.Embedding(3, 2)
            >>> opt = Adam(table, lr=0.1)
            >>> before = table.weight.detach().clone()
            >>> table.weight.sum().backward()
            >>> opt.step(rows={"weight": torch.tensor([True, False, False])})
            >>> (before - table.weight).detach()[:, 0].round(decimals=6)
            tensor([0.1000, 0.0000, 0.0000])
        """
        check_graph_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            if self._is_left_to_the_graph(rows):
                self._step_traced()
        else:
            with self._lock:
                self._step_eagerly(rows)
        return loss

    def _step_eagerly(self, rows: Mapping[Any, RowIndex] | None) -> None:
        self._settle(stepping=True)
        if is_asked_for_state_alone(self):
            self.materialize_state()
            return
        found_inf = getattr(self, "found_inf", None)
        if found_inf is not None and bool(found_inf != 0):
            self._project_after_step(what="the step was skipped for its infinite gradients")
            return
        if self._needs_torch():
            with self._frozen_out_of_sight():
                self._require_whole_steps(rows)
                self._step_by_torch()
            return
        step = HostStep(self, self._max_grad_norm, self._chosen_rows(rows), self._rounding)
        try:
            step.run()
        finally:
            if step.grad_norm is not None:  # also where a constraint failed after the update
                self._grad_norm = torch.tensor(step.grad_norm, dtype=torch.float64)

    def _needs_torch(self) -> bool:
        """Whether the whole step is torch's.

        Tensors may not be what they seem, gradients flow through the step, or a subclass gathers in a way of its own.
        """
        return (
            self._gathers_itself
            or _is_traced()
            or any(group["differentiable"] or _is_captured(group) for group in self.param_groups)
        )

    def _require_whole_steps(self, rows: Mapping[Any, RowIndex] | None) -> None:
        """Refuse what torch's function cannot do, by name."""
        reason = "cannot be honoured by a step that is compiled, traced, capturable or differentiable"
        if rows:
            raise UnsupportedError(f"step(rows=...) {reason}; take such a step without compiling")
        for entry in self._table:
            if entry.rows is not None:
                raise UnsupportedError(
                    f"the rows of {self._table.called(entry)}, frozen or of different ages, {reason}"
                )
            if entry.frozen and entry.param.grad is not None:
                raise UnsupportedError(
                    f"that {self._table.called(entry)} is frozen {reason} while it has a gradient; call zero_grad()"
                )

    @_disable_dynamo
    def _is_left_to_the_graph(self, rows: Mapping[Any, RowIndex] | None) -> bool:
        """Do what ``torch.compile`` must not trace, for it asks anew on each step; returns whether a step is left."""
        with self._lock:
            self._settle(stepping=True)
            self._sync()
            self._require_whole_steps(rows)
            self._require_plain_precision()
            self._forget_versions(entry.param for entry in self._table)
            if is_asked_for_state_alone(self):
                self.materialize_state()
                return False
        return True

    def _step_by_torch(self) -> None:
        if not _is_traced():  # while tracing, stand-ins may be in the groups: they are nobody's parameters
            self._sync()
        self._forget_versions(entry.param for entry in self._table)
        self._require_plain_precision()
        undo = Undo(self.state)
        for group in self.param_groups:
            for param in group["params"]:
                undo.remember_entry(param)
        try:
            self._step_traced()
        except BaseException:
            undo.restore()
            raise

    def _step_traced(self) -> None:
        """The step that ``torch.compile``, tracing and ``differentiable`` can look into."""
        if self._max_grad_norm is not None:
            raise UnsupportedError(
                "max_grad_norm cannot be honoured by a step that is compiled, traced, capturable or differentiable, "
                "nor under a subclass's own _init_group; call clip_grad_norm_(...) before step()"
            )
        if self._constrained:
            raise UnsupportedError(
                "constraints cannot be honoured by a step that is compiled, traced, capturable or differentiable, "
                "nor under a subclass's own _init_group; call clip_(...) after step()"
            )
        # All groups before the first write: torch refuses gradients and options here.
        gathered = [gather(self, group, group["params"]) for group in self.param_groups]
        for group, lists in zip(self.param_groups, gathered, strict=True):
            adam_step(self, group, lists)

    def _require_plain_precision(self) -> None:
        if self._rounding[0] == "nearest" and not self._is_retyped:
            return
        for group in self.param_groups:
            for param in group["params"]:
                entry = self._table.of(param)
                if entry is not None and param.grad is not None:
                    require_plain(self, param, self._rounding[0], repr(self._table.name(entry)))

    def materialize_state(self) -> None:
        """Create the state of every parameter that requires a gradient and has none, without taking a step.

        Example:
            >>> import torch
            >>> from paramstate import Adam
            >>> opt = Adam(torch.nn.Linear(2, 1))
            >>> opt.materialize_state()
            >>> list(opt.state_of("weight")), opt.state_of("weight")["step"]
            (['step', 'exp_avg', 'exp_avg_sq'], tensor(0.))
        """
        self._sync()
        for group in self.param_groups:
            for param in group["params"]:
                if param.requires_grad and not self.state.get(param):
                    compensated = is_compensated(param, self._rounding[0])
                    self.state[param].update(initial_state(param, group, self._kept_as(param), compensated=compensated))
                    self._state_begins(param)

    def __getstate__(self) -> dict[str, Any]:
        own = {"_max_grad_norm": self._max_grad_norm, "_rounding": self._rounding}
        return {**super().__getstate__(), **own}


def _is_captured(group: dict[str, Any]) -> bool:
    """Whether a group is ``capturable`` in truth: torch's fused step takes that on the host, where it means nothing."""
    if not group["capturable"]:
        return False
    return not (group["fused"] and all(param.is_cpu for param in group["params"]))


class AdamW(Adam, torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2), a drop-in for :class:`torch.optim.AdamW`.

    As :class:`Adam`, with decay that does not pass through the moments.

    Example:
        >>> import torch
        >>> from paramstate import AdamW
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
        >>> opt = AdamW(model, lr=1e-3, max_grad_norm=1.0)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> opt.step()
        >>> opt.state_of("1.weight")["step"]
        tensor(1.)
    """

    def __init__(
        self,
        params: ParamsT | nn.Module | Selection,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        model: nn.Module | None = None,
        store: _core.Store | None = None,
        max_grad_norm: float | None = None,
        constraints: Constraints | None = None,
        on_replace: OnReplace = "keep",
        state_dtype: StateDType | Mapping[Any, StateDType] | None = None,
        rounding: Rounding = "nearest",
        rounding_seed: int = 0,
    ) -> None:
        Adam.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            model=model,
            store=store,
            max_grad_norm=max_grad_norm,
            constraints=constraints,
            on_replace=on_replace,
            state_dtype=state_dtype,
            rounding=rounding,
            rounding_seed=rounding_seed,
        )


def _rounding(rounding: Rounding, seed: int) -> tuple[Rounding, int]:
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding must be one of {listed(get_args(Rounding))}, got {rounding!r}")
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"rounding_seed must be an integer from 0 to 2**64 - 1, got {seed!r}")
    return rounding, seed


def _is_traced() -> bool:
    """Whether tensors may not be what they seem: a mode or a transform looks into every operation."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._functorch.maybe_current_level() is not None
