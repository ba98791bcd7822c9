"""What can be done to a model while it runs: what `Model.ablate` and `Model.sweep` take.

`Mask` cuts attention edges. The others change an activation at some positions of a site (`EDITABLE`) of a layer; at
`attn.hook_z` of some heads, or of all where none are named. Negative positions count from the prompt's end. Values are
tensors in the shape of what stands there, or what `Model.clean` has captured over a prompt of as many tokens, as it is.
"""

from raymi.model.interventions import EDITABLE, Edit, Intervention, Mask, add, mean, replace, scale, zero

__all__ = ["EDITABLE", "Edit", "Intervention", "Mask", "add", "mean", "replace", "scale", "zero"]
