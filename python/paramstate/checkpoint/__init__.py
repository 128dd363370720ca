"""The state of an optimizer as one safetensors file, keyed by the names of the parameters.

One question for each file: ``saving`` and ``loading`` are what a user calls, ``content`` says by which keys the state
stands in a file, ``encoding`` how plain data becomes JSON beside tensors, ``container`` where the bytes go, and
``replacement`` how a file appears at once or not at all. docs/checkpoints.md specifies the format.
"""
