"""What can be done to a model while it runs: what `Model.ablate` and `Model.sweep` take.

`Mask` cuts attention edges. The others change an activation at some positions of a site (`EDITABLE`) of a layer; at
`attn.hook_z` of some heads, or of all where none are named. Values are tensors in the shape of what stands there, such
as `Model.clean` keeps.
"""

from raymi.model.interventions import EDITABLE, Edit, Intervention, Mask, add, mean, replace, scale, zero

__all__ = ["EDITABLE", "Edit", "Intervention", "Mask", "add", "mean", "replace", "scale", "zero"]
